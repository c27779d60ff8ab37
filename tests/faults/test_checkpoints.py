"""Whatever is wrong with a checkpoint is said in one line with exit code 2, before anything is written."""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from tests.refusals import edit_tensors


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def damage(source: Path) -> None:
        config = json.loads((source / "config.json").read_text()) | changes
        (source / "config.json").write_text(json.dumps(config))

    return damage


def edit_bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def damage(source: Path) -> None:
        file = source / "model.safetensors"
        file.write_bytes(change(file.read_bytes()))

    return damage


def with_header(header: bytes, data: bytes = b"") -> Callable[[Path], None]:
    return edit_bytes(lambda _: struct.pack("<Q", len(header)) + header + data)


def text(name: str, content: str | bytes) -> Callable[[Path], None]:
    return lambda source: (source / name).write_bytes(content.encode() if isinstance(content, str) else content) and None


def index(**weight_map: Any) -> Callable[[Path], None]:
    return text("model.safetensors.index.json", json.dumps({"weight_map": weight_map}))


def without(name: str) -> Callable[[Path], None]:
    return lambda source: (source / name).unlink()


def no_tokenizer(source: Path) -> None:
    for file in source.glob("tokenizer*"):
        file.unlink()


def pickled(content: Any) -> Callable[[Path], None]:
    def damage(source: Path) -> None:
        (source / "model.safetensors").unlink()
        torch.save(content, source / "pytorch_model.bin")

    return damage


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("pickle-was-run",)


Q0, UP1, NORM1, TABLE = (
    "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight",
    "model.layers.1.input_layernorm.weight", "model.embed_tokens.weight",
)  # fmt: skip
FORGED = json.dumps({"x": {"dtype": "F4_E9", "shape": [1], "data_offsets": [0, 4]}}).encode()

CHECKPOINTS: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "no config": (without("config.json"), ("model", "config.json is missing")),
    "config is not JSON": (text("config.json", "{oops"), ("config.json", "cannot be read")),
    "config is not text": (text("config.json", b"\xff\xfe\x00"), ("config.json", "cannot be read")),
    "config is a list": (text("config.json", "[]"), ("config.json", "JSON object")),
    "config is too deep": (text("config.json", "[" * 100_000), ("config.json", "cannot be read")),
    "unsupported type": (edit_config(model_type="mamba"), ("'mamba'", "not supported", "compress/arch.py")),
    "misspelt type": (edit_config(model_type="lama"), ("'lama'", "did you mean 'llama'")),
    "no type": (edit_config(model_type=None), ("not supported",)),
    "type is a list": (edit_config(model_type=["llama"]), ("model type", "not supported")),
    "mixture of experts": (edit_config(model_type="qwen2_moe"), ("'qwen2_moe'", "mixture-of-experts")),
    "no layers": (edit_config(num_hidden_layers=0), ("config.json", "no decoder blocks")),
    "no heads": (edit_config(num_attention_heads=0, head_dim=None), ("model",)),
    "size is a word": (edit_config(hidden_size="wide"), ("config.json", "hidden_size")),
    "more layers than tensors": (edit_config(num_hidden_layers=3), ("lacks 9 tensors", "model.layers.2")),
    "other width": (edit_config(hidden_size=128, head_dim=32), ("config.json", "64", "128")),
    "other vocabulary": (edit_config(vocab_size=512), (TABLE, "256", "512")),
    "own code": (edit_config(auto_map={"AutoModel": "x.Y"}), ("auto_map", "--trust-remote-code")),
    "quantized by others": (edit_config(quantization_config={"quant_method": "gptq"}), ("already quantized", "'gptq'")),
    "quantization is a word": (edit_config(quantization_config="int4"), ("config.json", "quantization_config")),
    "no weights": (without("model.safetensors"), ("no *.safetensors",)),
    "truncated": (edit_bytes(lambda data: data[:-100]), ("model.safetensors", "truncated", "download it again")),
    "cut in the header": (edit_bytes(lambda data: data[:50]), ("model.safetensors", "truncated")),
    "too long": (edit_bytes(lambda data: data + b"\0" * 64), ("model.safetensors", "damaged")),
    "empty": (edit_bytes(lambda data: b""), ("model.safetensors", "truncated")),
    "garbage": (edit_bytes(lambda data: bytes(random.Random(0).randbytes(5000))), ("model.safetensors", "damaged")),
    "header is garbage": (edit_bytes(lambda data: data[:8] + b"\xff" * 99 + data[107:]), ("model.safetensors", "damaged")),
    "header is a list": (with_header(b"[1, 2]"), ("model.safetensors", "damaged")),
    "header is too deep": (with_header(b"[" * 100_000), ("model.safetensors", "damaged")),
    "unknown dtype": (with_header(FORGED, b"\0" * 4), ("model.safetensors", "F4_E9")),
    "nan bfloat16": (edit_tensors(lambda t: t[UP1].view(-1)[7].fill_(torch.nan)), (UP1, "NaN")),
    "inf bfloat16": (edit_tensors(lambda t: t[TABLE].view(-1)[-1].fill_(torch.inf)), (TABLE, "infinite")),
    "nan float32": (edit_tensors(lambda t: t[NORM1].view(-1)[0].fill_(torch.nan), torch.float32), (NORM1, "NaN")),
    "-inf float32": (edit_tensors(lambda t: t[Q0].view(-1)[9].fill_(-torch.inf), torch.float32), (Q0, "infinite")),
    "missing matrix": (edit_tensors(lambda t: t.pop(Q0)), ("lacks 1 tensor", Q0.removesuffix(".weight"))),
    "missing norm": (edit_tensors(lambda t: t.pop(NORM1)), ("lacks 1 tensor", NORM1)),
    "wrong matrix shape": (edit_tensors(lambda t: t.update({Q0: t[Q0][:32].clone()})), ("q_proj", "(32, 64)", "(64, 64)")),
    "wrong norm shape": (edit_tensors(lambda t: t.update({NORM1: t[NORM1][:32].clone()})), (NORM1, "(32,)", "(64,)")),
    "matrix is a vector": (edit_tensors(lambda t: t.update({Q0: t[Q0].flatten().clone()})), ("expected a matrix", "(4096,)")),
    "matrix is of integers": (edit_tensors(lambda t: t.update({Q0: t[Q0].to(torch.int8)})), ("q_proj", "int8")),
    "index leaves the directory": (index(**{Q0: "../model.safetensors"}), ("'../model.safetensors'", "outside", "refusing")),
    "index is absolute": (index(**{Q0: "/etc/passwd"}), ("'/etc/passwd'", "outside", "refusing")),
    "index names a missing shard": (index(**{Q0: "model-00002.safetensors"}), ("'model-00002.safetensors'", "is missing")),
    "index names a missing tensor": (index(x="model.safetensors"), ("'x'", "'model.safetensors'", "does not hold it")),
    "index holds no names": (index(**{Q0: ["model.safetensors"]}), ("index.json", "weight_map")),
    "index is empty": (index(), ("index.json", "weight_map")),
    "index is not JSON": (text("model.safetensors.index.json", "weights"), ("index.json", "cannot be read")),
    "pickle": (pickled({"x": torch.ones(2)}), ("pytorch_model.bin", "pickle", "--allow-pickle")),
    "no tokenizer": (no_tokenizer, ("model", "tokenizer cannot be loaded")),
    "tokenizer is not JSON": (text("tokenizer.json", "{"), ("model", "tokenizer cannot be loaded")),
    "manifest is not JSON": (text("compress_manifest.json", "{}"), ("compress_manifest.json", "damaged manifest")),
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_checkpoint(refused, source: Path, case: str):
    damage, words = CHECKPOINTS[case]
    damage(source)
    refused(*words)


