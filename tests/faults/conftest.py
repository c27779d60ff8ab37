"""A model and text to be damaged, and runs that must be refused without a trace."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.refusals import RUN, Outcome, assert_refused, snapshot


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


@pytest.fixture
def refused(cli: Callable[..., Outcome], home: Path) -> Callable[..., None]:
    """Run `compress run model PASSES`, which must be refused with these words and leave no trace."""

    def call(*words: str, passes: tuple[str, ...] = ("rtn:bits=4",), more: tuple[object, ...] = (), model: object = "model"):
        before = snapshot(home)
        assert_refused(cli("run", model, *passes, "-o", "out", *RUN, *more), *words)
        assert snapshot(home) == before

    return call
