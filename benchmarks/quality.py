"""Is each calibrated method better than the simple one that it is to replace, on trained models?

For every model: perplexity on held-out text, divergence from the base model and agreement of the top token, after
rounding to nearest and GPTQ (4 and 3 bits, every group size of 128, 64 and 32 that divides the model's widths, symmetric
and asymmetric), magnitude pruning and Wanda (50 %, with the weights of a row or of a matrix competing, and 2:4), and plain
SVD and SVD-LLM (80, 60 and 40 % of the parameters). Each is run through the library as a user runs it, reload in a fresh
process included; everything is seeded.

Bars: GPTQ below RTN at 4 and 3 bits, Wanda below magnitude at 50 % where the same weights compete, SVD-LLM below SVD. The
exit status is 1 where one is missed. Models or texts that are absent are skipped and said to be.

    python benchmarks/quality.py --models DIRECTORY --held-out FILE --calibration FILE
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from compress.calibration import load_tokenizer, read_text, window_length, windows
from compress.checkpoint import Checkpoint
from compress.demo import MODEL as DEMO
from compress.errors import CompressError
from compress.eval.fidelity import base_logprobs, compare
from compress.judge import load_model
from compress.loader import linear_shape
from compress.pipeline import Pipeline
from compress.recipe import Calibration
from compress.skeleton import Skeleton

ROOT = Path(__file__).resolve().parent
DATA = ROOT.parent.parent / "shared" / "data"
GROUP_SIZES = (128, 64, 32)


@dataclass
class Row:
    """One compressed model. baseline: the row that it must beat; required: whether a bar says so."""

    label: str
    perplexity: float | None = None
    kl: float | None = None
    top1: float | None = None
    bytes: int | None = None
    seconds: float | None = None
    baseline: str | None = None
    required: bool = False
    note: str = ""


@dataclass
class Table:
    """A model's rows, and the protocol that makes them comparable."""

    model: str
    base_perplexity: float
    protocol: dict[str, Any]
    rows: list[Row] = field(default_factory=list)

    def missed(self) -> list[str]:
        """The comparisons that did not come out as they must."""
        value = {row.label: row.perplexity for row in self.rows}
        found = []
        for row in self.rows:
            ours, theirs = row.perplexity, value.get(row.baseline or "")
            if row.required and ours is not None and theirs is not None and not ours < theirs:
                found.append(f"{self.model}: {row.label} {ours:.4g} is not below {row.baseline} {theirs:.4g}")
        return found


def configurations(widths: set[int]) -> list[Row]:
    """What is compared on a model whose linear layers have inputs of those widths."""
    rows = []
    groups = [size for size in GROUP_SIZES if all(width % size == 0 for width in widths)] or [-1]
    for bits in (4, 3):
        for group in groups:
            for symmetric in ("true", "false"):
                options = f"bits={bits},group_size={group},symmetric={symmetric}"
                rows += [Row(f"rtn:{options}"), Row(f"gptq:{options}", baseline=f"rtn:{options}", required=True)]
    for pattern in ("row", "tensor", "2:4"):
        baseline, bar = f"magnitude:pattern={pattern}", pattern != "2:4"
        rows += [Row(baseline), Row(f"wanda:pattern={pattern}", baseline=baseline, required=bar)]
    for ratio in (0.8, 0.6, 0.4):
        rows += [Row(f"svd:ratio={ratio}"), Row(f"svd_llm:ratio={ratio}", baseline=f"svd:ratio={ratio}", required=True)]
    return rows


def measure(model: Path, name: str, options: argparse.Namespace, held_out: str | None, calibration: str | None) -> Table:
    """All rows of one model. held_out, calibration: files, or None for the bundled texts."""
    checkpoint = Checkpoint.open(model)
    length = window_length(None, checkpoint.config)
    tokenizer = load_tokenizer(model, checkpoint.config.vocab_size)
    texts, source = read_text(held_out, bundled="held_out")
    chosen = windows(tokenizer, texts, source, n=options.windows, length=length, seed=options.seed, at_most=True)
    settings = Calibration(data=calibration, samples=options.samples, length=length)
    skeleton = Skeleton(checkpoint)
    widths = {linear_shape(skeleton.blocks[0].get_submodule(local))[1] for local in skeleton.arch.linears}
    with tempfile.TemporaryDirectory() as scratch:
        stored = base_logprobs(load_model(model, torch.float32, "cpu"), chosen.tokens, Path(scratch) / "base.npy")
        base = compare(load_model(model, torch.float32, "cpu"), chosen.tokens, stored)
        protocol = {
            "held_out": source, "windows": len(chosen.tokens), "context_length": length, "tokens_scored": base.n_tokens,
            "calibration": Path(calibration).name if calibration else "bundled", "samples": options.samples,
            "dtype": "float32", "seed": options.seed, "torch": torch.__version__,
        }  # fmt: skip
        table = Table(name, base.perplexity, protocol, configurations(widths))
        for row in table.rows:
            if options.only and not any(part in row.label for part in options.only.split(",")):
                continue
            _fill(row, model, settings, options.seed, chosen.tokens, stored, Path(scratch) / "out")
            print(f"{name}  {row.label}  {row.perplexity or row.note}", file=sys.stderr, flush=True)
    table.rows = [row for row in table.rows if row.perplexity is not None or row.note]
    return table


