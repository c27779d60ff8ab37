"""The quantized runs of a report, by recipe, and what the laws of low bits make of them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence

from compress.eval.low_bits import BitCurve, LowBits, QuantizedRun, Smaller, fit, published_law
from compress.eval.metrics import Metrics, Report
from compress.eval.reference import LOSS
from compress.passes import Taxon

VARIED = (Taxon.WEIGHT_ONLY, Taxon.QAT)
"""Methods whose options say how many bits a weight takes; all others' options are part of the recipe."""
KEPT_WIDTH = 4.0  # bits per weight of the smaller model that a run is compared with, or nearly


def with_low_bits(report: Report, training_tokens: int | None = None) -> Report:
    """The report with its runs' laws, where a recipe has several runs or the base model's training is known.

    training_tokens: that the base model was trained on.
    """
    quantized = dict(_runs(report))
    groups: dict[str, list[QuantizedRun]] = defaultdict(list)
    for run in quantized.values():
        groups[run.recipe].append(run)
    if training_tokens is None and all(len(runs) == 1 for runs in groups.values()):
        return report.model_copy(update={"low_bits": None})
    curves, without = [], {}
    for recipe, runs in groups.items():
        try:
            curves.append(fit(recipe, runs))
        except ValueError as error:
            without[recipe] = str(error)
    size = report.base.cost.non_embedding_parameters
    published = published_law(size, training_tokens) if size and training_tokens is not None else None
    return report.model_copy(
        update={
            "low_bits": LowBits(
                runs=tuple(quantized.values()), curves=tuple(curves), without=without, parameters=size,
                training_tokens=training_tokens, published=published,
                smaller=_smaller(report, quantized, curves),
            )
        }
    )  # fmt: skip


def _runs(report: Report) -> Iterator[tuple[str, QuantizedRun]]:
    """The points that were only quantized, by label: what else loses, loses with all bits too."""
    for point in report.points:
        found = _recipe(point.passes)
        bits, told = point.cost.compressed_bits_per_weight, point.fidelity
        if found is None or not bits or told is None or not math.isfinite(told.mean_delta_nll):
            continue
        loss, error = told.mean_delta_nll, told.delta_nll_stderr
        yield point.label, QuantizedRun(label=point.label, recipe=found, bits=bits, loss=loss, error=error)


def _recipe(passes: Sequence[str]) -> str | None:
    """Passes as a recipe; None where one of them is no quantizer, or none sets the weights' bits."""
    from compress import methods

    known, steps, varied = methods.available(), [], False
    for step in passes:
        key = step.partition(":")[0]
        taxon = known[key].taxon if key in known else None
        if taxon not in (*VARIED, Taxon.WEIGHT_ACTIVATION):
            return None
        varied |= taxon in VARIED
        steps.append(key if taxon in VARIED else step)
    return " > ".join(steps) if varied else None


def _smaller(report: Report, runs: dict[str, QuantizedRun], curves: Sequence[BitCurve]) -> Smaller | None:
    """The best run of fewest bits against a smaller dense model of the reference family in as many bits, kept at the width of
    another run of that recipe. All but that model's own loss was measured, and its size lies within the family's."""
    family, size = report.density, report.base.cost.non_embedding_parameters
    if family is None or not size or family.task not in report.base.tasks:
        return None
    points = {point.label: point for point in report.points}

    def loss(metrics: Metrics) -> float:
        return metrics.tasks[family.task].metrics[LOSS] if family.task in metrics.tasks else math.inf

    found = []
    for curve in curves:
        lowest, *others = (runs[label] for label in curve.labels)
        fellow = min(others, key=lambda run: abs(run.bits - KEPT_WIDTH))
        parameters = size * lowest.bits / fellow.bits
        if family.members[0].parameters <= parameters <= family.members[-1].parameters:
            added = loss(points[fellow.label]) - loss(report.base)
            found.append(
                Smaller(
                    label=lowest.label, parameters=parameters, bits=fellow.bits, loss=family.loss(parameters) + added,
                    run_loss=loss(points[lowest.label]),
                )
            )  # fmt: skip
    return min(found, key=lambda one: one.run_loss, default=None)
