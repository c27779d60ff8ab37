"""llama.cpp splits text as the tokenizer does, or the export says that it will not."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.gguf_reading import Read

SAMPLE = (
    "Once upon a time, THEY'LL say I'm 1234567 years old; it's 3.14 now!  Two  spaces\n\n\nand lines,\ttabs\r\n"
    "naïve café — Привет мир, 日本語 🚀 x_1 = foo(bar[0]) != {'a': ...}  "
)
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def train(kind: str):
    """A tokenizer of that kind, of Python's own text."""
    import argparse

    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>"]
    settings = {"vocab_size": 560, "special_tokens": special, "show_progress": False}
    if kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(unk_token="<unk>", **settings)
    elif kind == "words":
        tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
        trainer = trainers.WordLevelTrainer(**settings)
    else:
        spaces = kind == "sentencepiece"
        tokenizer = Tokenizer(
            models.BPE(unk_token="<unk>", byte_fallback=True) if spaces else models.BPE(ignore_merges=kind == "llama3")
        )
        settings["special_tokens"] = special + [f"<0x{value:02X}>" for value in range(256)] if spaces else special
        alphabet = [] if spaces else pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(initial_alphabet=alphabet, **settings)
    if kind in ("unigram", "sentencepiece"):
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    elif kind == "words":
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    else:
        tokenizer.decoder = decoders.ByteLevel()
        splits = {
            "gpt2": [], "digits": [pre_tokenizers.Digits(individual_digits=True)],
            "qwen2": [pre_tokenizers.Split(Regex(WORDS % ""), "isolated")],
            "llama3": [pre_tokenizers.Split(Regex(WORDS % "{1,3}"), "isolated")],
            "phi4": [pre_tokenizers.Split(Regex(WORDS % "{1,3}"), "isolated")],
            "unknown": [pre_tokenizers.Split(Regex(r"\w+|\W+"), "isolated")],
        }[kind]  # fmt: skip
        plain = kind in ("gpt2", "digits")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=plain)]
        )
        tokenizer.normalizer = normalizers.NFC() if kind == "qwen2" else None
    tokenizer.train_from_iterator([Path(argparse.__file__).read_text(), SAMPLE] * 2, trainer)
    tokenizer.add_tokens([AddedToken("<|user|>", special=True), AddedToken("[tool]", special=False)])
    if kind in ("llama3", "sentencepiece"):
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture
def with_tokenizer(make_checkpoint, tmp_path: Path) -> Callable[[str], Path]:
    """``with_tokenizer(kind)`` -> a checkpoint that has one of that kind."""

    def make(kind: str) -> Path:
        source = tmp_path / "model"
        shutil.copytree(make_checkpoint("llama", vocab_size=600), source)
        for file in source.glob("*token*"):
            file.unlink()
        train(kind).save_pretrained(source)
        return source

    return make


@pytest.mark.parametrize(
    ("kind", "model", "pre"),
    [
        ("gpt2", "gpt2", "gpt-2"), ("digits", "gpt2", "smollm"), ("qwen2", "gpt2", "qwen2"), ("llama3", "gpt2", "llama-bpe"),
        ("phi4", "gpt2", "dbrx"), ("sentencepiece", "llama", "default"), ("unigram", "t5", "default"),
    ],
)  # fmt: skip
def test_llama_cpp_splits_text_alike(with_tokenizer, write, llama_cpp, kind: str, model: str, pre: str):
    from transformers import AutoTokenizer

    source = with_tokenizer(kind)
    file = write(source)
    read, tokenizer = Read(file), AutoTokenizer.from_pretrained(source)
    assert (read.metadata["tokenizer.ggml.model"], read.metadata["tokenizer.ggml.pre"]) == (model, pre)
    assert len(read.metadata["tokenizer.ggml.tokens"]) == 600
    other = llama_cpp.Llama(str(file), vocab_only=True, verbose=False)
    texts = [SAMPLE, "a", SAMPLE * 3]
    if model == "gpt2":  # the others put a space before a text, or a part of it, that begins with one or follows a special token
        texts += [" leading", "one [tool] two"]
    for text in texts:
        assert other.tokenize(text.encode(), special=False) == tokenizer(text)["input_ids"], text
    marked = "<|user|>hello</s>" if model == "gpt2" else "hello</s>"
    assert other.tokenize(marked.encode(), special=True) == tokenizer(marked)["input_ids"]
    assert other.token_bos() == 1 and other.token_eos() == 2


@pytest.mark.parametrize(
    ("kind", "model", "message"),
    [
        ("unknown", "gpt2", "no pre-tokenizer that splits"),
        ("words", "none", "no WordLevel tokenizer"),
        (None, "none", "no fast tokenizer"),
    ],
)
def test_tokenizers_that_llama_cpp_lacks(with_tokenizer, write, llama_logits, caplog, kind: str | None, model: str, message: str):
    """The model is written nevertheless, and runs on token ids."""
    source = with_tokenizer(kind or "gpt2")
    if kind is None:
        for file in source.glob("*token*"):
            file.unlink()
    with caplog.at_level(logging.WARNING):
        file = write(source)
    assert Read(file).metadata["tokenizer.ggml.model"] == model
    assert message in caplog.text
    assert llama_logits(file, torch.arange(9)).shape == (9, 600)