def test_missing_shard_of_several(refused, source: Path):
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, own in shards.items():
        save_file({name: tensors[name] for name in own}, source / file)
    index(**{name: file for file, own in shards.items() for name in own})(source)
    (source / "model-2.safetensors").unlink()
    refused("'model-2.safetensors'", "is missing", "download it again")


@pytest.mark.parametrize(
    ("content", "words"),
    [({"x": Malicious()}, "could run code"), ([1, 2], "expected tensors"), ({"x": 1}, "expected tensors")],
    ids=["runs code", "is a list", "holds numbers"],
)
def test_a_pickle_that_holds_no_tensors(refused, source: Path, content: Any, words: str):
    pickled(content)(source)
    refused("pytorch_model.bin", words, more=("--allow-pickle",))
    assert not Path("pickle-was-run").exists()


def test_a_truncated_pickle(refused, source: Path):
    pickled(load_file(source / "model.safetensors"))(source)
    file = source / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:3000])
    refused("pytorch_model.bin", "truncated", "download it again", more=("--allow-pickle",))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_pickled_weights_are_read_when_allowed(cli, source: Path, zipped: bool):
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    torch.save(tensors, source / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    torch.save({"x": Malicious()}, source / "training_args.bin")  # what trainers leave there is none of our business
    outcome = cli("plan", source, "rtn", "--allow-pickle", "--length", 32)
    assert outcome.code == 0 and "14 of 14" in outcome.out


def test_tokenizer_of_a_larger_model(refused, source: Path):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(source)
    tokenizer.add_tokens([f"<extra_{i}>" for i in range(20)])
    tokenizer.save_pretrained(source)
    refused(f"tokenizer has {len(tokenizer)} tokens", "embeds only 256")


@pytest.mark.parametrize("model", ["absent", "absent/model"])
def test_missing_hub_model(refused, model: str):
    refused(f"{model}: ", "neither a local directory nor a model that the hub gave", "HF_HUB_OFFLINE", model=model)


@pytest.mark.parametrize("model", ["./absent", "/absent/model", "text.txt", "a/b/c"])
def test_missing_directory(refused, model: str):
    refused(f"{model}: no such model directory", model=model)
