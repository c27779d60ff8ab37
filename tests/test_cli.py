"""The command line: what is asked for arrives, what is planned is what is written, and exit codes tell what happened."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress import Recipe, methods
from compress.checkpoint import Checkpoint, digest_files
from compress.manifest import Manifest
from compress.passes import Taxon
from compress.verify import PROBE


class Outcome(NamedTuple):
    code: int | None
    out: str
    err: str


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


# run

PASSES = ("wanda:targets=*.q_proj+*.up_proj,sparsity=0.4", "gptq:bits=3,group_size=32")


@pytest.fixture(scope="module")
def ran(llama: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """(artifact, outcome) of `compress run --json`, as a process of its own."""
    out = tmp_path_factory.mktemp("cli") / "parent" / "out"
    command = [
        sys.executable, "-m", "compress.cli", "run", llama, *PASSES, "-o", out, "--json", "--no-eval", "--calibration", text_file,
        "--samples", 6, "--length", 24, "--seed", 3, "--dtype", "float32",
    ]  # fmt: skip
    process = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=Path(__file__).parent.parent, timeout=250)
    return out, Outcome(process.returncode, process.stdout, process.stderr)


def test_json_alone_is_on_stdout(ran):
    out, outcome = ran
    assert outcome.code == 0, outcome.err
    result = json.loads(outcome.out)
    assert outcome.out.count("\n") == 1
    assert result["path"] == str(out) and result["bytes"] == (out / "model.safetensors").stat().st_size
    assert result["tier"] == "native-quantized" and result["steps"] == list(PASSES)
    assert result["verification"]["how"] == "stock" and result["report"] is None and "metrics" not in result
    assert "Traceback" not in outcome.err


def test_options_arrive_in_the_recipe(ran, llama: Path, text_file: Path):
    out, _ = ran
    recipe = Recipe.load(out / "recipe.yaml")
    assert [step.label() for step in recipe.passes] == list(PASSES)
    assert recipe.model == str(llama) and recipe.evaluation is None
    assert recipe.seed == 3 and recipe.dtype == "float32" and recipe.device == "cpu"
    calibration = recipe.calibration
    assert (calibration.data, calibration.samples, calibration.length) == (str(text_file), 6, 24)


def test_only_the_artifact_is_left(ran):
    out, _ = ran
    assert [entry.name for entry in out.parent.iterdir()] == ["out"]
    assert {entry.name for entry in out.iterdir()} >= {
        "config.json", "model.safetensors", "tokenizer.json", "README.md", "recipe.yaml", "compress_manifest.json",
    }  # fmt: skip
    assert not list(out.rglob("*.writing"))


def test_verify_passes_on_a_good_artifact(cli, ran):
    out, _ = ran
    before = contents(out)
    outcome = cli("verify", out, "--json")
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    assert found["top1_agreement"] == 1 and found["model_class"] == "LlamaForCausalLM"
    assert contents(out) == before


@pytest.fixture
def damaged(ran, tmp_path: Path) -> Path:
    """A copy of the artifact, to be damaged."""
    shutil.copytree(ran[0], tmp_path / "damaged")
    return tmp_path / "damaged"


@pytest.mark.parametrize("share", [0.1, 0.5, 0.999])
def test_verify_finds_a_flipped_bit(cli, damaged: Path, share: float):
    file = damaged / "model.safetensors"
    data = bytearray(file.read_bytes())
    n_header = 8 + int.from_bytes(data[:8], "little")
    data[n_header + int(share * (len(data) - n_header))] ^= 1
    file.write_bytes(data)
    outcome = cli("verify", damaged)
    assert outcome.code == 1 and outcome.out == ""
    assert "failed: " in outcome.err and "digest" in outcome.err and "Traceback" not in outcome.err


def test_verify_finds_a_missing_tensor(cli, damaged: Path):
    """Even where somebody has put the new digest into the manifest."""
    file = damaged / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.self_attn.k_proj.weight_packed"]
    save_file(tensors, file, metadata={"format": "pt"})
    assert cli("verify", damaged).code == 1
    manifest = Manifest.read(damaged)
    manifest.model_copy(update={"weights_digest": digest_files([file])}).write(damaged)
    outcome = cli("verify", damaged)
    assert outcome.code == 2 and "model.layers.1.self_attn.k_proj" in outcome.err and "Traceback" not in outcome.err


def test_verify_finds_other_logits(cli, damaged: Path):
    """A consistent directory that computes something else than what was recorded."""
    probe = load_file(damaged / PROBE)
    probe["logits"] += 0.5
    save_file(probe, damaged / PROBE)
    outcome = cli("verify", damaged)
    assert outcome.code == 1 and "failed: " in outcome.err and "logits differ" in outcome.err


# plan

CHAINS = [
    ("rtn:bits=3",), ("rtn:bits=4",), ("rtn:bits=8,group_size=16",), ("rtn:bits=4,symmetric=false,group_size=16",),
    ("rtn:bits=3,symmetric=false,group_size=16",), ("rtn:bits=8,symmetric=false,group_size=16",),
    ("gptq:bits=4,group_size=32",), ("gptq:bits=3,group_size=16,symmetric=false",), ("wanda:sparsity=0.5",), ("svd:ratio=0.5",),
    ("svd_llm:ratio=0.6", "gptq:bits=4,group_size=16"), ("wanda:pattern=2:4", "gptq:bits=8"),
    ("rtn:bits=4,targets=*.mlp.*",),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("passes", CHAINS, ids=" > ".join)
def test_plan_predicts_what_is_written(cli, make_checkpoint, run_stages, passes: tuple[str, ...], dtype: torch.dtype):
    source = make_checkpoint("llama-untied", dtype)
    before = contents(source)
    outcome = cli("plan", source, *passes, "--json", "--length", 24)
    assert outcome.code == 0, outcome.err
    plan = json.loads(outcome.out)
    assert contents(source) == before

    artifact = run_stages(source, passes)
    manifest = Manifest.read(artifact)
    written = sum(file.stat().st_size for file in artifact.glob("*.safetensors"))
    assert manifest.nbytes == written
    assert plan["predicted_bytes"] == pytest.approx(written, rel=0.01)
    assert plan["tier"] == manifest.tier
    assert plan["source_bytes"] == (source / "model.safetensors").stat().st_size
    for step, label in zip(plan["passes"], passes, strict=True):
        touched = [record for record in manifest.modules.values() if step["label"] in record.passes]
        assert step["matched"] == len(touched) and step["total"] == len(manifest.modules) == 14, label


def test_plan_in_words(cli, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    outcome = cli("plan", llama, "svd:targets=*.mlp.*", "wanda:targets=*.q_proj", "logit_kd", "gptq", "-o", "out", "--no-eval")
    assert outcome.code == 0, outcome.err
    assert "stage 1: svd:targets=*.mlp.*  [low-rank approximation]  6 of 14 linear layers" in outcome.out
    assert "stage 1: wanda:targets=*.q_proj  [parameter pruning / unstructured]  2 of 14 linear layers" in outcome.out
    assert "Traceback" not in outcome.err
    assert "stage 2: logit_kd" in outcome.out and "stage 3: gptq" in outcome.out
    assert "tier shim" in outcome.out and "estimated: peak memory" in outcome.out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", ["logit_kd:steps=2", "block_ap:group_size=16"])
def test_training_is_reckoned_at_the_speed_of_float32_whatever_the_forward_passes_compute_in(
    cli, llama: Path, monkeypatch: pytest.MonkeyPatch, step: str
):
    monkeypatch.setattr("compress.plan.operations_per_second", {torch.float32: 1e9, torch.bfloat16: 1e18}.__getitem__)
    plans = [json.loads(cli("plan", llama, step, "--dtype", dtype, "--json").out) for dtype in ("float32", "bfloat16")]
    seconds = [plan["seconds"] for plan in plans]
    assert 0.5 * seconds[0] < seconds[1] <= seconds[0]


def test_plan_warns_where_a_pass_undoes_another(cli, llama: Path):
    outcome = cli("plan", llama, "wanda", "svd:targets=*.q_proj")
    assert "warning: svd:targets=*.q_proj gives up the mask" in outcome.out and "2 layers" in outcome.out


def test_a_recipe_file_and_options_together(cli, llama: Path, tmp_path: Path):
    file = tmp_path / "recipe.yaml"
    file.write_text(f"model: {llama}\npasses: [rtn]\ncalibration: {{samples: 5, length: 20}}\n")
    from_file = json.loads(cli("plan", "--recipe", file, "--json").out)
    assert from_file["model"] == str(llama) and [step["label"] for step in from_file["passes"]] == ["rtn"]
    preset = json.loads(cli("plan", llama, "--recipe", "w4", "--json").out)
    assert [step["label"] for step in preset["passes"]] == [step.label() for step in Recipe.load("w4").passes]


# methods


def test_methods_lists_every_option_and_default(cli):
    outcome = cli("methods")
    assert outcome.code == 0
    for taxon in Taxon:
        assert taxon.value in outcome.out
    for key, method in methods.available().items():
        _, found, rest = outcome.out.partition(f"\n  {key}  ")
        assert found, key
        listed = list(takewhile(lambda line: line.startswith(" " * 6), rest.splitlines()[1:]))
        expected = methods.options(method)
        assert len(expected) == len(method.model_fields) and len(listed) == len(expected) + len(method.efforts)
        assert all(f"--effort {effort}: " in listed.pop() for effort in reversed(method.efforts))
        for line, (name, default, description) in zip(listed, expected, strict=True):
            assert line.strip() == f"{name}={default}  {description}".strip()


def test_methods_shows_those_that_are_named(cli):
    told = cli("methods", "gptq", "wanda").out
    assert [line.split()[0] for line in told.splitlines() if line.startswith("  ") and line[2] != " "] == ["gptq", "wanda"]
    assert "act_order" in told
    refused = cli("methods", "gtpq")
    assert refused.code == 2 and "gptq" in refused.err


def test_methods_markdown(cli):
    lines = cli("methods", "--markdown").out.strip().splitlines()
    assert len(lines) == 2 + len(methods.available())
    assert [line.split("`")[1] for line in lines[2:]] == list(methods.available())
    for line, method in zip(lines[2:], methods.available().values(), strict=True):
        assert method.taxon.value in line and method.paper in line


# export


@pytest.mark.parametrize(
    ("family", "passes"),
    [
        ("llama", ("gptq:bits=4,group_size=32",)),
        ("llama", ("rtn:bits=8,symmetric=false,group_size=16",)),
        ("llama", ("wanda:sparsity=0.5",)),
        ("llama", ("svd_llm:ratio=0.6", "rtn:bits=8,group_size=16")),
        ("gpt2", ("rtn:bits=8,group_size=16",)),
        ("gpt2", ("svd:ratio=0.5",)),
    ],
    ids=lambda value: value if isinstance(value, str) else " > ".join(value),
)
def test_export_to_dense(cli, make_checkpoint, run_stages, reload, tmp_path: Path, family: str, passes: tuple[str, ...]):
    """Stock transformers opens the result as the base architecture, and it computes the same."""
    source = make_checkpoint(family)
    artifact = run_stages(source, passes)
    outcome = cli("export", artifact, "--to", "dense", "-o", tmp_path / "dense")
    assert outcome.code == 0, outcome.err
    assert outcome.out.strip() == str(tmp_path / "dense")
    assert [entry.name for entry in tmp_path.iterdir()] == ["dense"]

    config, before = (json.loads((path / "config.json").read_text()) for path in (tmp_path / "dense", source))
    assert config == before
    model, probe = reload(tmp_path / "dense"), load_file(artifact / PROBE)
    assert type(model).__name__ == type(reload(source)).__name__
    with torch.no_grad():
        logits = model(input_ids=probe["tokens"]).logits
    torch.testing.assert_close(logits, probe["logits"], rtol=0, atol=1e-3 * float(probe["logits"].abs().max()))
    if passes[0].startswith("wanda"):
        matrix = Checkpoint.open(tmp_path / "dense").tensor("model.layers.0.mlp.up_proj.weight")
        assert (matrix == 0).float().mean() == 0.5
    assert (tmp_path / "dense" / "tokenizer.json").exists()
    again = cli("export", artifact, "--to", "dense", "-o", tmp_path / "dense")
    assert again.code == 2 and "--overwrite" in again.err
    assert cli("export", artifact, "--to", "dense", "-o", tmp_path / "dense", "--overwrite").code == 0


# exit codes


def test_a_missed_gate_keeps_the_artifact_aside(cli, llama: Path, text_file: Path, tmp_path: Path):
    outcome = cli(
        "run", llama, "rtn", "-o", tmp_path / "out", "--no-eval", "--quiet", "--max-bytes", "1KB", "--json",
        "--calibration", text_file, "--samples", 4, "--length", 16,
    )  # fmt: skip
    assert outcome.code == 3 and outcome.out == ""
    assert outcome.err.startswith("gate missed: ") and "more than 1,000" in outcome.err and "out.rejected" in outcome.err
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.rejected"]
    assert Manifest.read(tmp_path / "out.rejected").steps[0].label == "rtn"
    assert (tmp_path / "out.rejected" / "recipe.yaml").exists()


def test_a_failure_while_working(cli, make_checkpoint, text_file: Path, tmp_path: Path):
    """Weights that are finite, but whose products are not: no check before the run could have known."""
    source = tmp_path / "source"
    shutil.copytree(make_checkpoint("llama"), source)
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], 3e38)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    outcome = cli(
        "run", source, "rtn", "-o", tmp_path / "out", "--no-eval", "--quiet", "--calibration", text_file,
        "--samples", 4, "--length", 16,
    )  # fmt: skip
    assert outcome.code == 1 and outcome.out == ""
    assert outcome.err.startswith("failed: ") and "not finite" in outcome.err and outcome.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_interrupt(cli, llama: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("compress.pipeline.plan", interrupted)
    outcome = cli("plan", llama, "rtn")
    assert outcome.code == 130 and "interrupted" in outcome.err and "resume" in outcome.err


COMMANDS = ["run", "plan", "methods", "eval", "chart", "compare", "schema", "verify", "export", "open", "demo"]


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help(cli, command: str | None):
    outcome = cli(*([command] if command else []), "--help")
    assert outcome.code == 0 and "Usage: " in outcome.out and outcome.err == ""
    if command is None:
        assert all(name in outcome.out for name in COMMANDS)


def test_no_command_shows_the_help(cli):
    outcome = cli()
    assert outcome.code in (0, 2) and "Usage: " in outcome.out + outcome.err
