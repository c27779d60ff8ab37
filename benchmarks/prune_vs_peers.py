"""Our pruners against another library's at equal sparsity: held-out perplexity, paired over calibration samples.

Every contender prunes the decoder's linear layers of the same float32 checkpoint, calibrated with the same windows, at 50 % and
70 % of each layer and at 2:4; all else is at the contender's own defaults. The peers run in a virtual environment of their own
(`peers.py`); their weights are read back, their zeros counted, and one evaluator, a plain transformers forward in float32, takes
everybody's perplexity on the same held-out windows. Magnitude without data is there to compare with.

Bar: ours equals or beats the peer's of the same algorithm: the mean paired difference is below zero, within its own standard
error, or less than a thousandth. The exit status is 1 where it is missed.

    python benchmarks/prune_vs_peers.py --seeds 5
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from quality import DATA
from quant_vs_peers import deviation, interpreter, subjects
from reconstruction import Artifact
from safetensors.torch import load_file
from subjects import HELD_OUT_WINDOWS, LENGTH, SAMPLES, Subject
from torch import Tensor

from compress.pipeline import Pipeline
from compress.recipe import Calibration

ROOT = Path(__file__).resolve().parent
PATTERNS: dict[str, tuple[float, str | None]] = {"50 %": (0.5, None), "70 %": (0.7, None), "2:4": (0.5, "2:4")}
COUNTERPARTS = {"wanda": "llmcompressor-wanda", "sparsegpt": "llmcompressor-sparsegpt"}
OURS = ("magnitude", *COUNTERPARTS)
EQUAL = 0.001  # of the perplexity: what another order of summation makes


def judged(subject: Subject, dump: dict[str, Tensor]) -> dict[str, float]:
    """Perplexity and share of zeros of what a contender made of the weights."""
    given = {name: value for name, value in dump.items() if name in subject.dense and name != "lm_head.weight"}
    layers = [given[f"{name}.weight"] for name in subject.layers]
    zeros = sum(int((weight == 0).sum()) for weight in layers) / sum(weight.numel() for weight in layers)
    return {"sparsity": round(zeros, 5), "perplexity": subject.perplexity(given)}


def run_ours(method: str, subject: Subject, sparsity: float, pattern: str | None, seed: int) -> dict[str, float]:
    """One setting through the library as a user runs it."""
    chain = f"{method}:pattern={pattern}" if pattern else f"{method}:sparsity={sparsity}"
    calibration = Calibration(data=subject.calibration, samples=SAMPLES, length=LENGTH)
    with tempfile.TemporaryDirectory(prefix="compress-ours-", dir=subject.work) as scratch:
        out = Path(scratch) / "out"
        Pipeline([chain], calibration=calibration, evaluate=False, seed=seed, dtype="float32").run(subject.path, out)
        artifact = Artifact(out)
        return judged(subject, {name: artifact.tensor(name) for name in artifact.where})


def run_peer(peer: str, subject: Subject, seeds: int, options: argparse.Namespace) -> dict[tuple[str, int], dict[str, Any]]:
    """All settings in one process of the peer's."""
    found: dict[tuple[str, int], dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="compress-peer-", dir=subject.work) as scratch:
        asked = {
            str(Path(scratch) / f"{number}.safetensors"): (title, seed)
            for number, (seed, title) in enumerate((seed, title) for seed in range(seeds) for title in PATTERNS)
        }
        settings = [
            {"tokens": str(subject.tokens(seed)), "sparsity": PATTERNS[title][0], "pattern": PATTERNS[title][1], "out": out}
            for out, (title, seed) in asked.items()
        ]
        listing = Path(scratch) / "settings.json"
        listing.write_text(json.dumps(settings))
        python, log = interpreter("llmcompressor-gptq", options.cache), subject.work / f"{peer}-{subject.name}.log"
        with open(log, "w") as errors:
            process = subprocess.run(
                [str(python), str(ROOT / "peers.py"), "sweep", peer, str(subject.path), str(listing), str(options.threads)],
                stdout=subprocess.PIPE, stderr=errors, cwd=scratch, text=True,
                env=os.environ | {"OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"},
            )  # fmt: skip
        for line in (line for line in process.stdout.splitlines() if line.startswith('{"out"')):
            answer = json.loads(line)
            failed = {"failed": answer.get("failed")}
            found[asked[answer["out"]]] = failed if failed["failed"] else judged(subject, load_file(answer["out"]))
    if process.returncode:
        print(f"{peer} on {subject.name} ended with status {process.returncode}, see {log}", file=sys.stderr)
    return found


