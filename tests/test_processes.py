"""A run of several processes: the command as a launcher starts it, and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from compress.distill.logit_kd import LogitKD
from compress.errors import BadInput
from compress.manifest import Manifest
from compress.processes import asks_for_shares, is_helper
from compress.progress import RESUMED, Bar


def command(launcher: list[str], llama: Path, text_file: Path, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    distilled = "logit_kd:steps=6,correct=2,batch_size=4,length=16,evaluate_every=3,trains=everything"
    settings = ["--calibration", str(text_file), "--samples", "10", "--length", "24", *more]
    root = str(Path(__file__).parent.parent)
    return subprocess.run(
        [*launcher, "-m", "compress", "run", str(llama), "wanda", distilled, "gptq", "-o", str(out), *settings],
        capture_output=True, text=True, timeout=600, cwd=out.parent,
        env=os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1", "HF_HOME": str(out.parent)},
    )  # fmt: skip


@pytest.mark.slow
def test_the_command_under_accelerate_launch_makes_what_it_makes_alone(llama, text_file, tmp_path):
    """Streaming, training, streaming, reloading and measuring; the second process only trains, and says nothing."""
    accelerate = [str(Path(sys.executable).with_name("accelerate")), "launch", "--multi_gpu", "--num_processes", "2"]
    together = command([*accelerate, "--main_process_port", "0"], llama, text_file, tmp_path / "two")
    alone = command([sys.executable], llama, text_file, tmp_path / "one", "--no-eval")
    assert together.returncode == alone.returncode == 0, together.stderr + alone.stderr
    assert together.stdout.count("reloaded in a fresh process") == 1
    trained = [Manifest.read(tmp_path / name).steps[1].training for name in ("one", "two")]
    assert trained[0]["held_out_loss"] == pytest.approx(trained[1]["held_out_loss"], rel=1e-4)
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("two", "one"))
    assert found.keys() == expected.keys()
    norm = "model.norm.weight"
    torch.testing.assert_close(found[norm], expected[norm], rtol=1e-4, atol=1e-5)
    again = command([*accelerate, "--main_process_port", "0"], llama, text_file, tmp_path / "two")
    assert again.returncode != 0 and again.stderr.count("exists already") == 1 and "Traceback (most recent" not in again.stdout


def test_split_parameters_are_refused_where_a_model_writes_and_before_any_work(llama, run_stages, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(BadInput, match=r"FSDP splits parameters .* --multi_gpu"):
        run_stages(llama, ["rtn", "gkd:steps=2,batch_size=2,length=16"])
    assert asks_for_shares(LogitKD())
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    assert not asks_for_shares(LogitKD()) and not is_helper()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert is_helper()


def test_the_bar_estimates_the_time_of_what_is_going_on():
    """What was done before an interruption, or another phase, tells nothing about the speed."""
    with Bar("compress") as bar:
        (task,) = bar._bar.tasks
        for done in range(4):
            bar(done, 4, "block")
        bar(90, 100, RESUMED)
        assert task.completed == 90 and task.total == 100 and task.speed is None
        bar(91, 100, "loss 1.2")
        bar(92, 100, "loss 1.1")
        assert task.completed == 92 and task.speed is not None and "loss 1.1" in task.description
