"""One HTML file that shows a whole comparison, readable anywhere: no network, light, dark and on paper.

The tables are in the page itself; a small script, written out in it, draws the chart, the heat maps and the flips from
embedded data. The page forbids itself everything else: its content policy names that script and that style by their
digests. What users name (models, labels, passes, tasks) goes through the template's autoescaping or :func:`embedded`.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from compress.eval import table
from compress.eval.chart import chart, format_bytes, protocol_line
from compress.eval.files import write_whole
from compress.eval.metrics import Metrics, Report
from compress.eval.payload import embedded, page_payload
from compress.eval.table import MISSING, percent
from compress.eval.taxonomy import BASE, CORES, OTHER, SHAPES, STYLES, Style, style_of
from compress.eval.tree import method_tree

PAGE = Path(__file__).with_name("page")
SCRIPTS = ("page.js", "axes.js", "chart.js", "layers.js", "flips.js", "bits.js", "table.js")
MOST_LAYERS = 1500
"""Rows of the table of layers; above it, only the heat map has them."""


class Row(NamedTuple):
    """A model's row; number: its place in the embedded data; leaf: of the taxonomy, in full."""

    number: int
    label: str
    passes: tuple[str, ...]
    leaf: str
    style: Style
    on_front: bool
    command: str | None


def write_report(report: Report, directory: str | Path, *, layers: Sequence[Mapping[str, Any]] = ()) -> Path:
    """Write ``report.html``, ``metrics.json``, ``chart.svg`` and ``chart.png`` and return the path of the first.

    layers: those of the last point, for a report whose points do not hold them: a row for each compressed layer, such as
    ``{"name": ..., "output_error": ..., "bits": ...}``. Each file is written aside and renamed.
    """
    directory = Path(directory)
    report.save(directory / "metrics.json")
    _, png = chart(report, directory / "chart")
    if layers:
        report = _with_layers(report, layers)
    return write_whole(directory / "report.html", _page(report, png.read_bytes()))


def _with_layers(report: Report, layers: Sequence[Mapping[str, Any]]) -> Report:
    *others, last = report.points or (report.base,)
    if last.layers:
        return report
    last = last.model_copy(update={"layers": tuple(map(dict, layers))})
    return report.model_copy(update={"points": (*others, last)} if report.points else {"base": last})


def _page(report: Report, png: bytes) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    look = {"autoescape": True, "undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    pages = Environment(loader=FileSystemLoader(PAGE), **look)  # type: ignore[arg-type]
    pages.filters["breakable"] = _breakable
    rows = _rows(report)
    styles = [BASE, *STYLES.values(), OTHER]
    css = pages.get_template("report.css").render(styles=styles)
    script = '"use strict";\n' + "\n".join((PAGE / name).read_text(encoding="utf-8") for name in SCRIPTS)
    models = [report.base.recovered(report.base), *report.points]
    layers = [metrics.layers for metrics in models if metrics.layers]
    return pages.get_template("report.html").render(
        title=report.title,
        summary=protocol_line(report.base),
        headline=list(_headline(report)),
        css=css,
        script=script,
        policy=_policy(css, script),
        data=embedded(page_payload(report)),
        png=base64.b64encode(png).decode(),
        symbols=[(style.key, SHAPES[style.marker], CORES[style.core]) for style in styles],
        legend=list(dict.fromkeys(row.style for row in rows)),
        rows=rows,
        quality=table.kept(table.quality, models, report),
        cost=table.kept(table.cost, models, report),
        estimates=table.estimates(models),
        density=report.density,
        dense=table.kept(table.density, models, report) if report.density else None,
        low_bits=report.low_bits,
        bit_table=table.kept(table.low_bits, models, report) if report.low_bits else None,
        bit_rows=_quantized(models, report),
        layers=table.layers(layers[0]) if len(layers) == 1 and len(layers[0]) <= MOST_LAYERS else None,
        has_layers=bool(layers),
        has_flips=any(metrics.flips for metrics in models),
        has_differences=any(metrics.differences for metrics in models),
        tree=method_tree(report),
        places={metrics.label: number for number, metrics in enumerate(models)},
        result=lambda metrics: _result(metrics, report),
        protocol=list(_protocol(report.base)),
        command=report.command,
    )


def _breakable(label: str) -> str:
    """HTML of a label whose lines may end only where one of its words does."""
    from markupsafe import Markup

    return Markup("<wbr>").join(re.split(r"(?<=[,:>=])", label))


def _policy(css: str, script: str) -> str:
    """Nothing may be loaded or run but this page's own style and script, and the picture written out in it."""

    def digest(text: str) -> str:
        return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"

    sources = {"default-src": "'none'", "script-src": digest(script), "style-src": digest(css), "img-src": "data:"}
    sources |= {"base-uri": "'none'", "form-action": "'none'"}
    return "; ".join(f"{name} {value}" for name, value in sources.items())


def _headline(report: Report) -> Iterator[tuple[str, str, str, int]]:
    """What somebody who reads nothing else should see: the smallest model for each of three promises.

    Yields a name, a figure, what it is of, and the place of the model.
    """
    whole = report.base.cost.bytes_on_disk
    yield "base model", format_bytes(whole), report.base.label, 0
    best: Metrics | None = None
    for share in (0.99, 0.95, 0.90):
        held = [point for point in report.points if (point.mean_recovery or 0.0) >= share]
        smallest = min(held, key=lambda point: point.cost.bytes_on_disk, default=None)
        if smallest is None or smallest is best:
            continue
        best = smallest
        figure = f"{whole / smallest.cost.bytes_on_disk:.2f}× smaller"
        yield f"keeps {percent(smallest.mean_recovery)}", figure, smallest.label, report.points.index(smallest) + 1


def _rows(report: Report) -> list[Row]:
    front = {point.label for point in report.front()}
    rows = []
    for number, metrics in enumerate((report.base, *report.points)):
        style = style_of(metrics.taxon, is_base=number == 0)
        leaf = "base model" if number == 0 else metrics.taxon or style.name
        told = all(step in metrics.label for step in metrics.passes)  # a label made of the passes needs no repetition
        passes = () if told else metrics.passes
        rows.append(Row(number, metrics.label, passes, leaf, style, metrics.label in front, metrics.command))
    return rows


def _quantized(models: Sequence[Metrics], report: Report) -> list[int]:
    """Rows of the models that the laws of low bits are about."""
    labels = {run.label for run in report.low_bits.runs} if report.low_bits is not None else set()
    return [number for number, metrics in enumerate(models) if metrics.label in labels]


def _result(metrics: Metrics, report: Report) -> str:
    """What a point reached, in a few words."""
    ratio = f"{report.base.cost.bytes_on_disk / metrics.cost.bytes_on_disk:.2f}× smaller"
    if metrics.mean_recovery is not None:
        return f"{percent(metrics.mean_recovery)} kept, {ratio}"
    return ratio if metrics.fidelity is None else f"KL {metrics.fidelity.kl_mean:.3g}, {ratio}"


def _protocol(base: Metrics) -> Iterator[tuple[str, str]]:
    protocol = base.protocol
    yield "base model", base.model
    yield "digest", base.digest
    yield "tasks", ", ".join(f"{name} ({score.primary}, {score.n_samples})" for name, score in base.tasks.items()) or MISSING
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
