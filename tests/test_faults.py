"""Whatever is wrong with a request is said in one line with exit code 2, before anything is written."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from compress.workspace import Workspace


class Outcome(NamedTuple):
    code: int | None
    out: str
    err: str


@pytest.fixture
def home(make_checkpoint, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with a tiny Llama in ``model`` and text for it in ``text.txt``, both there to be damaged."""
    home = tmp_path / "home"
    shutil.copytree(make_checkpoint("llama", torch.bfloat16, max_position_embeddings=64), home / "model")
    shutil.copyfile(text_file, home / "text.txt")
    monkeypatch.chdir(home)
    return home


@pytest.fixture
def source(home: Path) -> Path:
    return home / "model"


def spawn(*arguments: object, **environment: str) -> Outcome:
    """The command as a process of its own."""
    command = [sys.executable, "-m", "compress.cli", *map(str, arguments)]
    root = str(Path(__file__).parent.parent)
    process = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": root, **environment}, timeout=250
    )
    return Outcome(process.returncode, process.stdout, process.stderr)


def snapshot(directory: Path) -> dict[str, str]:
    """Every path below a directory, with its contents' digest."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "directory"
        for path in sorted(directory.rglob("*"))
    }


def assert_refused(outcome: Outcome, *words: str) -> None:
    """Exit code 2, nothing on stdout, and one line on stderr that holds these words."""
    said = [line for line in outcome.err.splitlines() if line.strip()]
    assert outcome.code == 2, outcome
    assert outcome.out == "" and len(said) == 1 and said[0].startswith("error: "), outcome
    for word in words:
        assert word in said[0], f"{word!r} is not in: {said[0]}"
    print(said[0])  # shown by pytest -s, to read the messages


RUN = ("--no-eval", "--quiet", "--calibration", "text.txt", "--samples", 4, "--length", 32)


@pytest.fixture
def refused(cli: Callable[..., Outcome], home: Path) -> Callable[..., None]:
    """Run `compress run model PASSES`, which must be refused with these words and leave no trace."""

    def call(*words: str, passes: tuple[str, ...] = ("rtn:bits=4",), more: tuple[object, ...] = (), model: object = "model"):
        before = snapshot(home)
        assert_refused(cli("run", model, *passes, "-o", "out", *RUN, *more), *words)
        assert snapshot(home) == before

    return call


# passes


@pytest.mark.parametrize(
    ("step", "words"),
    [
        ("gpqt", ("unknown method 'gpqt'", "did you mean 'gptq'", "compress methods")),
        ("zzzzzz", ("unknown method 'zzzzzz'", "compress methods")),
        ("", ("unknown method ''",)),
        (":bits=4", ("unknown method ''",)),
        ("gptq:bit=4", ("gptq", "unknown option 'bit'", "did you mean 'bits'", "group_size")),
        ("gptq:=4", ("gptq", "unknown option ''")),
        ("gptq:bits=99", ("gptq: bits", "8", "'99'")),
        ("gptq:bits=1", ("gptq: bits", "2", "'1'")),
        ("gptq:bits=four", ("gptq: bits", "integer", "'four'")),
        ("gptq:bits=4.5", ("gptq: bits", "integer", "'4.5'")),
        ("gptq:bits=", ("gptq: bits", "integer")),
        ("gptq:bits=none", ("gptq: bits", "integer")),
        ("gptq:symmetric=perhaps", ("gptq: symmetric", "'perhaps'")),
        ("gptq:damping=0", ("gptq: damping", "greater than 0")),
        ("gptq:4", ("gptq:4", "key=value", "'4'")),
        ("gptq:bits=4,bits=3", ("'bits'", "twice")),
        ("gptq:bits=4,group_size=0", ("gptq: group_size", "'0'")),
        ("wanda:sparsity=1", ("wanda: sparsity", "less than 1")),
        ("wanda:sparsity=nan", ("wanda: sparsity", "nan")),
        ("svd_llm:ridge=inf", ("svd_llm: ridge", "finite")),
        ("wanda:pattern=5:4", ("wanda: pattern", "'5:4'", "N:M")),
        ("wanda:pattern=2:4,sparsity=0.3", ("wanda", "2:4", "0.5")),
        ("magnitude:pattern=2:4,sparsity=none", ("magnitude: sparsity",)),
        ("magnitude:pattern=2:4,sparsity=half", ("magnitude: sparsity", "'half'")),
        ("wanda:pattern=3:7", ("pattern=3:7", "multiples of 7", "64", "q_proj")),
        ("svd:ratio=0", ("svd: ratio", "greater than 0")),
        ("logit_kd:batch_size=3,accumulate=2", ("logit_kd", "accumulate=2")),
        ("logit_kd:data=absent.txt", ("absent.txt", "no such file")),
        ("logit_kd:length=65", ("65 tokens", "64 positions")),
        ("rtn:targets=*.q_porj", ("['*.q_porj']", "match none of the 14 linear layers", "model.layers.0.self_attn.q_proj")),
        ("rtn:skip=*", ("without skip ['*']", "match none")),
        ("logit_kd:targets=*.q_porj", ("['*.q_porj']", "match none of the 14 matrices", "model.layers.0.self_attn.q_proj")),
    ],
)
def test_passes(refused, step: str, words: tuple[str, ...]):
    refused(*words, passes=(step,))


def test_four_bit_floats_that_no_reader_opens_in_float32(refused):
    refused("4-bit floats", "bfloat16 only", passes=("nvfp4", "rtn:targets=*o_proj"), more=("--dtype", "float32"))


def test_no_passes(refused):
    refused("no passes", "compress methods", passes=())


# the checkpoint


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def damage(source: Path) -> None:
        config = json.loads((source / "config.json").read_text()) | changes
        (source / "config.json").write_text(json.dumps(config))

    return damage


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], object], dtype: torch.dtype | None = None) -> Callable[[Path], None]:
    def damage(source: Path) -> None:
        stored = load_file(source / "model.safetensors")
        tensors = {name: tensor.to(dtype or tensor.dtype, copy=True) for name, tensor in stored.items()}
        change(tensors)
        save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})

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


# calibration text


def write_rows(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


CALIBRATIONS: dict[str, tuple[str, bytes | None, tuple[object, ...], tuple[str, ...]]] = {
    "missing file": ("none.txt", None, (), ("none.txt", "no such file")),
    "missing rows": ("none.jsonl", None, (), ("none.jsonl", "no such file")),
    "too short": ("a.txt", b"hardly anything", (), ("a.txt", "tokens are too few for 4 windows of 32", "--samples", "--length")),
    "empty": ("a.txt", b"", (), ("a.txt", "too few", "more text")),
    "no rows": ("a.jsonl", b"", (), ("a.jsonl", "0 tokens are too few", "more text")),
    "not UTF-8": ("a.txt", b"caf\xe9" * 99, (), ("a.txt", "UTF-8")),
    "rows not UTF-8": ("a.jsonl", b'{"text": "caf\xe9"}\n', (), ("a.jsonl", "UTF-8")),
    "broken line": ("a.jsonl", b'{"text": "a"}\n\n{"text": "b"\n', (), ("a.jsonl", "line 3", "not JSON")),
    "other column": ("a.jsonl", b'{"body": "a", "n": 1}\n', (), ("a.jsonl", "'text'", "body: str, n: int", "--column")),
    "named column": ("a.jsonl", b'{"text": "a"}\n', ("--column", "body"), ("a.jsonl", "'body'", "text", "--column")),
    "column of numbers": ("a.jsonl", b'{"text": 1}\n', (), ("a.jsonl", "'text'", "text: int")),
    "rows are lists": ("a.jsonl", b"[1]\n", (), ("a.jsonl", "'text'", "list")),
    "not parquet": ("a.parquet", b"PAR1 or not", (), ("a.parquet", "not a parquet file")),
    "empty parquet": ("a.parquet", b"", (), ("a.parquet", "not a parquet file")),
    "unreadable": ("/proc/self/mem", None, (), ("/proc/self/mem", "cannot be read")),
    "no windows": ("text.txt", None, ("--samples", 0), ("calibration.samples", "greater than or equal to 1")),
    "no length": ("text.txt", None, ("--length", 0), ("calibration.length", "greater than or equal to 1")),
    "too long": ("text.txt", None, ("--length", 65), ("65 tokens", "64 positions", "--length 64")),
}


@pytest.mark.parametrize("case", CALIBRATIONS)
def test_calibration(refused, home: Path, case: str):
    name, content, more, words = CALIBRATIONS[case]
    if content is not None:
        (home / name).write_bytes(content)
    refused(*words, more=("--calibration", name, *more))


def test_parquet_without_the_column(refused, home: Path):
    from pyarrow import Table, parquet

    parquet.write_table(Table.from_pydict({"body": ["some text"]}), home / "a.parquet")
    refused("a.parquet", "'text'", "body", "--column", more=("--calibration", "a.parquet"))


def test_hub_dataset_offline(refused):
    refused("nobody/nothing", "neither a local file nor a dataset", more=("--calibration", "nobody/nothing"))


# the output


def test_existing_output(refused, home: Path):
    (home / "out").mkdir()
    refused("out exists already", "--overwrite")


def test_output_is_the_source(refused, home: Path):
    refused("replace its own source", more=("-o", "model", "--overwrite"))
    (home / "link").symlink_to("model")
    refused("replace its own source", more=("-o", "link", "--overwrite"))
    refused("replace its own source", more=("-o", ".", "--overwrite"))  # it lies in there


@pytest.mark.parametrize("out", ["text.txt/out", "text.txt/a/b", "/proc/nothing/out", "/dev/null/out"])
def test_unwritable_output(refused, out: str):
    refused(out, "cannot be written", more=("-o", out))


@pytest.mark.parametrize("out", ["text.txt", "notes", "notes/../notes"])
def test_overwrite_replaces_models_only(refused, home: Path, out: str):
    (home / "notes").mkdir()
    (home / "notes" / "diary.md").write_text("irreplaceable")
    refused("not a model directory", "will not be replaced", more=("-o", out, "--overwrite"))


def test_something_else_is_in_the_place_of_the_work_directory(refused, home: Path):
    (home / "out.partial").write_text("a file")
    refused("out", "cannot be written")
    (home / "out.partial").unlink()
    (home / "out.partial").mkdir()
    (home / "out.partial" / "diary.md").write_text("irreplaceable")
    refused("out.partial", "holds something else")
    refused("out.partial", "holds something else", more=("--overwrite",))


def test_no_output(cli, home: Path):
    assert_refused(cli("run", "model", "rtn", "--no-eval"), "output directory")
    assert_refused(cli("run"), "model")


def test_work_directory_of_another_run(refused, home: Path):
    with Workspace(home / "out", "something else", False):
        (home / "out.partial" / "stage-0").mkdir()
    refused("out.partial", "interrupted run with other settings", "--overwrite")


def test_text_that_changed_since_the_run_was_interrupted(cli, refused, home: Path, source: Path):
    """Blocks of one calibration are never mixed with blocks of another."""
    edit_tensors(lambda t: t["model.norm.weight"].fill_(3e38))(source)
    assert cli("run", "model", "rtn:bits=4", "-o", "out", *RUN).code == 1  # logits overflow, after all blocks are done
    assert list((home / "out.partial").glob("stage-0/blocks/*.safetensors"))
    (home / "text.txt").write_text((home / "text.txt").read_text()[::-1])
    refused("out.partial", "interrupted run", "--overwrite")


def test_two_processes_on_one_output(home: Path):
    with Workspace(home / "out", "ours", False):
        before = snapshot(home)
        assert_refused(spawn("run", "model", "rtn", "-o", "out", *RUN), "out", "another process is writing")
        assert snapshot(home) == before


def test_too_little_space(refused, home: Path, monkeypatch: pytest.MonkeyPatch):
    free = shutil.disk_usage(home)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free._replace(free=1000))
    refused("0.00 GB are free", "needs about", more=("-o", "new/folders/out"))


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 100 KB; skips where this process may not mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a file system")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_preflight_on_a_tiny_disk(cli, home: Path, tiny_disk: Path):
    assert_refused(cli("run", "model", "rtn", "-o", tiny_disk / "out", *RUN), "0.00 GB are free", "needs about")
    assert list(tiny_disk.iterdir()) == []


def test_disk_fills_up_while_writing(cli, home: Path, tiny_disk: Path, monkeypatch: pytest.MonkeyPatch):
    """The promise of the message holds: with more space, the same command goes on and makes what it would have made."""
    usage = shutil.disk_usage(home)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)  # the space was there when the run began
    command = ("run", "model", "rtn:bits=8", "-o", tiny_disk / "out", *RUN)
    assert_refused(cli(*command), os.strerror(errno.ENOSPC), "run the same command to resume")
    assert [entry.name for entry in tiny_disk.iterdir()] == ["out.partial"]
    subprocess.run(["mount", "-o", "remount,size=64m", str(tiny_disk)], check=True)
    assert cli(*command).code == 0
    assert [entry.name for entry in tiny_disk.iterdir()] == ["out"]
    assert cli("run", "model", "rtn:bits=8", "-o", home / "undisturbed", *RUN).code == 0
    assert snapshot(tiny_disk / "out") == snapshot(home / "undisturbed")


def test_file_size_limit_while_writing(cli, home: Path):
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
    try:
        outcome = cli("run", "model", "rtn:bits=8", "-o", "out", *RUN)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_refused(outcome, os.strerror(errno.EFBIG))


# options


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--device", "cuda"), ("--device cuda", "--device cpu")),
        (("--device", "cuda:7"), ("--device cuda:7", "--device cpu")),
        (("--device", "meta"), ("--device meta", "--device cpu")),
        (("--device", "toaster"), ("--device toaster",)),
        (("--dtype", "int8"), ("dtype", "'int8'", "'bfloat16'")),
        (("--seed", -1), ("seed", "greater than or equal to 0")),
        (("--min-recovery", 0.9), ("--min-recovery", "--no-eval")),
        (("--max-kl", 0.1), ("--max-kl", "--no-eval")),
        (("--max-bytes", "many"), ("--max-bytes", "'many'", "2.5GB")),
        (("--max-bytes", ""), ("--max-bytes", "''", "2.5GB")),
        (("--max-bytes", "9" * 400), ("--max-bytes", "2.5GB")),
        (("--limit", 0), ("evaluation.limit", "greater than or equal to 1")),
    ],
    ids=lambda value: " ".join(map(str, value))[:30],
)
def test_options(refused, more: tuple[object, ...], words: tuple[str, ...]):
    if "cuda" in str(more) and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    refused(*words, more=more)


@pytest.mark.parametrize("arguments", [("--length", "long"), ("--nonsense",), ("--samples",)], ids=str)
def test_usage(cli, home: Path, arguments: tuple[str, ...]):
    before = snapshot(home)
    outcome = cli("run", "model", "rtn", "-o", "out", *arguments)
    assert outcome.code == 2 and arguments[0] in outcome.err and "Traceback" not in outcome.err
    assert snapshot(home) == before


def test_unknown_local_task_folder(cli, home: Path):
    before = snapshot(home)
    outcome = cli("run", "model", "rtn", "-o", "out", "--calibration", "text.txt", "--include", "absent", "--tasks", "x")
    assert_refused(outcome, "no such file or directory of tasks", "absent")
    assert snapshot(home) == before


@pytest.mark.slow
def test_unknown_task(cli, home: Path):
    before = snapshot(home)
    outcome = cli("run", "model", "rtn", "-o", "out", "--calibration", "text.txt", "--tasks", "arc_eazy")
    assert_refused(outcome, "--tasks", "unknown task 'arc_eazy'", "did you mean", "arc_easy")
    assert snapshot(home) == before


# recipes

RECIPES: dict[str, tuple[str | bytes, tuple[str, ...]]] = {
    "unknown key": ("pases: [rtn]", ("unknown key 'pases'", "did you mean 'passes'")),
    "key is a number": ("1: 2\npasses: [rtn]", ("unknown key 1", "passes")),
    "unknown calibration key": ("calibration: {sample: 3}", ("calibration: unknown key 'sample'", "did you mean 'samples'")),
    "calibration is a number": ("passes: [rtn]\ncalibration: 3", ("calibration",)),
    "unknown method": ("passes: [{gpqt: {bits: 4}}]", ("unknown method 'gpqt'", "did you mean 'gptq'")),
    "unknown option": ("passes: [{gptq: {bit: 4}}]", ("unknown option 'bit'", "did you mean 'bits'")),
    "option is a number": ("passes: [{gptq: {4: 4}}]", ("unknown option 4",)),
    "option out of range": ("passes: [{gptq: {bits: 40}}]", ("bits", "40")),
    "option of a wrong type": ("passes: [{wanda: {pattern: '2:4', sparsity: [1]}}]", ("sparsity",)),
    "pass of two methods": ("passes: [{rtn: {}, gptq: {}}]", ("a pass is",)),
    "settings are a list": ("passes: [{rtn: [4]}]", ("a pass is",)),
    "passes are a word": ("passes: rtn", ("passes must be a list",)),
    "passes are a mapping": ("passes: {rtn: {}}", ("passes must be a list",)),
    "a list": ("- rtn\n- gptq", ("a recipe is a mapping", "passes")),
    "a word": ("rtn", ("a recipe is a mapping",)),
    "nothing": ("", ("a recipe is a mapping",)),
    "python object": ("model: !!python/object/apply:os.mkdir [yaml-was-run]", ("cannot be read as YAML", "python")),
    "not YAML": ("passes: [rtn\nmodel: }", ("cannot be read as YAML", "line 2")),
    "not text": (b"passes: [caf\xe9]", ("cannot be read as YAML", "utf-8")),
    "unknown device": ("passes: [rtn]\ndevice: 3", ("device", "string")),
}


@pytest.mark.parametrize("case", RECIPES)
def test_recipe(refused, home: Path, case: str):
    content, words = RECIPES[case]
    (home / "recipe.yaml").write_bytes(content.encode() if isinstance(content, str) else content)
    refused("recipe.yaml", *words, passes=("--recipe", "recipe.yaml"))
    assert not Path("yaml-was-run").exists()


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("absent.yaml", ("absent.yaml", "no such recipe file")),
        ("sparse-w5", ("'sparse-w5'", "did you mean 'sparse-w4'", "presets: ")),
        ("model", ("model", "cannot be read")),
    ],
)
def test_missing_recipe(refused, recipe: str, words: tuple[str, ...]):
    refused(*words, passes=("--recipe", recipe))


def test_recipe_and_passes(refused):
    refused("passes", "--recipe", "not both", passes=("rtn", "--recipe", "w4"))


# other commands


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("plan", "absent/a/b", "rtn"), ("no such model directory",)),
        (("plan", "model"), ("passes",)),
        (("plan", "model", "rtn:bits=9"), ("rtn: bits",)),
        (("plan", "model", "wanda:pattern=3:7"), ("multiples of 7",)),
        (("verify", "model"), ("model", "not an artifact of compress")),
        (("verify", "absent"), ("absent", "config.json is missing")),
        (("export", "model", "--to", "dence", "-o", "out"), ("--to dence", "did you mean 'dense'")),
        (("export", "absent", "--to", "dense", "-o", "out"), ("absent",)),
        (("export", "model", "--to", "dense", "-o", "model", "--overwrite"), ("replace its own source",)),
        (("export", "model", "--to", "dense", "-o", "text.txt/out"), ("text.txt/out", "cannot be written")),
        (("chart", "absent"), ("no measurements at absent", "compress eval")),
        (("chart", "model"), ("no measurements at model", "compress eval")),
        (("chart", "text.txt"), ("text.txt",)),
        (("eval", "absent/a/b"), ("no such model directory",)),
        (("eval", "model", "--limit", 0), ("limit",)),
        (("eval", "model", "--dtype", "int3"), ("int3",)),
        (("eval", "model", "--device", "toaster"), ("toaster",)),
        (("demo", "-o", "model"), ("not a demo's directory",)),
        (("demo", "-o", "text.txt"), ("not a demo's directory",)),
    ],
    ids=lambda value: " ".join(map(str, value))[:40],
)
def test_other_commands(cli, home: Path, arguments: tuple[object, ...], words: tuple[str, ...]):
    before = snapshot(home)
    assert_refused(cli(*arguments), *words)
    assert snapshot(home) == before


def test_a_real_process_says_one_line(home: Path):
    before = snapshot(home)
    assert_refused(spawn("run", "model", "gpqt:bits=4", "-o", "out", *RUN), "unknown method 'gpqt'", "did you mean 'gptq'")
    assert snapshot(home) == before
