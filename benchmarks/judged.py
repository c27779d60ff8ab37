"""What scripts share that run chains as a user does and judge the results by the bits per byte of held-out text.

Rows are kept in a results file, by protocol: what is there already is not run again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from compress.calibration import Begin, load_tokenizer, read_text, surroundings, window_length, windows
from compress.checkpoint import Checkpoint
from compress.demo import MODEL
from compress.eval.fidelity import perplexity
from compress.judge import load_model

RESULTS = Path(__file__).parent / "results"


def arguments(description: str | None, steps: int) -> argparse.ArgumentParser:
    """The options that all of them have. steps: of training, by default."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--data", help="text to calibrate and train on; default: the bundled")
    parser.add_argument("--held-out", help="text to judge by; default: the bundled")
    parser.add_argument("--samples", type=int, default=128, help="calibration windows")
    parser.add_argument("--length", type=int, default=128, help="tokens of calibration and training windows")
    parser.add_argument("--steps", type=int, default=steps, help="of training, each of 8 windows")
    parser.add_argument("--windows", type=int, default=32, help="held-out windows")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="parts of chains, separated by semicolons")
    return parser


class Judge:
    """Bits per byte of a directory's model on held-out windows, of ``length`` tokens (None: what the model has room for).

    described: these windows, in words.
    """

    def __init__(self, model: Path, held_out: str | None, n_windows: int, length: int | None = None, begin: Begin = "anywhere"):
        checkpoint = Checkpoint.open(model)
        length = window_length(length, checkpoint.config)
        tokenizer = load_tokenizer(model, checkpoint.config.vocab_size)
        texts, source = read_text(held_out, bundled="held_out")
        self.tokens = windows(tokenizer, texts, source, n=n_windows, length=length, seed=0, at_most=True, begin=begin).tokens
        begun = ", each begun as the tokenizer begins a text" if surroundings(tokenizer)[0] else ""
        begun += ", all beginnings of documents" if begin == "documents" else ""
        self.described = f"{len(self.tokens)} windows of {length}{begun}"
        self.n_bytes = sum(len(tokenizer.decode(row[1:]).encode()) for row in self.tokens)  # the first token is not predicted

    def __call__(self, path: Path) -> float:
        found = perplexity(load_model(path, torch.float32, "cpu"), self.tokens, n_bytes=self.n_bytes).bits_per_byte
        assert found is not None
        return found


class Table:
    """The rows of one protocol in a results file, and the file's tables as Markdown beside it."""

    def __init__(self, name: str, protocol: str, judge: Judge, model: Path, markdown: Callable[[dict[str, Any]], str]):
        self.file, self.markdown = RESULTS / f"{name}.json", markdown
        self.tables: dict[str, Any] = json.loads(self.file.read_text()) if self.file.exists() else {}
        if protocol not in self.tables:
            self.tables[protocol] = {"dense": judge(model), "rows": []}
        self.own = {protocol: self.tables[protocol]}
        self.rows, self.dense = self.tables[protocol]["rows"], self.tables[protocol]["dense"]

    def has(self, **cells: Any) -> bool:
        """Whether there is a row with these cells."""
        return any(all(row[name] == value for name, value in cells.items()) for row in self.rows)

    def add(self, row: dict[str, Any], order: Callable[[dict[str, Any]], Any] | None = None) -> None:
        """Add a row and write the files. order: by which rows are sorted; None: as they come."""
        self.rows.append(row)
        if order is not None:
            self.rows.sort(key=order)
        print(row, file=sys.stderr, flush=True)
        self.file.write_text(json.dumps(self.tables, indent=1) + "\n")
        self.file.with_suffix(".md").write_text(self.markdown(self.tables))

    def close(self, missed: list[str]) -> int:
        """Print the table, and what misses a bar; the exit status."""
        print(self.markdown(self.own))
        for line in missed:
            print(f"MISSED {line}", file=sys.stderr)
        return 1 if missed else 0


def called(model: Path) -> str:
    """A model's name in a protocol."""
    return "Bundled checkpoint" if model == MODEL else model.name
