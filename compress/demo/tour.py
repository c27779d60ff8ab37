"""The demonstration: one model, every family, a few chains, one chart."""

from __future__ import annotations

from pathlib import Path

import torch

from compress.checkpoint import Checkpoint
from compress.errors import BadInput
from compress.eval.bit_runs import with_low_bits
from compress.eval.metrics import Report
from compress.eval.report import write_report
from compress.evaluation import Judge, point_label, resolve_evaluation, with_lineage
from compress.pipeline import run
from compress.progress import Progress
from compress.recipe import Calibration, Evaluation, Recipe

RECIPES: tuple[tuple[str, ...], ...] = (
    ("rtn:bits=4",),
    ("rtn:bits=2,group_size=64",),
    ("gptq:bits=3",),
    ("gptq:bits=2,group_size=64",),
    ("magnitude:sparsity=0.7",),
    ("wanda:sparsity=0.7",),
    ("svd:ratio=0.5",),
    ("svd_llm:ratio=0.5",),
    ("wanda:sparsity=0.5", "gptq:bits=3"),
    ("svd_llm:ratio=0.5", "gptq:bits=4"),
    ("gptq:bits=2,group_size=64", "logit_kd:steps=30,length=128,learning_rate=0.002"),
    ("svd_llm:ratio=0.5", "logit_kd:steps=30,length=128,learning_rate=0.002", "gptq:bits=4"),
)
"""Each family alone, weak methods beside strong ones, and chains across families."""

CALIBRATION = Calibration(samples=32, length=256)
EVALUATION = Evaluation(limit=150, batch_size=64, windows=8, length=256)


def tour(out: Path, progress: Progress, recipes: tuple[tuple[str, ...], ...] = RECIPES) -> Path:
    """Run ``recipes`` on the bundled model into ``out`` and return the path of the report over all of them.

    A rerun continues: recipes whose artifact is there are not run again. Raises :class:`BadInput` where ``out`` holds
    something else.
    """
    if out.exists() and (not out.is_dir() or any(entry.name not in _own_names(recipes) for entry in out.iterdir())):
        raise BadInput(f"{out} exists and is not a demo's directory; choose another with -o")
    out.mkdir(parents=True, exist_ok=True)
    base = Checkpoint.open("demo")
    judge = Judge(resolve_evaluation(EVALUATION, demo=True), base, "demo", torch.float32, "cpu", progress)
    report = Report(title="The bundled model, compressed", base=judge.base_metrics(), command=f"compress demo -o {out}")
    for number, passes in enumerate(recipes):
        recipe = Recipe(model="demo", passes=passes, calibration=CALIBRATION, evaluation=None, dtype="float32")  # type: ignore[arg-type]
        label = point_label(recipe.passes)
        artifact = out / _directory(number, passes)

        def tell(done: int, total: int, message: str, number: int = number, label: str = label) -> None:
            progress(number, len(recipes), f"{label}: {message}")

        if not artifact.exists():
            run(recipe, out=artifact, progress=tell)
        judge.progress = tell
        report = report.add(judge.metrics(artifact, label))
    progress(len(recipes), len(recipes), "drawing")
    return write_report(with_low_bits(with_lineage(report)), out)


def _directory(number: int, passes: tuple[str, ...]) -> str:
    return f"{number + 1:02d}-" + "-".join(step.partition(":")[0] for step in passes)


def _own_names(recipes: tuple[tuple[str, ...], ...]) -> set[str]:
    artifacts = [_directory(number, passes) for number, passes in enumerate(recipes)]
    reports = ["report.html", "metrics.json", "chart.svg", "chart.png"]
    return {*artifacts, *(f"{name}.partial" for name in artifacts), *reports}
