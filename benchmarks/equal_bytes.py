"""Low rank, pruning and quantization at equal true bytes, alone and chained, before and after distillation, on the bundled model.

Every chain has one free setting, which is solved for so that the whole file, as it lies on disk, takes 80, 60 or 40 % of the
source's (16 bits a weight) and never more; a chain whose largest setting is below the budget (8-bit codes) stands where it is.
Distillation is `logit_kd` for 200 steps of 8 x 64 tokens of the calibration text, with one learning rate for all of a kind.
Rows that are in the results already are kept, so an interrupted run goes on.

    python benchmarks/equal_bytes.py            # run what is missing, draw the chart
    python benchmarks/equal_bytes.py --draw     # the chart alone
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from quantizers import measure

from compress.calibration import load_tokenizer, read_text, window_length, windows
from compress.checkpoint import Checkpoint
from compress.demo import MODEL
from compress.errors import BadInput
from compress.eval.fidelity import base_logprobs, compare
from compress.judge import load_model
from compress.pipeline import plan
from compress.recipe import Calibration, Recipe

RESULTS = Path(__file__).parent / "results" / "equal_bytes.json"
BUDGETS = (0.8, 0.6, 0.4)
STEPS, RATE = 200, 1e-3
SAMPLES, WINDOWS = 32, 32
CHAINS: dict[str, tuple[str, tuple[float, float], tuple[float, ...]]] = {
    "low rank": ("svd_llm:ratio={:.4f},ranks=loss", (0.05, 0.995), BUDGETS),
    "low rank + sparse": ("sltrain:ratio={:.4f}", (0.05, 0.995), BUDGETS),
    "unstructured pruning": ("sparsegpt:sparsity={:.4f} pack", (0.9, 0.01), BUDGETS),
    "width pruning": ("minitron:sparsity={:.4f}", (0.9, 0.01), BUDGETS),
    "quantization": ("mixed:bits={:.3f}", (2.2, 8.0), (0.6, 0.4)),
    "low rank > quantization": ("svd_llm:ratio={:.4f},ranks=loss gptq:bits=8", (0.05, 0.995), (0.4,)),
    "pruning > quantization": ("sparsegpt:sparsity={:.4f} gptq:bits=8 pack", (0.9, 0.01), (0.4,)),
    "width > quantization": ("minitron:sparsity={:.4f} gptq:bits=8", (0.9, 0.01), (0.4,)),
    "width > low rank > quantization": (
        "minitron:sparsity=0.1 svd_llm:ratio={:.4f},ranks=loss gptq:bits=8",
        (0.05, 0.995),
        (0.4,),
    ),
}
"""Name: the chain with its free setting, that setting for the smallest and the largest file, and the budgets it is run at."""


def solve(template: str, ends: tuple[float, float], budget: int) -> str | None:
    """The chain with the setting whose file is the largest within the budget, by what `compress plan` predicts; None: there is
    no such."""

    def predicted(value: float) -> int:
        recipe = Recipe(model=str(MODEL), passes=template.format(value).split())  # type: ignore[arg-type]
        return plan(recipe).predicted_bytes

    smallest, largest = ends
    if predicted(smallest) > budget:
        return None
    if predicted(largest) <= budget:
        return template.format(largest)
    for _ in range(14):
        middle = (smallest + largest) / 2
        try:
            within = predicted(middle) <= budget
        except BadInput:  # a choice that leaves no whole part
            within = False
        smallest, largest = (middle, largest) if within else (smallest, middle)
    return template.format(smallest)


def within(
    run: Callable[[str], dict[str, Any]], template: str, ends: tuple[float, float], budget: int, is_healed: bool
) -> dict[str, Any] | None:
    """A row whose file is within the budget: where ranks are shared out by what is measured, a plan can be a little too low."""
    aim = budget
    while (chain := solve(template, ends, aim)) is not None:
        row = run(healed(chain) if is_healed else chain)
        if row["bytes"] <= budget:
            return row
        aim -= row["bytes"] - budget
    return None


def healed(chain: str) -> str:
    """The chain with distillation in it: before 8-bit codes or packing, which would leave little to train, else at its end."""
    distillation = f"logit_kd:steps={STEPS},length=64,learning_rate={RATE:g}"
    words = chain.split()
    at = next((i for i, word in enumerate(words) if i and word.startswith(("gptq", "pack"))), len(words))
    return " ".join([*words[:at], distillation, *words[at:]])


def rows(run: Callable[[str], dict[str, Any]], known: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every chain at every budget, as it is and healed."""
    found = list(known)
    source = Checkpoint.open(MODEL).nbytes
    for name, (template, ends, budgets) in CHAINS.items():
        for budget in budgets:
            have = {row["healed"] for row in found if (row["name"], row["budget"]) == (name, budget)}
            for is_healed in sorted({False, True} - have):
                row = within(run, template, ends, int(budget * source), is_healed)
                if row is not None:
                    found.append({"name": name, "budget": budget, "healed": is_healed, "share": row["bytes"] / source, **row})
                    print(found[-1], file=sys.stderr, flush=True)
                    save(found)
    return found