def measure(subject: Subject, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of a model: one for each sparsity."""
    runs: dict[str, dict[tuple[str, int], dict[str, Any]]] = {}
    for method in OURS:
        runs[method] = {
            (title, seed): run_ours(method, subject, *PATTERNS[title], seed)
            for title in PATTERNS for seed in range(options.seeds if method != "magnitude" else 1)
        }  # fmt: skip
        print(subject.name, method, runs[method], file=sys.stderr, flush=True)
    for peer in () if options.without_peers else COUNTERPARTS.values():
        runs[peer] = run_peer(peer, subject, options.seeds, options)
        print(subject.name, peer, runs[peer], file=sys.stderr, flush=True)
    return [{"setting": title} | _row(runs, title) for title in PATTERNS]


def _row(runs: dict[str, dict[tuple[str, int], dict[str, Any]]], title: str) -> dict[str, Any]:
    values = {
        who: {seed: run["perplexity"] for (name, seed), run in cells.items() if name == title and "perplexity" in run}
        for who, cells in runs.items()
    }
    pairs = []
    for mine, peer in COUNTERPARTS.items():
        if shared := sorted(values[mine].keys() & values.get(peer, {}).keys()):
            change = [values[mine][seed] - values[peer][seed] for seed in shared]
            pairs.append(
                {
                    "ours": mine, "peer": peer, "difference": statistics.mean(change), "deviation": deviation(change),
                    "relative": statistics.mean(change) / statistics.mean(values[peer][seed] for seed in shared),
                    "not_worse": sum(value <= 0 for value in change), "seeds": len(shared),
                }
            )  # fmt: skip
    means = {who: statistics.mean(found.values()) for who, found in values.items() if found}
    sparsity = {who: next(run["sparsity"] for (name, _), run in runs[who].items() if name == title) for who in means}
    return {
        "perplexity": means, "deviation": {who: deviation(list(values[who].values())) for who in means},
        "sparsity": sparsity, "pairs": pairs,
    }  # fmt: skip


def behind(tables: list[dict[str, Any]]) -> list[str]:
    """The comparisons that ours lost in the mean."""
    return [
        f"{table['model']} {row['setting']}: {pair['ours']} {pair['difference']:+.4g} ({pair['relative']:+.2%})"
        for table in tables for row in table["rows"] for pair in row["pairs"]
        if pair["difference"] > pair["deviation"] / pair["seeds"] ** 0.5 and pair["relative"] > EQUAL
    ]  # fmt: skip


def markdown(tables: list[dict[str, Any]]) -> str:
    """Perplexities, paired differences and the bar."""
    lines = [
        "# Our pruners against llm-compressor's at equal sparsity", "",
        f"llmcompressor 0.14.0.1 at its defaults. {SAMPLES} calibration windows of {LENGTH} tokens, another sample for each "
        f"seed, the same for all; {HELD_OUT_WINDOWS} held-out windows; float32. Perplexity per token: mean ± standard deviation "
        "over the seeds. Difference: ours less the peer's, paired by seed; negative is better.", "",
    ]  # fmt: skip
    for table in tables:
        who = list(table["rows"][0]["perplexity"])
        lines += [f"## {table['model']}", "", f"Dense: {table['dense']:.4f}.", "", "| sparsity | " + " | ".join(who) + " |"]
        lines.append("|---" * (1 + len(who)) + "|")
        for row in table["rows"]:
            cells = [f"{row['perplexity'][name]:.4f} ± {row['deviation'][name]:.4f}" for name in who if name in row["perplexity"]]
            lines.append(f"| {row['setting']} | " + " | ".join(cells) + " |")
        lines += ["", "| sparsity | ours | difference | of the peer's | seeds in which ours is no higher |", "|---" * 5 + "|"]
        lines += [
            f"| {row['setting']} | {pair['ours']} | {pair['difference']:+.4f} ± {pair['deviation']:.4f} "
            f"| {pair['relative']:+.2%} | {pair['not_worse']} of {pair['seeds']} |"
            for row in table["rows"] for pair in row["pairs"]
        ]  # fmt: skip
        lines.append("")
    lost, n_pairs = behind(tables), sum(len(row["pairs"]) for table in tables for row in table["rows"])
    lines += ["## Bar", "", f"Ours equals or beats the peer's in {n_pairs - len(lost)} of {n_pairs} comparisons.", ""]
    return "\n".join([*lines, *(f"- MISSED {line}" for line in lost), *([""] if lost else [])])


def main() -> int:
    """Measure, compare, write; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", type=lambda text: text.split(","), help="names of models (`demo` is the bundled one)")
    parser.add_argument("--seeds", type=int, default=5, help="calibration samples")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--without-peers", action="store_true", help="ours alone")
    parser.add_argument("--models", type=Path, default=DATA / "models", help="directory of model directories")
    parser.add_argument("--held-out", type=Path, default=DATA / "corpora" / "tinystories_valid.txt")
    parser.add_argument("--calibration", type=Path, default=DATA / "corpora" / "tinystories_train1000.jsonl")
    scratch = Path(tempfile.gettempdir())
    parser.add_argument("--cache", type=Path, default=scratch / "compress-bench-envs", help="the peers' environments")
    parser.add_argument("--work", type=Path, default=scratch / "compress-prune-vs-peers", help="models, logs")
    parser.add_argument("--out", type=Path, default=ROOT / "results", help="directory of prune_vs_peers.json and .md")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(options.threads)
    os.environ |= {"OMP_NUM_THREADS": str(options.threads), "TQDM_DISABLE": "1"}
    options.work.mkdir(parents=True, exist_ok=True)
    tables = [
        {"model": subject.name, "dense": subject.perplexity({}), "rows": measure(subject, options)}
        for subject in subjects(options)
    ]
    (options.out / "prune_vs_peers.json").write_text(json.dumps({"behind": behind(tables), "models": tables}, indent=1) + "\n")
    (options.out / "prune_vs_peers.md").write_text(markdown(tables))
    print(markdown(tables))
    return 1 if behind(tables) else 0


if __name__ == "__main__":
    sys.exit(main())
