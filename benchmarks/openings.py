"""Artifacts that can be opened at any size, on the bundled checkpoint: what every size costs in perplexity.

BitStack is opened at ten budgets, which the files must meet to within a hundredth, with a perplexity that falls from each to the
next. Nested codes are opened at their widths, beside quantizers that choose codes for one width alone, with the same groups, and
at sizes between. Everything is compressed in this process and without the reload in a fresh one. Rows that are in the results
already are kept, so that an interrupted run goes on. Exit status 1 where a bar is missed.

    python benchmarks/openings.py --chart
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from svd_llm_reference import perplexity

from compress.calibration import load_tokenizer, read_text, windows
from compress.checkpoint import Checkpoint
from compress.demo import MODEL
from compress.gates import Gates
from compress.judge import load_model
from compress.opening import Opening, _counts, _write
from compress.pipeline import _Run
from compress.progress import silent
from compress.recipe import Calibration, Recipe
from compress.skeleton import Skeleton

RESULTS = Path(__file__).parent / "results" / "openings.json"
CHART = RESULTS.with_suffix(".png")
LENGTH, SHORT = 512, 64  # tokens of a window; of the calibration of what measures each of sixteen parts of every layer
BUDGETS = [2_200_000, 2_500_000, 2_800_000, 3_200_000, 3_600_000, 4_000_000, 4_600_000, 5_400_000, 6_600_000, 8_400_000]
GROUPS = (64, 128)
WIDTHS = (2, 3, 4)
BETWEEN = [2_350_000, 2_500_000, 2_650_000, 2_800_000, 2_950_000, 3_100_000]


def compressed(chain: str, calibration: Calibration, directory: Path) -> Path:
    """The artifact of one pass."""
    recipe = Recipe.parse({"passes": [chain], "calibration": calibration, "evaluation": None})
    work = _Run(recipe, MODEL, "demo", directory / "out", False, silent, Gates())
    work._stage(work.checkpoint, 0, work.stages[0], directory / "stage", work._validate())
    return directory / "stage" / "artifact"


def opened(store: Path, directory: Path, **wanted: int) -> Path:
    """What `compress open` writes, but for the reload."""
    skeleton, step = Skeleton(Checkpoint(store)), Opening(**wanted)
    _write(skeleton, step, _counts(skeleton, step), directory / step.label(), silent)
    return directory / step.label() / "artifact"


def known() -> list[dict[str, Any]]:
    """The rows that are in the results."""
    return json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []


class Bench:
    """What has been measured, and how."""

    def __init__(self, n_windows: int, samples: int, work: Path | None):
        config = Checkpoint.open(MODEL).config
        texts, origin = read_text(None, bundled="held_out")
        tokenizer = load_tokenizer(MODEL, config.vocab_size)
        self.judged_on = windows(tokenizer, texts, origin, n=n_windows, length=LENGTH, seed=0, at_most=True).tokens
        self.samples, self.work = samples, work
        self.rows = known()

    def calibration(self, chain: str) -> Calibration:
        """What a chain is calibrated on."""
        return Calibration(samples=self.samples, length=SHORT if chain.startswith("bitstack") else LENGTH)

    def missing(self, chain: str, wanted: list[dict[str, int]]) -> list[dict[str, int]]:
        """Those of the openings of a chain that are not measured yet; {}: the artifact itself."""
        done = [row["opened"] for row in self.rows if row["chain"] == chain]
        return [each for each in wanted if each not in done]

    def measure(self, chain: str, wanted: list[dict[str, int]]) -> None:
        """Add rows for a chain's openings."""
        missing = self.missing(chain, wanted)
        if not missing:
            return
        with tempfile.TemporaryDirectory(prefix="compress-bench-") as scratch:
            start, kept = time.process_time(), (self.work or Path(scratch)) / chain.replace(":", "-")
            if not kept.exists():
                compressed(chain, self.calibration(chain), Path(scratch)).rename(kept)
                print(f"{chain}: made in {time.process_time() - start:.0f} s of a processor", file=sys.stderr, flush=True)
            for each in missing:
                start = time.process_time()
                artifact = opened(kept, Path(scratch), **each) if each else kept
                self.add(chain, each, artifact, round(time.process_time() - start, 2))

    def add(self, chain: str, opening: dict[str, int], artifact: Path, seconds: float) -> None:
        """Measure and keep one row."""
        found = round(perplexity(load_model(artifact, torch.float32, "cpu"), self.judged_on), 4)
        n_bytes = Checkpoint.open(artifact).nbytes
        row = {"chain": chain, "opened": opening, "bytes": n_bytes, "seconds": seconds, "perplexity": found}
        print(row, file=sys.stderr, flush=True)
        self.rows = [*known(), row]  # which another process may have added to
        self.save()

    def save(self) -> None:
        """Write what there is so far."""
        protocol = (
            f"bundled checkpoint; {len(self.judged_on)} held-out and {self.samples} calibration windows of {LENGTH} tokens "
            f"(bitstack: {SHORT}) of bundled text, float32, seed 0, one thread; seconds: of a processor, to open"
        )
        RESULTS.write_text(json.dumps({"protocol": protocol, "missed": missed(self.rows), "rows": self.rows}, indent=1) + "\n")


