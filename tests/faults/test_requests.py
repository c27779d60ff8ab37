"""Whatever is wrong with a request is said in one line with exit code 2, before anything is written."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.workspace import Workspace
from tests.refusals import RUN, assert_refused, edit_tensors, snapshot, spawn

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