def save(found: list[dict[str, Any]], protocol: str | None = None) -> None:
    """Write the results aside, then in place."""
    old = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    aside = RESULTS.with_suffix(".part")
    aside.write_text(
        json.dumps({"protocol": protocol or old.get("protocol", ""), "base": old.get("base"), "rows": found}, indent=1) + "\n"
    )
    aside.replace(RESULTS)


def draw(content: dict[str, Any], path: Path) -> None:
    """Perplexity against the size of the file: hollow as compressed, full after distillation."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    colors = ("#009E73", "#8C6D31", "#E69F00", "#D55E00", "#0072B2", "#56B4E9", "#CC79A7", "#7B3F98", "#222222")
    figure = Figure(figsize=(10, 5.6), dpi=160)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.08, 0.11, 0.60, 0.78))
    axes.axhline(content["base"], color="#666666", linewidth=1, linestyle=(0, (4, 3)))
    axes.text(0.6, content["base"] * 0.995, "base model, 100 % of the bytes", va="top", ha="center", fontsize=8, color="#666666")
    for color, name in zip(colors, CHAINS, strict=True):
        for is_healed in (False, True):
            points = sorted(
                (row["share"], row["perplexity"]) for row in content["rows"] if (row["name"], row["healed"]) == (name, is_healed)
            )
            if points:
                axes.plot(
                    *zip(*points, strict=True), color=color, linewidth=1.6 if is_healed else 0.9,
                    linestyle="-" if is_healed else ":", marker="o", markersize=6,
                    markerfacecolor=color if is_healed else "white", markeredgecolor=color, label=name if is_healed else None,
                )  # fmt: skip
    axes.set_yscale("log")
    axes.set_xlabel("bytes of the file, share of the source's")
    axes.set_ylabel("perplexity on held-out text")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    ticks = [20, 22, 25, 30, 40, 60, 100, 200, 400, 1000]
    axes.set_yticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    worst = max(row["perplexity"] for row in content["rows"])
    axes.set_ylim(content["base"] * 0.95, min(worst * 1.08, 1000))
    axes.grid(color="#E6E6E6", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    figure.text(0.08, 0.94, "Equal true bytes", fontsize=14, fontweight="bold")
    axes.legend(
        loc="upper left",
        bbox_to_anchor=(1.02, 1),
        frameon=False,
        fontsize=9,
        title="hollow: compressed\nfull: and distilled, 200 steps",
    )
    figure.savefig(path.with_suffix(".png"))
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})


def markdown(content: dict[str, Any]) -> str:
    """The table: a chain a line, a budget a column, perplexity as compressed and after distillation."""
    lines = ["| | " + " | ".join(f"{budget:.0%}" for budget in BUDGETS) + " |", "|---|" + "---|" * len(BUDGETS)]
    found = {(row["name"], row["budget"], row["healed"]): row["perplexity"] for row in content["rows"]}
    for name in CHAINS:
        cells = []
        for budget in BUDGETS:
            before, after = found.get((name, budget, False)), found.get((name, budget, True))
            cells.append(f"{before:.2f}, {after:.2f}" if before and after else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--draw", action="store_true", help="draw the results that there are")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if not options.draw:
        checkpoint = Checkpoint.open(MODEL)
        length = window_length(None, checkpoint.config)
        texts, source = read_text(None, bundled="held_out")
        tokenizer = load_tokenizer(MODEL, checkpoint.config.vocab_size)
        chosen = windows(tokenizer, texts, source, n=WINDOWS, length=length, seed=0, at_most=True)
        with tempfile.TemporaryDirectory() as scratch:
            stored = base_logprobs(load_model(MODEL, torch.float32, "cpu"), chosen.tokens, Path(scratch) / "base.npy")
            base = compare(load_model(MODEL, torch.float32, "cpu"), chosen.tokens, stored).perplexity
            protocol = (
                f"Bundled checkpoint ({checkpoint.nbytes:,} bytes, perplexity {base:.2f}); {len(chosen.tokens)} held-out and "
                f"{SAMPLES} calibration windows of {length} tokens; distillation: logit_kd, {STEPS} steps of 8 x 64 tokens, "
                f"learning rate {RATE:g}; float32, seed 0."
            )
            old = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
            known = old["rows"] if old.get("protocol") == protocol else []
            RESULTS.write_text(json.dumps({"protocol": protocol, "base": base, "rows": known}, indent=1) + "\n")
            calibration = Calibration(samples=SAMPLES, length=length)
            rows(lambda chain: measure(chain.split(), calibration, chosen.tokens, stored, Path(scratch) / "out"), known)
    content = json.loads(RESULTS.read_text())
    draw(content, RESULTS)
    print(markdown(content))
    return 0


if __name__ == "__main__":
    sys.exit(main())
