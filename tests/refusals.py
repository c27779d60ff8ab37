"""What is damaged on purpose, and how a request is refused: with exit code 2 and one line."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file

RUN = ("--no-eval", "--quiet", "--calibration", "text.txt", "--samples", 4, "--length", 32)


class Outcome(NamedTuple):
    code: int | None
    out: str
    err: str


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


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], object], dtype: torch.dtype | None = None) -> Callable[[Path], None]:
    def damage(source: Path) -> None:
        stored = load_file(source / "model.safetensors")
        tensors = {name: tensor.to(dtype or tensor.dtype, copy=True) for name, tensor in stored.items()}
        change(tensors)
        save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})

    return damage
