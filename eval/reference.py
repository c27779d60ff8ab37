"""Effective parameters and density of a report's points, against measured dense models of one family."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from compress.eval.density import Density, FamilyMember, check_sizes, fit
from compress.eval.metrics import Metrics, Report

LOSS = "bits_per_byte"


def read_references(sources: Iterable[str | Path]) -> list[Metrics]:
    """The dense models in ``metrics.json`` files, or in directories that hold one: the base of each report.

    Raises OSError or ValueError for what is no such file.
    """
    files = [path / "metrics.json" if path.is_dir() else path for path in map(Path, sources)]
    return [Report.load(file).base for file in files]


def check_references(references: Sequence[Metrics], limit: int | None, n_shot: int | None) -> None:
    """Find before any compute what :func:`with_density` would refuse. limit, n_shot: of the measurements to come.

    Raises ValueError where the references do not know their sizes, are too few, or were measured otherwise.
    """
    if nameless := [metrics.label for metrics in references if not metrics.cost.non_embedding_parameters]:
        raise ValueError(f"the sizes of these reference models are not known, measure them again: {', '.join(nameless)}")
    check_sizes([metrics.cost.non_embedding_parameters or 0 for metrics in references])
    if any((metrics.protocol.limit, metrics.protocol.n_shot) != (limit, n_shot) for metrics in references):
        raise ValueError("the reference models were measured with another number of documents or of examples in the prompt")


def with_density(report: Report, references: Sequence[Metrics]) -> Report:
    """The report with the family's curve, and every model's place on it. Raises ValueError where the references and the base
    share no task with bits per byte, do not know their sizes, or are no family."""
    everyone = [report.base, *references]
    tasks = [name for name, score in report.base.tasks.items() if LOSS in score.metrics]
    shared = [name for name in tasks if all(LOSS in m.tasks[name].metrics for m in everyone if name in m.tasks)]
    task = next((name for name in shared if all(name in metrics.tasks for metrics in everyone)), None)
    if task is None:
        raise ValueError(f"the reference models have no task with {LOSS} in common with {report.base.label}")
    check_references(references, report.base.protocol.limit, report.base.protocol.n_shot)
    scored = tuple(
        name for name, score in report.base.tasks.items()
        if score.higher_is_better and all(name in metrics.tasks for metrics in everyone)
    )  # fmt: skip
    family = fit(task, [_member(metrics, task, scored) for metrics in references], scored)
    return report.model_copy(
        update={
            "density": family,
            "base": _placed(report.base, family),
            "points": tuple(_placed(point, family) for point in report.points),
        }
    )


def _member(metrics: Metrics, task: str, scored: Sequence[str]) -> FamilyMember:
    size = float(metrics.cost.non_embedding_parameters or 0)
    return FamilyMember(
        label=metrics.label, parameters=size, loss=metrics.tasks[task].metrics[LOSS], score=_score(metrics, scored)
    )


def _score(metrics: Metrics, tasks: Sequence[str]) -> float | None:
    values = [metrics.tasks[name].value for name in tasks if name in metrics.tasks]
    return math.fsum(values) / len(values) if values and len(values) == len(tasks) else None


def _placed(metrics: Metrics, family: Density) -> Metrics:
    if family.task not in metrics.tasks:
        return metrics
    loss, size = metrics.tasks[family.task].metrics[LOSS], metrics.cost.non_embedding_parameters
    needed = family.parameters_of(loss, _score(metrics, family.score_tasks))
    bits = 8 * (metrics.cost.non_embedding_bytes or 0)
    return metrics.model_copy(
        update={
            "effective_parameters": family.parameters(loss),
            "density": needed / size if size else None,
            "bit_density": 16 * needed / bits if bits else None,
        }
    )
