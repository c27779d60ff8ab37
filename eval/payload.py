"""What the page's script draws from: every point's coordinates, its layers and its flips, as small and safe JSON."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from compress.eval import table
from compress.eval.chart import short_labels
from compress.eval.low_bits import FITTED, RUINED, WORTH, BitLaw
from compress.eval.metrics import Metrics, Report
from compress.eval.taxonomy import style_of

FLIPS_BUDGET = 900_000
"""Characters that all examples may take; beyond it fewer are shown of each kind, the same number of every point."""
CORNERS = 40  # between the ends of a law's curve
UNSAFE = {ord(sign): f"\\u{ord(sign):04x}" for sign in "<>&\u2028\u2029"}
BLOCK = re.compile(r"(?:^|\.)(\d+)\.")

Axis = dict[str, Any]


def embedded(payload: Mapping[str, Any]) -> str:
    """JSON that cannot end the ``script`` element it stands in, nor begin another. Infinities and NaN become null."""
    return json.dumps(_finite(payload), separators=(",", ":"), ensure_ascii=False, allow_nan=False).translate(UNSAFE)


def page_payload(report: Report) -> dict[str, Any]:
    """The page's data; points are known by their place, the base being 0."""
    models = [report.base.recovered(report.base), *report.points]
    x_axes, y_axes = _x_axes(report), _y_axes(report)
    shorts = short_labels(models)
    numbers = {metrics.label: number for number, metrics in enumerate(models)}
    points = []
    for number, metrics in enumerate(models):
        points.append(
            {
                "label": metrics.label,
                "short": shorts[number],
                "leaf": style_of(metrics.taxon, is_base=number == 0).key,
                "chain": len(metrics.passes) > 1,
                "parent": numbers.get(metrics.parent or "") or None,  # every first pass starts at the base
                "x": [axis["read"](metrics) for axis in x_axes],
                "y": [axis["read"](metrics) for axis in y_axes],
            }
        )
    measured = [_described(x_axes, points, "x"), _described(y_axes, points, "y")]
    return {
        "points": points,
        "x": measured[0],
        "y": measured[1],
        "layers": {number: layer_grid(metrics.layers) for number, metrics in enumerate(models) if metrics.layers},
        "bits": low_bits(report, models, points) if report.low_bits is not None else None,
        **flip_examples(models),
    }


def _described(axes: Sequence[Axis], points: Sequence[Mapping[str, Any]], side: str) -> list[Axis]:
    """The axes that have something to show; position: where a point's values of it lie."""

    def shown(position: int) -> bool:
        values = [point[side][position] for point in points]
        return any((value[0] if isinstance(value, list) else value) is not None for value in values)

    described = [{key: value for key, value in axis.items() if key != "read"} for axis in axes]
    return [axis | {"position": position} for position, axis in enumerate(described) if shown(position)]


def _axis(name: str, unit: str, read: Any, **more: Any) -> Axis:
    return {"name": name, "unit": unit, "read": read, "log": False, **more}


def _x_axes(report: Report) -> list[Axis]:
    """Costs: smaller is further left. unit: how the script writes the numbers."""

    def ideal(metrics: Metrics) -> float | None:
        return metrics.cost.weight_bytes if metrics.label == report.base.label else metrics.cost.ideal_bytes

    def bits(metrics: Metrics) -> float | None:
        cost = metrics.cost
        if metrics.label == report.base.label and cost.parameters:
            return 8 * cost.weight_bytes / cost.parameters
        return cost.compressed_bits_per_weight

    def latency(tokens_per_second: float | None) -> float | None:
        return 1000 / tokens_per_second if tokens_per_second else None

    def estimate(device: str) -> Any:
        def read(metrics: Metrics) -> float | None:
            found = [one for one in metrics.cost.estimates if one.device == device]
            return latency(found[0].decode_tokens_per_second) if found else None

        return read

    axes = [
        _axis("bytes on disk", "bytes", lambda metrics: metrics.cost.bytes_on_disk, log=True),
        _axis("ideal bytes", "bytes", ideal, log=True),
        _axis("resident weight memory", "bytes", lambda metrics: _speed(metrics, "resident_weight_bytes"), log=True),
        _axis("decode latency per token", "ms", lambda metrics: latency(_speed(metrics, "decode_tokens_per_second"))),
        _axis("bits per weight of the compressed layers", "bits", bits),
    ]
    devices = dict.fromkeys(one.device for metrics in (report.base, *report.points) for one in metrics.cost.estimates)
    return axes + [
        _axis(f"decode latency per token, {name} (estimate)", "ms", estimate(name), log=True, estimate=True) for name in devices
    ]


def _speed(metrics: Metrics, name: str) -> float | None:
    return getattr(metrics.cost.speed, name, None)


def _y_axes(report: Report) -> list[Axis]:
    """Qualities, each read as [value, standard error]; better: "higher" or "lower"."""

    def kept(metrics: Metrics) -> list[float | None]:
        error = None if metrics.label == report.base.label else metrics.recovery_error(report.base)
        return [metrics.mean_recovery, error]

    def task(name: str, metric: str) -> Any:
        def read(metrics: Metrics) -> list[float | None]:
            score = metrics.tasks.get(name)
            return [None, None] if score is None else [score.metrics.get(metric), score.stderr.get(metric)]

        return read

    def fidelity(field: str, error: str = "") -> Any:
        return lambda metrics: [getattr(metrics.fidelity, field, None), getattr(metrics.fidelity, error, None) if error else None]

    def bits_per_byte(metrics: Metrics) -> list[float | None]:
        fidelities = [point.fidelity for point in report.points if point.fidelity]
        if metrics.label == report.base.label and fidelities:
            return [fidelities[0].base_bits_per_byte, None]
        return fidelity("bits_per_byte")(metrics)

    axes = [_axis("accuracy kept", "share", kept, better="higher")]
    for name, score in report.base.tasks.items():
        is_share = score.higher_is_better and 0 <= score.value <= 1
        better = "higher" if score.higher_is_better else "lower"
        metric = score.primary.partition(",")[0].replace("_", " ")
        axes.append(_axis(f"{name}: {metric}", "share" if is_share else "number", task(name, score.primary), better=better))
    return [
        *axes,
        _axis("bits per byte of held-out text", "number", bits_per_byte, better="lower"),
        _axis("KL to the base, nats per token", "number", fidelity("kl_mean", "kl_stderr"), better="lower", log=True),
        _axis("top-1 agreement with the base", "share", fidelity("top1_agreement"), better="higher"),
    ]


