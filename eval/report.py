"""One HTML file that shows a whole comparison, readable anywhere: no network, no script it depends on, light and dark.

What users name (models, labels, passes, tasks) goes through the template's autoescaping; only the chart, which
matplotlib has escaped already, is inserted as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from compress.eval.chart import chart, format_bytes, protocol_line
from compress.eval.files import write_whole
from compress.eval.harness import TaskScore
from compress.eval.metrics import Metrics, Report
from compress.eval.taxonomy import style_of

MISSING = "–"


class Cell(NamedTuple):
    """A table cell: what is shown, what it sorts by (None last), and what a pointer resting on it reads."""

    text: str
    value: float | str | None = None
    hint: str = ""


class Row(NamedTuple):
    """A model's row; leaf: of the taxonomy, in full; family and color: how that leaf is shown."""

    label: str
    passes: tuple[str, ...]
    leaf: str
    family: str
    color: str
    is_base: bool
    on_front: bool
    cells: list[Cell]


def write_report(report: Report, directory: str | Path, *, layers: Sequence[Mapping[str, Any]] = ()) -> Path:
    """Write ``report.html``, ``metrics.json``, ``chart.svg`` and ``chart.png`` and return the path of the first.

    layers: a row for each compressed layer of a single artifact, such as ``{"name": ..., "error": ..., "bits": ...}``;
    the keys, in order of first appearance, become the columns. Each file is written aside and renamed.
    """
    directory = Path(directory)
    report.save(directory / "metrics.json")
    svg, _ = chart(report, directory / "chart")
    return write_whole(directory / "report.html", _page(report, svg.read_text(encoding="utf-8"), layers))


def _page(report: Report, svg: str, layers: Sequence[Mapping[str, Any]]) -> str:
    from jinja2 import Environment, StrictUndefined

    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    layer_columns = list(dict.fromkeys(key for layer in layers for key in layer))
    return page.from_string(template).render(
        title=report.title,
        summary=protocol_line(report.base),
        headline=list(_headline(report)),
        svg=svg[svg.index("<svg") :],  # the prolog and document type have no place inside HTML
        columns=_columns(report),
        rows=_rows(report),
        layer_columns=layer_columns,
        layers=[[_layer_cell(layer.get(column)) for column in layer_columns] for layer in layers],
        protocol=list(_protocol(report.base)),
        command=report.command,
    )


def _headline(report: Report) -> Iterator[tuple[str, str]]:
    """The numbers that somebody who reads nothing else should see: the smallest model for each of three promises."""
    whole = report.base.cost.bytes_on_disk
    yield "base model", format_bytes(whole)
    best: Metrics | None = None
    for share in (0.99, 0.95, 0.90):
        kept = [point for point in report.points if (point.mean_recovery or 0.0) >= share]
        smallest = min(kept, key=lambda point: point.cost.bytes_on_disk, default=None)
        if smallest is None or smallest is best:
            continue
        best = smallest
        ratio = whole / smallest.cost.bytes_on_disk
        yield f"keeps {_percent(smallest.mean_recovery)}", f"{ratio:.2f}× smaller: {smallest.label}"


def _columns(report: Report) -> list[Cell]:
    """Column heads in the order of :func:`_cells`."""
    tasks = [
        Cell(name, hint=f"{score.primary}, {'higher' if score.higher_is_better else 'lower'} is better")
        for name, score in report.base.tasks.items()
    ]
    return [
        Cell("Kept", hint="mean share of the base model's score kept, ± one standard error of this model's scores"),
        Cell("On disk", hint="sizes of the weight files"),
        Cell("Smaller", hint="bytes of the base / bytes of this model"),
        Cell("Ideal", hint="bytes with zeros as a bitmap and codes packed without padding"),
        Cell("Bits/weight", hint="over the compressed layers, scales and indices included"),
        Cell("Parameters", hint="of the dense model"),
        *tasks,
        Cell("KL", hint="mean KL(base || model) per token, nats; its 99th percentile on hover"),
        Cell("Top-1", hint="share of tokens at which both models rank the same token first"),
        Cell("Perplexity", hint="per token of the held-out windows"),
        Cell("Decode", hint="tokens per second at batch 1"),
        Cell("Prefill", hint="tokens per second of a prompt"),
        Cell("Memory", hint="highest resident set of the process (or allocation on the accelerator) while generating"),
    ]