def missed(rows: list[dict[str, Any]]) -> list[str]:
    """Bars of BitStack's openings that do not hold."""
    found = sorted((row["opened"]["size"], row) for row in rows if row["chain"] == "bitstack" and row["opened"])
    far = [f"{row['bytes']} bytes for a budget of {size}" for size, row in found if not 0.99 * size <= row["bytes"] <= size]
    pairs = pairwise(found)
    return far + [f"perplexity rises at {b[0]} bytes" for a, b in pairs if b[1]["perplexity"] >= a[1]["perplexity"]]


def draw(rows: list[dict[str, Any]]) -> None:
    """Perplexity over megabytes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), dpi=130)
    base = next(row["perplexity"] for row in rows if row["chain"] == "dense")
    axes.axhline(base, color="#888888", linewidth=1, linestyle=":")
    axes.annotate(f"uncompressed, 16 bits: {base:.2f}", (0.01, base), xycoords=("axes fraction", "data"), xytext=(0, -11),
                  textcoords="offset points", ha="left", fontsize=8, color="#666666")  # fmt: skip
    series = {
        "BitStack, one artifact opened at any size": (
            [r for r in rows if r["chain"] == "bitstack" and r["opened"]], "o-", "#1b6ca8",
        ),
        "nested 2-4 bits, one artifact, g64": (
            [r for r in rows if r["chain"] == "nested:group_size=64" and r["opened"]], "s-", "#c44e52",
        ),
        "gptq, an artifact for every width, g64": (
            [r for r in rows if r["chain"].startswith("gptq") and r["chain"].endswith("=64")], "^--", "#55a868",
        ),
    }  # fmt: skip
    for label, (points, style, colour) in series.items():
        points = sorted(points, key=lambda row: row["bytes"])
        axes.plot(
            [r["bytes"] / 1e6 for r in points], [r["perplexity"] for r in points], style, color=colour, label=label, markersize=4
        )
    axes.set(xlabel="weight files, MB (1.05 MB of which are the embedding)", ylabel="held-out perplexity", yscale="log")
    axes.yaxis.set_major_formatter(matplotlib.ticker.ScalarFormatter())
    axes.yaxis.set_minor_formatter(matplotlib.ticker.ScalarFormatter())
    axes.tick_params(labelsize=8, which="both")
    axes.grid(alpha=0.25, which="both")
    axes.legend(fontsize=8, frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.tight_layout()
    figure.savefig(CHART)


def main() -> int:
    """Measure what is missing, judge, write; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=32, help="held-out windows")
    parser.add_argument("--samples", type=int, default=32, help="calibration windows")
    parser.add_argument("--work", type=Path, help="a directory that keeps the artifacts, for a run that goes on")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", help="parts of chains, with + between")
    parser.add_argument("--chart", action="store_true", help="draw what there is")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.disable(logging.WARNING)
    bench = Bench(options.windows, options.samples, options.work)
    plan: list[tuple[str, list[dict[str, int]]]] = [("bitstack", [{"size": size} for size in BUDGETS])]
    plan.append(("bitstack:order=level", [{"size": size} for size in BUDGETS[:4]]))
    for group in GROUPS:
        sizes = [{"size": size} for size in BETWEEN] if group == 64 else []
        plan.append((f"nested:group_size={group}", [{"bits": bits} for bits in WIDTHS] + sizes))
        plan += [(f"{key}:bits={bits},group_size={group}", [{}]) for bits in WIDTHS for key in ("gptq", "rtn")]
    if bench.missing("dense", [{}]):
        bench.add("dense", {}, MODEL, 0.0)
    for chain, wanted in plan:
        if not options.only or any(part in chain for part in options.only.split("+")):
            bench.measure(chain, wanted)
    if options.chart:
        draw(bench.rows)
    failed = missed(bench.rows)
    print(*failed, sep="\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