def low_bits(report: Report, models: Sequence[Metrics], points: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """worth: the loss that low bits may cost. runs: those that were quantized. curves: corners of their recipes' laws and of
    the published one, each over the bits that it was fitted on. rows: what the table says of each run."""
    found = report.low_bits
    assert found is not None
    places = {metrics.label: number for number, metrics in enumerate(models)}
    told = table.kept(table.low_bits, models, report)
    curves: list[dict[str, Any]] = []
    for curve in found.curves:
        leaf = points[places[curve.labels[0]]]["leaf"]
        curves.append({"name": curve.recipe, "leaf": leaf, "corners": _corners(curve, *found.widths(curve))})
    if found.published is not None:
        curves.append({"name": "published law", "leaf": None, "corners": _corners(found.published, *FITTED["bits"])})
    return {
        "worth": WORTH,
        "runs": [{"number": places[run.label]} | run.model_dump(include={"bits", "loss", "error"}) for run in found.runs],
        "curves": [curve for curve in curves if curve["corners"]],
        "rows": {
            number: [(head, cell.text) for (head, _), cell in zip(told.columns, told.rows[number], strict=True)]
            for number in (places[run.label] for run in found.runs)
        },
    }


def _corners(law: BitLaw, low: float, high: float) -> list[tuple[float, float]]:
    """Of a law's curve, where it says something; bits apart by equal ratios."""
    bits = [low * (high / low) ** (step / CORNERS) for step in range(CORNERS + 1)]
    return [(each, law.loss(each)) for each in bits if law.loss(each) <= RUINED]


def layer_grid(layers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Layers in a grid of kinds by blocks.

    Returns blocks and kinds in order, and fields: of each key a list with a value for each cell, kind by kind, or one
    value where all cells agree. Layers that differ in a further number (experts) share a cell: the mean of numbers, and
    "several" where texts differ.
    """
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for layer in layers:
        groups[_place(str(layer.get("name", "")))].append(layer)
    kinds = list(dict.fromkeys(kind for kind, _ in groups))
    blocks = sorted({block for _, block in groups}, key=lambda block: (not block, int(block or 0)))
    keys = [key for key in dict.fromkeys(key for layer in layers for key in layer) if key != "name"]
    fields: dict[str, Any] = {}
    for key in keys:
        cells = [_pooled([layer.get(key) for layer in groups.get((kind, block), ())]) for kind in kinds for block in blocks]
        same = all(cell == cells[0] for cell in cells)
        if not same or cells[0] is not None:
            fields[key] = cells[0] if same else cells
    sizes = [len(groups.get((kind, block), ())) for kind in kinds for block in blocks]
    return {"blocks": blocks, "kinds": kinds, "n": sizes, "fields": fields}


def _place(name: str) -> tuple[str, str]:
    """(kind, block) of a layer: its first number is the block, further ones are experts."""
    match = BLOCK.search(name)
    if match is None:
        return name, ""
    return BLOCK.sub(lambda other: other[0].replace(other[1], "*"), name[match.end() :]), match[1]


def _pooled(values: Sequence[Any]) -> Any:
    known = [value for value in values if value is not None]
    if all(isinstance(value, (int, float)) and math.isfinite(value) for value in known):
        return float(f"{math.fsum(known) / len(known):.4g}") if known else None
    texts = {" → ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value) for value in known}
    return texts.pop() if len(texts) == 1 else "several"


def flip_examples(models: Sequence[Metrics]) -> dict[str, Any]:
    """documents: task -> index -> [prompt, choices, gold], shared by the points; flips: point -> task -> counts, p-value and
    examples [index, is_negative, before, after]; n_examples: of a kind, for each point and task."""
    found = [flips.examples for metrics in models for flips in metrics.flips.values()]
    n_examples = max((sum(one.kind == kind for one in each) for each in found for kind in ("negative", "positive")), default=0)
    while True:
        found = _flips(models, n_examples)
        if n_examples <= 1 or len(json.dumps(found, ensure_ascii=False)) <= FLIPS_BUDGET:
            return found | {"n_examples": n_examples}
        n_examples -= max(1, n_examples // 4)


def _flips(models: Sequence[Metrics], n_examples: int) -> dict[str, Any]:
    documents: dict[str, dict[int, list[Any]]] = defaultdict(dict)
    runs: dict[int, dict[str, Any]] = {}
    for number, metrics in enumerate(models):
        for task, flips in metrics.flips.items():
            examples = []
            for kind in ("negative", "positive"):
                for example in [one for one in flips.examples if one.kind == kind][:n_examples]:
                    documents[task][example.index] = [example.prompt, list(example.choices), example.gold]
                    examples.append([example.index, int(kind == "negative"), example.before, example.after])
            runs.setdefault(number, {})[task] = [flips.n, flips.negative, flips.positive, flips.p_value, examples]
    return {"documents": documents, "flips": runs}


def _finite(value: Any) -> Any:
    """Floats to six figures, and None for those that are no numbers."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value
