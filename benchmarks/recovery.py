"""How much of what compression took does recovery give back? Bits per byte of held-out text.

Every compression is run alone, and then with every way of recovery after it, as a user runs it: reconstruction of one block
after the other from calibration sequences, and training of the whole model, by distillation and by the text's own next tokens
on the same windows. What is recovered is a share of the lost bits per byte: (compressed - recovered) / (compressed - dense).
Runs that are in the results file already are not run again.

    python benchmarks/recovery.py
    python benchmarks/recovery.py --model DIR --data train.jsonl --held-out valid.txt --only wanda
    python benchmarks/recovery.py --model DIR --data stories.jsonl --begin documents

A model that was trained on single documents predicts what follows the end of one, or text without its beginning, badly: there its
text is a better teacher than the model. ``--begin documents`` trains and judges by the beginnings of documents.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from judged import Judge, Table, arguments, called

from compress.pipeline import Pipeline
from compress.recipe import Calibration

COMPRESSIONS = [
    "wanda:sparsity=0.5", "minitron:units=neurons+heads", "svd_llm:ratio=0.6", "gptq:bits=2,group_size=64",
]  # fmt: skip
TRAINED = ("logit_kd", "fine_tune")
BARS = {"reconstruct": 1 / 3, "logit_kd": 1 / 2}
"""The least share of the lost bits per byte that is to come back, by the recovery's last method."""


def measure(model: Path, compression: str, recovery: str, judge: Judge, calibration: Calibration) -> dict[str, Any]:
    """One row. recovery: the passes that follow the compression; "": none."""
    start = time.process_time()
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        result = Pipeline(f"{compression} {recovery}".split(), calibration=calibration, evaluate=False, dtype="float32").run(
            model, out
        )
        seconds = time.process_time() - start
        return {
            "compression": compression, "recovery": recovery, "bits_per_byte": judge(out), "bytes": result.bytes,
            "seconds": round(seconds), "difference": result.verification.max_difference,
        }  # fmt: skip


def divide(data: Path, directory: Path) -> tuple[str, str]:
    """The rows of a .jsonl in two files: four of five to train on, every fifth to judge by."""
    lines = data.read_text().splitlines(keepends=True)
    parts = {"train": [line for i, line in enumerate(lines) if i % 5], "held_out": lines[::5]}
    for name, rows in parts.items():
        (directory / f"{name}.jsonl").write_text("".join(rows))
    return str(directory / "train.jsonl"), str(directory / "held_out.jsonl")


def recovered(rows: list[dict[str, Any]], dense: float) -> list[dict[str, Any]]:
    """The rows, each with the share of the lost bits per byte that it has ``recovered``; None of compressions alone."""
    alone = {row["compression"]: row["bits_per_byte"] for row in rows if not row["recovery"]}
    return [
        row | {"recovered": (alone[row["compression"]] - row["bits_per_byte"]) / (alone[row["compression"]] - dense)}
        if row["recovery"] and row["compression"] in alone else row | {"recovered": None}
        for row in rows
    ]  # fmt: skip


def missed(rows: list[dict[str, Any]], dense: float) -> list[str]:
    """Where a recovery gives back less than it should, and where distillation is no better than as much of the text alone."""
    shares: dict[tuple[str, str, str], float] = {}  # the best of every method and number of steps, at whatever learning rate
    for row in recovered(rows, dense):
        if row["recovered"] is not None:
            method, _, settings = row["recovery"].split()[-1].partition(":")
            key = row["compression"], method, settings.partition(",")[0]
            shares[key] = max(row["recovered"], shares.get(key, -math.inf))
    found = []
    for (compression, method, steps), share in shares.items():
        if share < BARS.get(method, -math.inf):
            found.append(f"{compression} {method} {steps}: {share:.0%} recovered, below {BARS[method]:.0%}")
        if method == "logit_kd" and share <= shares.get((compression, "fine_tune", steps), -math.inf):
            found.append(f"{compression} {steps}: logit_kd recovers no more than fine_tune")
    return found


def markdown(tables: dict[str, dict[str, Any]]) -> str:
    """A table for every protocol."""
    lines = []
    for protocol, table in tables.items():
        lines += ["| compression | recovery | bits per byte | recovered | seconds |", "|---|---|---|---|---|"]
        for row in recovered(table["rows"], table["dense"]):
            share = "" if row["recovered"] is None else f"{row['recovered']:.0%}"
            recovery = f"`{row['recovery']}`" if row["recovery"] else "none"
            lines.append(f"| `{row['compression']}` | {recovery} | {row['bits_per_byte']:.4f} | {share} | {row['seconds']} |")
        lines += ["", f"{protocol} {table['dense']:.4f} bits per byte before.", ""]
    return "\n".join(lines)


def main() -> int:
    """Measure what is missing, write the tables; 1 where a bar is missed."""
    parser = arguments(__doc__, steps=80)
    parser.add_argument(
        "--begin",
        default="anywhere",
        choices=["anywhere", "documents"],
        help="where windows begin; documents: --data is a .jsonl",
    )
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate of training")
    parser.add_argument("--more", default="", help="more recoveries, of one or several passes, separated by semicolons")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        if options.begin == "documents":
            options.data, options.held_out = divide(Path(options.data), Path(scratch))
        return compare(options)


def compare(options: argparse.Namespace) -> int:
    """Run the chains, write the tables; 1 where a bar is missed."""
    judged = options.length if options.begin == "documents" else None
    judge = Judge(options.model, options.held_out, options.windows, judged, options.begin)
    protocol = (
        f"{called(options.model)}: {options.samples} calibration windows of {options.length} tokens; training windows, of which "
        f"a step takes 8, are of other text than what it is judged by, {judge.described}; float32; seconds of a core, with "
        "compression."
    )
    table = Table("recovery", protocol, judge, options.model, markdown)
    settings = f"steps={options.steps},length={options.length},learning_rate={options.rate:g}"
    recoveries = ["reconstruct", *(f"{method}:{settings}" for method in TRAINED), *filter(None, options.more.split(";"))]
    calibration = Calibration(samples=options.samples, length=options.length, data=options.data, begin=options.begin)
    chains = [(compression, recovery) for compression in COMPRESSIONS for recovery in recoveries]
    if options.only:
        chains = [chain for chain in chains if any(part in " ".join(chain) for part in options.only.split(";"))]
    chains = [*((compression, "") for compression in dict.fromkeys(chain[0] for chain in chains)), *chains]
    for compression, recovery in chains:
        if not table.has(compression=compression, recovery=recovery):
            row = measure(options.model, compression, recovery, judge, calibration)
            table.add(row, lambda row: (COMPRESSIONS.index(row["compression"]), row["recovery"]))
    return table.close(missed(table.rows, table.dense))


if __name__ == "__main__":
    sys.exit(main())
