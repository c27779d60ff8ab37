"""The chart of a report: bytes on disk against accuracy kept.

Drawn with matplotlib's object interface, so that nothing global changes, and without dates or random ids, so that the
same report gives the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from compress.eval.files import write_whole
from compress.eval.labels import Box, place_labels
from compress.eval.metrics import Metrics, Report
from compress.eval.taxonomy import STYLES, style_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, FAINT = "#222222", "#666666", "#D9D9D9"
WIDTH, HEIGHT, DOTS_PER_INCH = 10.0, 6.6, 160
LONGEST_LABEL = 32
CURVATURE = 0.12
Line = list[tuple[float, float]]
TICK_MANTISSAS = ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 6, 8), tuple(1 + step / 5 for step in range(45)))


class Placed(NamedTuple):
    """A model at its place: bytes, recovery and its standard error, both in per cent."""

    metrics: Metrics
    size: float
    kept: float
    error: float | None
    is_base: bool


def chart(report: Report, path_stem: str | Path) -> list[Path]:
    """Draw a report as ``<path_stem>.svg`` and ``<path_stem>.png``; returns the two paths.

    A model whose recovery is unknown or infinite is left out: there is no place for it. Drawing needs no display.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with _style():
        figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DOTS_PER_INCH)
        FigureCanvasAgg(figure)
        axes = figure.add_axes((0.075, 0.215, 0.905, 0.615))
        placed = _placed(report)
        _limits(axes, placed)
        _decorate(figure, axes, report, placed)
        lines = [*_draw_front(axes, report), *_draw_lineage(axes, placed)]
        _draw_points(axes, placed)
        _draw_labels(axes, placed, lines)
        _draw_legend(figure, axes, placed)
        written = []
        for kind, metadata in (("svg", {"Date": None, "Creator": None}), ("png", {"Software": None})):
            buffer = BytesIO()
            figure.savefig(buffer, format=kind, metadata=metadata)
            written.append(write_whole(Path(f"{path_stem}.{kind}"), buffer.getvalue()))
    return written


@contextmanager
def _style() -> Iterator[None]:
    import matplotlib

    look: dict[Any, Any] = {
        "svg.hashsalt": "compress",
        "font.family": ["DejaVu Sans"],
        "font.size": 9.0,
        "text.color": INK,
        "axes.edgecolor": MUTED,
        "axes.labelcolor": INK,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "text.parse_math": False,  # a "$" in somebody's label is a dollar sign
        "path.simplify": False,
    }
    with matplotlib.rc_context(look):
        yield


def _placed(report: Report) -> list[Placed]:
    base = report.base.recovered(report.base)
    placed = []
    for metrics in (base, *report.points):
        kept = metrics.mean_recovery
        if kept is None or not math.isfinite(kept):
            continue
        # The base is what is compared with: 100 % by definition.
        error = None if metrics is base else metrics.recovery_error(report.base)
        scaled = None if error is None else 100 * error
        placed.append(Placed(metrics, metrics.cost.bytes_on_disk, 100 * kept, scaled, metrics is base))
    return placed


def _limits(axes: Axes, placed: Sequence[Placed]) -> None:
    axes.set_xscale("log")
    sizes = [point.size for point in placed] or [1e6]
    padding = max(0.09 * math.log10(max(sizes) / min(sizes)), 0.1)
    axes.set_xlim(min(sizes) * 10**-padding, max(sizes) * 10**padding)
    lows = [point.kept - (point.error or 0) for point in placed] or [0.0]
    highs = [point.kept + (point.error or 0) for point in placed] or [100.0]
    margin = 0.09 * max(max(highs) - min(lows), 2.0)
    axes.set_ylim(min(lows) - margin, max(highs) + margin)


