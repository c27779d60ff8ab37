"""Which low-rank method is better than which, on trained models: held-out perplexity at 80, 60 and 40 % of the parameters.

Every claim of `CLAIMS` says of two chains that the first has the lower perplexity. All are run on the same calibration windows
and judged on the same held-out ones, in this process, without the reload in a fresh one; rows that are in the results already
are kept, so an interrupted run goes on. Exit status 1 where a claim fails; by how much, is in the results.

    python benchmarks/low_rank_orderings.py --models DIRECTORY --held-out FILE --calibration FILE
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import torch
from quality import DATA
from subjects import Subject
from svd_llm_reference import MODELS, RATIOS, perplexity

from compress.checkpoint import Checkpoint
from compress.demo import MODEL as DEMO
from compress.gates import Gates
from compress.judge import load_model
from compress.pipeline import _Run
from compress.progress import silent
from compress.recipe import Calibration, Recipe

RESULTS = Path(__file__).parent / "results" / "low_rank_orderings.json"
CLAIMS = [
    ("asvd", "svd"), ("svd_llm", "asvd"), ("svd_llm:update=true", "svd_llm"), ("fwsvd", "svd"), ("svd_llm:ranks=type", "svd_llm"),
    ("svd_llm:ranks=loss", "svd_llm"), ("losparse", "svd_llm"), ("sltrain", "svd_llm"),
    ("svd_llm:update=true,ranks=loss", "svd_llm:update=true"), ("svd_llm:update=true,ranks=loss", "svd_llm:ranks=loss"),
]  # fmt: skip
CHAINS = sorted({chain for claim in CLAIMS for chain in claim})


def compressed(source: Path, chain: str, calibration: Calibration, scratch: Path) -> Path:
    """The artifact of a chain of one stage."""
    recipe = Recipe.parse({"passes": [chain], "calibration": calibration, "evaluation": None})
    work = _Run(recipe, source, str(source), scratch / "out", False, silent, Gates())
    work._stage(work.checkpoint, 0, work.stages[0], scratch / "stage", work._validate())
    return Checkpoint(scratch / "stage" / "artifact").path


def measure(subject: Subject, chain: str, ratio: float, samples: int) -> dict[str, Any]:
    """One row."""
    step = f"{chain}{',' if ':' in chain else ':'}ratio={ratio}"
    calibration = Calibration(data=subject.calibration, samples=samples, length=subject.judged_on.shape[1])
    with tempfile.TemporaryDirectory(dir=subject.work) as scratch:
        model = load_model(compressed(subject.source, step, calibration, Path(scratch)), torch.float32, "cpu")
        found = round(perplexity(model, subject.judged_on), 4)
    return {"model": subject.name, "chain": chain, "ratio": ratio, "perplexity": found}


def judged(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """Each claim with its share of cells where it holds and its ratios of perplexities, and the cells where it does not."""
    known = {(row["model"], row["chain"], row["ratio"]): row["perplexity"] for row in rows}
    claims, missed = [], []
    for better, worse in CLAIMS:
        cells = {
            (model, ratio): known[model, better, ratio] / known[model, worse, ratio]
            for model, chain, ratio in known if chain == better and (model, worse, ratio) in known
        }  # fmt: skip
        failed = [f"{better} < {worse}: {model} at {ratio}: {value:.3f}" for (model, ratio), value in cells.items() if value >= 1]
        span = [round(min(cells.values()), 4), round(max(cells.values()), 4)] if cells else None
        claims.append({"better": better, "worse": worse, "holds": len(cells) - len(failed), "of": len(cells), "ratios": span})
        missed += failed
    return claims, missed


def save(rows: list[dict[str, Any]], samples: int) -> None:
    """Write what there is so far."""
    claims, missed = judged(rows)
    protocol = f"64 held-out and {samples} calibration windows of each model's context length, float32, seed 0"
    report = {"protocol": protocol, "claims": claims, "missed": missed, "rows": rows}
    RESULTS.write_text(json.dumps(report, indent=1) + "\n")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=DATA / "models")
    parser.add_argument("--held-out", default=str(DATA / "corpora" / "tinystories_valid.txt"))
    parser.add_argument("--calibration", default=str(DATA / "corpora" / "tinystories_train1000.jsonl"))
    parser.add_argument("--samples", type=int, default=32, help="calibration windows")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", help="comma-separated names of models")
    return parser.parse_args()


def main() -> int:
    """Measure what is missing, judge, write; returns the exit status."""
    options = arguments()
    torch.set_num_threads(options.threads)
    logging.disable(logging.WARNING)
    rows: list[dict[str, Any]] = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    names = [*MODELS, "demo"] if options.only is None else options.only.split(",")
    with tempfile.TemporaryDirectory(prefix="compress-bench-") as scratch:
        for name in names:
            if name != "demo" and not (options.models / name).exists():
                print(f"{name}: not there", file=sys.stderr)
                continue
            texts = (None, None) if name == "demo" else (options.held_out, options.calibration)
            subject = Subject(name, DEMO if name == "demo" else options.models / name, *texts, Path(scratch))
            done = {(row["chain"], row["ratio"]) for row in rows if row["model"] == name}
            for chain, ratio in [cell for cell in (("dense", 1.0), *product(CHAINS, RATIOS)) if cell not in done]:
                if chain == "dense":
                    found = round(perplexity(subject.model, subject.judged_on), 4)
                    rows.append({"model": name, "chain": chain, "ratio": ratio, "perplexity": found})
                else:
                    rows.append(measure(subject, chain, ratio, options.samples))
                print(rows[-1], os.getloadavg()[0], file=sys.stderr, flush=True)
                save(rows, options.samples)
    claims, missed = judged(rows)
    print(json.dumps(claims, indent=1), *missed, sep="\n")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