def _fill(row: Row, model: Path, settings: Calibration, seed: int, tokens: torch.Tensor, stored: Path, out: Path) -> None:
    start = time.monotonic()
    try:
        result = Pipeline([row.label], calibration=settings, evaluate=False, seed=seed).run(model, out, overwrite=True)
    except CompressError as error:
        row.note = str(error)
        return
    row.seconds, row.bytes = round(time.monotonic() - start, 1), result.bytes
    fidelity = compare(load_model(out, torch.float32, "cpu"), tokens, stored)
    row.perplexity, row.kl, row.top1 = fidelity.perplexity, fidelity.kl_mean, fidelity.top1_agreement


def markdown(tables: list[Table]) -> str:
    """The tables, each with its protocol, and the bars below."""
    lines = ["# Quality of the calibrated methods against their baselines", ""]
    for table in tables:
        protocol = ", ".join(f"{key} {value}" for key, value in table.protocol.items())
        lines += [f"## {table.model}", "", f"Protocol: {protocol}. Base perplexity {table.base_perplexity:.4f} per token.", ""]
        lines += [
            "| method | perplexity | KL to base | same top token | bytes | against its baseline |",
            "|---|---|---|---|---|---|",
        ]
        value = {row.label: row.perplexity for row in table.rows}
        for row in table.rows:
            if row.perplexity is None:
                lines.append(f"| {row.label} | - | - | - | - | not run: {row.note} |")
                continue
            theirs = value.get(row.baseline or "")
            verdict = (
                "" if theirs is None else f"{row.perplexity - theirs:+.4g} ({'better' if row.perplexity < theirs else 'WORSE'})"
            )
            lines.append(f"| {row.label} | {row.perplexity:.4f} | {row.kl:.4g} | {row.top1:.1%} | {row.bytes:,} | {verdict} |")
        lines.append("")
    missed = [line for table in tables for line in table.missed()]
    lines += ["## Bars", "", *([f"- MISSED {line}" for line in missed] or ["All bars hold."]), ""]
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=DATA / "models", help="directory of model directories")
    parser.add_argument("--held-out", type=Path, default=DATA / "corpora" / "tinystories_valid.txt")
    parser.add_argument("--calibration", type=Path, default=DATA / "corpora" / "tinystories_train1000.jsonl")
    parser.add_argument("--samples", type=int, default=128, help="calibration windows")
    parser.add_argument("--windows", type=int, default=64, help="held-out windows")
    parser.add_argument("--threads", type=int, default=1, help="of small models: more only wait for one another")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="comma-separated parts of labels, such as `gptq,rtn` or `ratio=0.4`")
    parser.add_argument("--names", help="comma-separated names of models (`demo` is the bundled one)")
    parser.add_argument("--out", type=Path, default=ROOT / "results", help="directory of quality.json and quality.md")
    return parser.parse_args()


def main() -> int:
    """Measure every model there is; returns the exit status."""
    options = arguments()
    logging.disable(logging.WARNING)
    torch.set_num_threads(options.threads)
    os.environ |= {"OMP_NUM_THREADS": str(options.threads), "TQDM_DISABLE": "1"}  # of the fresh processes, too
    torch.manual_seed(options.seed)
    work: list[tuple[Path, str, str | None, str | None]] = []
    if DEMO.is_dir():
        work.append((DEMO, "demo", None, None))
    else:
        print("skipped the demo model: this checkout has no compress/demo/model", file=sys.stderr)
    missing = [str(path) for path in (options.models, options.held_out, options.calibration) if not path.exists()]
    if missing:
        print(f"skipped the trained models: no {', '.join(missing)}", file=sys.stderr)
    else:
        found = sorted(path.parent for path in options.models.glob("*/config.json"))
        work += [(path, path.name, str(options.held_out), str(options.calibration)) for path in found]
    if options.names:
        work = [item for item in work if item[1] in options.names.split(",")]
    tables = [measure(path, name, options, held_out, calibration) for path, name, held_out, calibration in work]
    if not tables:
        print("nothing to measure", file=sys.stderr)
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    content = [asdict(table) | {"missed": table.missed()} for table in tables]
    (options.out / "quality.json").write_text(json.dumps(content, indent=1) + "\n")
    (options.out / "quality.md").write_text(markdown(tables))
    print(markdown(tables))
    return 1 if any(table.missed() for table in tables) else 0


if __name__ == "__main__":
    sys.exit(main())