def _decorate(figure: Figure, axes: Axes, report: Report, placed: Sequence[Placed]) -> None:
    title = figure.text(0.075, 0.955, _shortened(report.title, 80), fontsize=14, fontweight="bold", va="center")
    subtitle = _shortened(protocol_line(report.base), 130)
    subtitle = figure.text(0.075, 0.913, subtitle, fontsize=9, color=MUTED, va="center")
    # Named, so that a page which has a heading of its own can hide them.
    title.set_gid("chart-title")
    subtitle.set_gid("chart-subtitle")
    axes.grid(color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.axhline(100, color=MUTED, linewidth=0.8, linestyle=(0, (2, 3)), zorder=1)
    axes.tick_params(which="both", length=3)
    left, right = axes.get_xlim()
    ticks = size_ticks(left, right)
    axes.set_xticks(ticks, [format_bytes(tick) for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("bytes on disk, log scale (smaller is further left)")
    figure.text(0.075, 0.868, _recovery_label(report), fontsize=9, va="center")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")
    whole = float(report.base.cost.bytes_on_disk)
    ratios = [ratio for ratio in (1, 1.5, 2, 3, 4, 6, 8, 12, 16, 32, 64) if left <= whole / ratio <= right]
    if whole > 0 and len(placed) > 1:
        above = axes.secondary_xaxis("top", functions=(lambda size: size, lambda size: size))
        above.set_xticks([whole / ratio for ratio in ratios], [f"{ratio:g}×" for ratio in ratios])
        above.set_xticks([], minor=True)
        above.spines["top"].set_visible(False)
        above.tick_params(length=0, labelsize=8, labelcolor=MUTED)
        figure.text(0.98, 0.868, "times smaller than the base", fontsize=8, color=MUTED, ha="right", va="center")


def _recovery_label(report: Report) -> str:
    scores = report.base.tasks
    better = [score for score in scores.values() if score.higher_is_better]
    names = sorted({score.primary.partition(",")[0] for score in better or scores.values()})
    n_tasks = len(better or scores)
    mean = f"mean of {n_tasks} tasks" if n_tasks > 1 else "one task"
    return f"{'accuracy' if better else 'quality'} kept, % of base ({', '.join(names) or 'no task'}; {mean})"


def _draw_front(axes: Axes, report: Report) -> list[Line]:
    """Returns what it drew, in pixels, for the labels to keep off."""
    front = report.front()
    if len(front) < 2:
        return []
    sizes = [point.cost.bytes_on_disk for point in front]
    kept = [100 * (point.mean_recovery or 0.0) for point in front]
    axes.plot(sizes, kept, color="#9DB8C9", linewidth=5, alpha=0.45, solid_capstyle="round", zorder=1.5)
    return [[tuple(corner) for corner in axes.transData.transform(list(zip(sizes, kept, strict=True)))]]


def _draw_lineage(axes: Axes, placed: Sequence[Placed]) -> list[Line]:
    """Arrows between points only: every first pass starts at the base, and saying so would cover the chart.

    Returns what it drew, in pixels, for the labels to keep off.
    """
    from matplotlib.patches import FancyArrowPatch

    lines: list[Line] = []
    by_label = {point.metrics.label: point for point in placed if not point.is_base}
    for child in placed:
        parent = by_label.get(child.metrics.parent or "")
        if parent is None or parent is child:
            continue
        arrow = FancyArrowPatch(
            (parent.size, parent.kept),
            (child.size, child.kept),
            arrowstyle="-|>",
            mutation_scale=8,
            shrinkA=6,
            shrinkB=7,
            connectionstyle=f"arc3,rad={CURVATURE}",
            color="#9A9A9A",
            linewidth=0.8,
            zorder=2,
        )
        axes.add_patch(arrow)
        lines.append(_arc(*axes.transData.transform([(parent.size, parent.kept), (child.size, child.kept)])))
    return lines


def _arc(start: Sequence[float], end: Sequence[float]) -> Line:
    """The corners of an approximation to matplotlib's "arc3" connection, a quadratic Bezier curve."""
    (x0, y0), (x1, y1) = start, end
    middle = ((x0 + x1) / 2 + CURVATURE * (y1 - y0), (y0 + y1) / 2 - CURVATURE * (x1 - x0))
    corners = []
    for step in range(13):
        share = step / 12
        weights = ((1 - share) ** 2, 2 * share * (1 - share), share**2)
        corners.append(
            (
                float(weights[0] * x0 + weights[1] * middle[0] + weights[2] * x1),
                float(weights[0] * y0 + weights[1] * middle[1] + weights[2] * y1),
            )
        )
    return corners


def _draw_points(axes: Axes, placed: Sequence[Placed]) -> None:
    for point in placed:
        style = style_of(point.metrics.taxon, is_base=point.is_base)
        if point.error:
            axes.errorbar(point.size, point.kept, yerr=point.error, color=style.color, alpha=0.4, linewidth=1.2, zorder=2.5)
        if len(point.metrics.passes) > 1:
            axes.plot(
                point.size,
                point.kept,
                style.marker,
                markersize=12,
                markerfacecolor="none",
                markeredgecolor=style.color,
                markeredgewidth=1.2,
                zorder=3,
            )
        axes.plot(
            point.size,
            point.kept,
            style.marker,
            markersize=15 if point.is_base else 7.5,
            color=style.color,
            markeredgecolor="white",
            markeredgewidth=0.8,
            zorder=4,
        )
        if style.core:
            axes.plot(point.size, point.kept, style.core, markersize=4.5, color="white", markeredgewidth=1.2, zorder=4.5)


def _draw_labels(axes: Axes, placed: Sequence[Placed], lines: Sequence[Line]) -> None:
    from matplotlib.patheffects import withStroke

    if not placed:
        axes.text(0.5, 0.5, "no model has a task score", transform=axes.transAxes, ha="center", color=MUTED)
        return
    renderer = axes.figure.canvas.get_renderer()  # pyright: ignore[reportAttributeAccessIssue]
    texts = short_labels([point.metrics for point in placed])
    halo = [withStroke(linewidth=2.5, foreground="white")]
    # Placed in inches: each format draws at a number of dots per inch of its own.
    inches = axes.figure.dpi_scale_trans
    drawn = [axes.text(0, 0, text, fontsize=8, transform=inches, path_effects=halo, zorder=5) for text in texts]
    extents = [text.get_window_extent(renderer) for text in drawn]
    anchors = [tuple(axes.transData.transform((point.size, point.kept))) for point in placed]
    unit = DOTS_PER_INCH / 72
    window = axes.get_window_extent(renderer)
    bounds = Box(window.x0, window.y0, window.x1, window.y1)
    obstacles = _obstacles(axes, placed, lines, unit)
    sizes = [(extent.width + 3 * unit, extent.height + 2 * unit) for extent in extents]
    boxes = place_labels(anchors, sizes, bounds, obstacles, gap=8 * unit)
    for text, box, anchor, extent in zip(drawn, boxes, anchors, extents, strict=True):
        left, baseline = box.left + 1.5 * unit, box.bottom + unit - extent.y0
        text.set_position((left / DOTS_PER_INCH, baseline / DOTS_PER_INCH))
        _leader(axes, anchor, box, unit)


def _obstacles(axes: Axes, placed: Sequence[Placed], lines: Sequence[Line], unit: float) -> list[Box]:
    """Boxes, in pixels, over everything that is drawn but the labels."""
    boxes = []
    for point in placed:
        (x, low), (_, middle), (_, high) = axes.transData.transform(
            [(point.size, point.kept + error) for error in (-(point.error or 0.0), 0.0, point.error or 0.0)]
        )
        boxes.append(_around((x, middle), 6.5 * unit))
        boxes.append(Box(x - unit, low, x + unit, high))
    for line in lines:
        for (x0, y0), (x1, y1) in pairwise(line):
            n_pieces = max(1, math.ceil(math.hypot(x1 - x0, y1 - y0) / (8 * unit)))
            for piece in range(n_pieces + 1):
                share = piece / n_pieces
                boxes.append(_around((x0 + share * (x1 - x0), y0 + share * (y1 - y0)), 2 * unit))
    return boxes


def _leader(axes: Axes, anchor: tuple[float, float], box: Box, unit: float) -> None:
    """A hair line from a point to a label that had to move away from it."""
    from matplotlib.lines import Line2D

    x = min(max(anchor[0], box.left), box.right)
    y = min(max(anchor[1], box.bottom), box.top)
    distance = math.hypot(x - anchor[0], y - anchor[1])
    if distance < 13 * unit:
        return
    start = 6.5 * unit / distance
    xs = [(anchor[0] + (x - anchor[0]) * start) / DOTS_PER_INCH, x / DOTS_PER_INCH]
    ys = [(anchor[1] + (y - anchor[1]) * start) / DOTS_PER_INCH, y / DOTS_PER_INCH]
    inches = axes.figure.dpi_scale_trans
    axes.add_artist(Line2D(xs, ys, color=MUTED, linewidth=0.5, alpha=0.7, zorder=2.2, transform=inches))


def _draw_legend(figure: Figure, axes: Axes, placed: Sequence[Placed]) -> None:
    from matplotlib.legend_handler import HandlerTuple
    from matplotlib.lines import Line2D

    present = {point.metrics.taxon for point in placed if not point.is_base}
    ordered = [taxon for taxon in STYLES if taxon in present] + sorted(str(t) for t in present if t not in STYLES)
    styles = list(dict.fromkeys(style_of(taxon) for taxon in ordered))

    def handle(marker: str, color: str, name: str, size: float = 7.5, **more) -> Line2D:
        return Line2D([], [], linestyle="none", marker=marker, color=color, markersize=size, label=name, **more)

    handles: list[Any] = [handle("*", INK, "base model", 11)] if any(point.is_base for point in placed) else []
    for style in styles:
        core = handle(style.core or "none", "white", "", 4.5, markeredgewidth=1.2)
        handles.append((handle(style.marker, style.color, style.name), core))
    if any(len(point.metrics.passes) > 1 for point in placed):
        ring = handle("o", MUTED, "ringed: a chain, in its last pass's colour", 10, markerfacecolor="none")
        handles.append(ring)
    if len(placed) > 1:
        handles.append(Line2D([], [], color="#9DB8C9", linewidth=5, alpha=0.6, label="Pareto front"))
    if any(point.error for point in placed):
        handles.append(Line2D([], [], color=MUTED, alpha=0.6, linewidth=1.2, marker="|", label="± 1 standard error"))
    if not handles:
        return
    figure.legend(
        handles=handles,
        labels=[(one[0] if isinstance(one, tuple) else one).get_label() for one in handles],
        handler_map={tuple: HandlerTuple(ndivide=1, pad=0)},
        loc="upper center",
        bbox_to_anchor=(0.525, 0.145),
        ncols=4,
        frameon=False,
        fontsize=8.5,
        columnspacing=2.2,
        handletextpad=0.6,
        labelspacing=0.5,
    )


def protocol_line(base: Metrics) -> str:
    """The tasks and settings of a measurement in one line."""
    protocol = base.protocol
    parts = [", ".join(base.tasks) or "no tasks"]
    parts.append("all documents" if protocol.limit is None else f"{protocol.limit} documents a task")
    if protocol.n_shot is not None:
        parts.append(f"{protocol.n_shot}-shot")
    if protocol.context_length is not None:
        parts.append(f"context {protocol.context_length}")
    return "  ·  ".join([*parts, protocol.dtype, protocol.device, f"seed {protocol.seed}"])


def size_ticks(smallest: float, largest: float) -> list[float]:
    """Round numbers of bytes between two sizes: at least four where that can be had, and never more than about ten."""
    decades = range(math.floor(math.log10(smallest)), math.ceil(math.log10(largest)) + 1)
    found: list[float] = []
    for mantissas in TICK_MANTISSAS:
        ticks = [mantissa * 10.0**decade for decade in decades for mantissa in mantissas]
        ticks = [tick for tick in ticks if smallest <= tick <= largest]
        if len(ticks) > 10 and found:
            break
        found = ticks
        if len(found) >= 4:
            break
    return found


def format_bytes(n_bytes: float) -> str:
    """Bytes to three figures in decimal units: 1 MB is a million bytes."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= 0.9995 * size:
            return f"{n_bytes / size:.3g} {unit}"
    return f"{n_bytes:.0f} B"


def _around(center: tuple[float, float], radius: float) -> Box:
    return Box(center[0] - radius, center[1] - radius, center[0] + radius, center[1] + radius)


def short_labels(models: Sequence[Metrics]) -> list[str]:
    """What to write beside the points: labels too long for that become the names of their passes, if no two are alike."""
    names = [" > ".join(step.partition(":")[0] for step in metrics.passes) for metrics in models]
    found = []
    for metrics, name in zip(models, names, strict=True):
        is_told = metrics.passes and all(step in metrics.label for step in metrics.passes) and names.count(name) == 1
        label = name if is_told and len(metrics.label) > LONGEST_LABEL else metrics.label
        found.append(_shortened(label, LONGEST_LABEL))
    return found


def _shortened(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"
