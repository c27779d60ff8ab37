"""A checkpoint's tokenizer as llama.cpp has it, or why it has none.

llama.cpp knows byte-level BPE with a fixed set of ways to split text into words, SentencePiece's BPE (which merges by the
score of the result, so that a merge's rank becomes a score) and unigram models. Where its splitting or merging may differ
from the checkpoint's, ``doubts`` says so; but for what is common and rarely shows: llama.cpp does not compose characters
(NFC), and where a tokenizer puts a space before every text that begins with none, it puts one before every text.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compress.calibration import surroundings

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_SPACE = "▁"
_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "sentencepiece.bpe.model")

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# (how text is split into words, whether a word that is a token is left whole) -> llama.cpp's name of the pre-tokenizer
_SPLITS: dict[tuple[tuple[str, ...], bool], str] = {
    ((_GPT2,), False): "gpt-2",
    (("digits", _GPT2), False): "smollm",
    ((_WORDS % "",), False): "qwen2",
    ((_WORDS % "{1,3}",), False): "dbrx",
    ((_WORDS % "{1,3}",), True): "llama-bpe",
    ((_TEKKEN,), True): "tekken",
}


@dataclass
class Vocabulary:
    """model: llama.cpp's kind of tokenizer, "none" for no vocabulary at all. tokens, types, scores: one a row of the
    embedding. special: ids by role. flags: what is done to text first and last. doubts: sentences for the user."""

    model: str = "none"
    pre: str = "default"
    tokens: list[str] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    scores: list[float] | None = None
    merges: list[str] | None = None
    special: dict[str, int] = field(default_factory=dict)
    flags: dict[str, bool] = field(default_factory=dict)
    charsmap: bytes | None = None
    chat_template: str | None = None
    doubts: list[str] = field(default_factory=list)

    def add_to(self, writer: Any) -> None:
        """Write it into a ``gguf.GGUFWriter``."""
        writer.add_tokenizer_model(self.model)
        if self.model == "none":
            return
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.scores is not None:
            writer.add_token_scores(self.scores)
        if self.merges is not None:
            writer.add_token_merges(self.merges)
        if self.charsmap is not None:
            writer.add_precompiled_charsmap(self.charsmap)
        for role, token in self.special.items():
            getattr(writer, f"add_{role}_token_id")(token)
        for flag, value in self.flags.items():
            getattr(writer, f"add_{flag}")(value)
        if self.chat_template:
            writer.add_chat_template(self.chat_template)


def read_vocabulary(path: Path, n_tokens: int) -> Vocabulary:
    """The tokenizer of a checkpoint directory whose embedding has ``n_tokens`` rows."""
    tokenizer = _load(path)
    if tokenizer is None:
        return Vocabulary(
            doubts=["the checkpoint has no fast tokenizer; the file carries no vocabulary and takes token ids only"]
        )
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    kind, model = spec["model"].get("type"), spec["model"]
    stages = _stages(spec.get("pre_tokenizer"), "pretokenizers")
    normal = _stages(spec.get("normalizer"), "normalizers")
    found = Vocabulary()
    if kind == "BPE" and any(stage["type"] == "ByteLevel" for stage in stages):
        _byte_level(found, model, stages, normal)
    elif kind == "BPE" and _SPACE in json.dumps([stages, normal], ensure_ascii=False) and model["merges"]:
        _sentence_piece(found, model, stages, normal)
    elif kind == "Unigram" or (kind == "BPE" and not model["merges"]):  # of characters: any unigram scores give the same
        _unigram(found, model, stages, normal)
    else:
        doubt = f"llama.cpp has no {kind} tokenizer of this kind; the file carries no vocabulary and takes token ids only"
        return Vocabulary(doubts=[doubt])
    _list_tokens(found, tokenizer, spec, n_tokens)
    _ends(found, tokenizer)
    template = getattr(tokenizer, "chat_template", None)
    found.chat_template = template if isinstance(template, str) else None
    return found


def _load(path: Path) -> Any:
    from transformers import AutoTokenizer

    if not any((path / name).exists() for name in _FILES):  # transformers would make up an empty one
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception:  # every kind of exception, depending on what is missing
        return None
    return tokenizer if getattr(tokenizer, "is_fast", False) else None


def _stages(entry: dict | None, key: str) -> list[dict]:
    if entry is None:
        return []
    return [stage for inner in entry[key] for stage in _stages(inner, key)] if entry["type"] == "Sequence" else [entry]


def _list_tokens(found: Vocabulary, tokenizer: Any, spec: dict, n_tokens: int) -> None:
    texts = {index: text for text, index in tokenizer.get_vocab().items()}
    added = {entry["id"]: entry for entry in spec["added_tokens"]}
    scores = dict(enumerate(found.scores)) if found.scores is not None else None
    byte_tokens = {f"<0x{value:02X}>" for value in range(256)} if found.model != "gpt2" else set()
    if beyond := sum(index >= n_tokens for index in texts):
        found.doubts.append(f"{beyond} tokens have no row in the embedding and are left out")
    for index in range(n_tokens):
        text = texts.get(index)
        if text is None:
            kind = _UNUSED
        elif index in added:
            kind = _CONTROL if added[index]["special"] else _USER_DEFINED
        else:
            kind = _BYTE if text in byte_tokens else _NORMAL
        if text is not None and found.model != "gpt2" and index == tokenizer.unk_token_id:
            kind = _UNKNOWN
        found.tokens.append(f"[PAD{index}]" if text is None else text)
        found.types.append(kind)
    if scores is not None:
        found.scores = [scores.get(index, -1e4) for index in range(n_tokens)]


def _ends(found: Vocabulary, tokenizer: Any) -> None:
    """Special tokens, and whether text is encoded between them."""
    for role in ("bos", "eos", "unk", "pad"):
        token = getattr(tokenizer, f"{role}_token_id", None)
        if token is not None and token < len(found.tokens):
            found.special[role] = token
    before, after = surroundings(tokenizer)
    found.flags |= {"add_bos_token": bool(before), "add_eos_token": bool(after)}
    if before:
        found.special["bos"] = before[-1]
    if after:
        found.special["eos"] = after[0]
    if len(before) > 1 or len(after) > 1:
        found.doubts.append("the tokenizer puts several special tokens around a text, llama.cpp one")


def _byte_level(found: Vocabulary, model: dict, stages: list[dict], normal: list[dict]) -> None:
    found.model = "gpt2"
    found.merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    splits = []
    for stage in stages:
        if stage["type"] == "Split":
            splits.append(str(stage["pattern"].get("Regex") or stage["pattern"].get("String")))
        elif stage["type"] == "Digits":
            splits.append("digits" if stage["individual_digits"] else "numbers")
        elif stage["type"] == "ByteLevel":
            splits += [_GPT2] if stage.get("use_regex", True) else []
            if stage.get("add_prefix_space"):
                found.doubts.append("the tokenizer puts a space before a text, llama.cpp does not: write it yourself")
        else:
            splits.append(stage["type"])
    name = _SPLITS.get((tuple(splits), bool(model.get("ignore_merges"))))
    if name is None:
        name = "gpt-2"
        found.doubts.append(
            "llama.cpp has no pre-tokenizer that splits text as this one does; GPT-2's is named, some words differ"
        )
    found.pre = name
    if any(stage["type"] != "NFC" for stage in normal):  # text is nearly always in that form already
        found.doubts.append("the tokenizer normalizes text first, llama.cpp does not")


def _sentence_piece(found: Vocabulary, model: dict, stages: list[dict], normal: list[dict]) -> None:
    found.model = "llama"
    pairs = [pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"]]
    vocabulary = model["vocab"]
    ranks: dict[int, float] = {}
    for rank, (left, right) in enumerate(pairs):
        ranks.setdefault(vocabulary[left + right], -float(rank))
    found.scores = [ranks.get(index, 0.0) for index in range(max(vocabulary.values()) + 1)]
    found.flags["add_space_prefix"] = _prefixed(stages, normal)
    listed = {(left, right) for left, right in pairs}
    extra = sum(
        text[:i] in vocabulary and text[i:] in vocabulary and (text[:i], text[i:]) not in listed
        for text in {left + right for left, right in pairs}
        for i in range(1, len(text))
    )
    if extra:
        found.doubts.append(
            f"llama.cpp merges {extra} pairs of tokens that this tokenizer keeps apart; rare words may be split differently"
        )
    if "<0x00>" not in vocabulary:
        found.doubts.append("the tokenizer has no tokens of single bytes: llama.cpp aborts on a character that is no token")
    _doubt_normalizer(found, normal)


def _unigram(found: Vocabulary, model: dict, stages: list[dict], normal: list[dict]) -> None:
    found.model = "t5"
    scores = model["vocab"]
    found.scores = [0.0] * len(scores) if isinstance(scores, dict) else [float(score) for _, score in scores]
    found.flags["add_space_prefix"] = _prefixed(stages, normal)
    collapsed = any(stage["type"] == "Replace" and stage["pattern"] == {"Regex": " {2,}"} for stage in normal)
    collapsed = collapsed or any(stage["type"] == "WhitespaceSplit" for stage in stages)
    found.flags["remove_extra_whitespaces"] = collapsed
    charsmap = next((stage["precompiled_charsmap"] for stage in normal if stage["type"] == "Precompiled"), None)
    if charsmap:
        found.charsmap = base64.b64decode(charsmap)
    if model.get("byte_fallback"):
        found.doubts.append("the tokenizer spells unknown characters in bytes, llama.cpp does not")
    known = ("Precompiled", "Strip") if not collapsed else ("Precompiled", "Strip", "Replace")
    _doubt_normalizer(found, [stage for stage in normal if stage["type"] not in known])


def _prefixed(stages: list[dict], normal: list[dict]) -> bool:
    """Whether a text begins with a space of its own making."""
    spaces = [stage for stage in stages if stage["type"] == "Metaspace"]
    return any(s.get("prepend_scheme", "always") != "never" for s in spaces) or any(s["type"] == "Prepend" for s in normal)


def _doubt_normalizer(found: Vocabulary, normal: list[dict]) -> None:
    plain = (["Prepend"], ["Replace"], ["Prepend", "Replace"], ["Replace", "Prepend"], [])
    spaces_only = all(stage["type"] != "Replace" or stage["pattern"] == {"String": " "} for stage in normal)
    if [stage["type"] for stage in normal] not in plain or not spaces_only:
        found.doubts.append("the tokenizer normalizes text first (spaces, for one), llama.cpp does not")