def _rows(report: Report) -> list[Row]:
    base = report.base.recovered(report.base)
    front = {point.label for point in report.front()}
    rows = []
    for metrics in (base, *report.points):
        style = style_of(metrics.taxon, is_base=metrics is base)
        leaf = "base model" if metrics is base else metrics.taxon or style.name
        cells = list(_cells(metrics, report))
        on_front = metrics.label in front
        look = (leaf, style.name, style.color, metrics is base, on_front)
        told = all(step in metrics.label for step in metrics.passes)  # a label made of the passes needs no repetition
        rows.append(Row(metrics.label, () if told else metrics.passes, *look, cells))
    return rows


def _cells(metrics: Metrics, report: Report) -> Iterator[Cell]:
    cost, fidelity = metrics.cost, metrics.fidelity
    error = None if metrics.label == report.base.label else metrics.recovery_error(report.base)
    yield Cell(_percent(metrics.mean_recovery, error), metrics.mean_recovery)
    yield Cell(format_bytes(cost.bytes_on_disk), cost.bytes_on_disk, f"{cost.bytes_on_disk:,} bytes")
    ratio = report.base.cost.bytes_on_disk / cost.bytes_on_disk
    yield Cell(f"{ratio:.2f}×", ratio)
    yield _number(cost.ideal_bytes, format_bytes)
    yield _number(cost.compressed_bits_per_weight, lambda bits: f"{bits:.2f}")
    yield _number(cost.parameters, _count)
    for name in report.base.tasks:
        yield _task_cell(metrics.tasks.get(name), metrics.recovery.get(name))
    if fidelity is None:
        yield from (Cell(MISSING), Cell(MISSING), Cell(MISSING))
    else:
        yield Cell(f"{fidelity.kl_mean:.4f}", fidelity.kl_mean, f"99 %: {fidelity.kl_p99:.3f}, max: {fidelity.kl_max:.3f}")
        yield Cell(_percent(fidelity.top1_agreement), fidelity.top1_agreement)
        yield Cell(f"{fidelity.perplexity:.2f}", fidelity.perplexity, f"base: {fidelity.base_perplexity:.2f}")
    speed = cost.speed
    yield _number(speed and speed.decode_tokens_per_second, lambda rate: f"{rate:,.1f}/s")
    yield _number(speed and speed.prefill_tokens_per_second, lambda rate: f"{rate:,.0f}/s")
    yield _number(speed and (speed.peak_device_bytes or speed.peak_process_bytes), format_bytes)


def _task_cell(score: TaskScore | None, kept: float | None) -> Cell:
    if score is None:
        return Cell(MISSING)
    error = score.standard_error
    if score.higher_is_better and 0 <= score.value <= 1:
        text = _percent(score.value, error)
    else:
        text = f"{score.value:.3f}" + ("" if error is None else f" ± {error:.3f}")
    hint = f"{score.primary}, {score.n_samples} documents"
    return Cell(text, score.value, hint if kept is None else f"{hint}, {_percent(kept)} of the base kept")


def _number(value: Any, shown) -> Cell:
    return Cell(MISSING) if value is None else Cell(shown(value), value)


def _layer_cell(value: Any) -> Cell:
    if isinstance(value, float):
        return Cell(f"{value:.4g}", value)
    return Cell(MISSING) if value is None else Cell(str(value), value if isinstance(value, int) else str(value))


def _protocol(base: Metrics) -> Iterator[tuple[str, str]]:
    protocol = base.protocol
    yield "base model", base.model
    yield "digest", base.digest
    yield "tasks", ", ".join(f"{name} ({score.primary}, {score.n_samples})" for name, score in base.tasks.items())
    yield "documents per task", "all" if protocol.limit is None else str(protocol.limit)
    yield "examples in the prompt", "as each task says" if protocol.n_shot is None else str(protocol.n_shot)
    yield "held-out text", protocol.data or MISSING
    yield "context", MISSING if protocol.context_length is None else f"{protocol.context_length} tokens"
    yield "computed in", f"{protocol.dtype} on {protocol.device}"
    yield "seed", str(protocol.seed)
    if base.cost.speed is not None:
        speed = base.cost.speed
        yield "speed", f"{speed.new_tokens} new tokens after {speed.prompt_tokens}, {speed.n_threads} threads"
    yield "versions", ", ".join(f"{name} {number}" for name, number in protocol.versions.items()) or MISSING


def _percent(share: float | None, error: float | None = None) -> str:
    if share is None or not math.isfinite(share):
        return MISSING
    return f"{100 * share:.1f} %" if error is None else f"{100 * share:.1f} ± {100 * error:.1f} %"


def _count(number: float) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"
