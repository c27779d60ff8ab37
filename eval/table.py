"""The tables of the page: what each column is called, what it means and how a model's value of it is written."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from compress.amounts import format_count
from compress.eval.chart import format_bytes
from compress.eval.low_bits import QuantizedRun
from compress.eval.metrics import Metrics, Report
from compress.eval.uncertainty import Difference

MISSING = "–"


class Cell(NamedTuple):
    """A table cell: what is shown, what it sorts by (None last), what a pointer resting on it reads, and whether it cannot
    be told from the base's."""

    text: str
    value: float | str | None = None
    hint: str = ""
    same: bool = False


class Column(NamedTuple):
    """head: as shown. hint: what it means."""

    head: str
    hint: str
    read: Callable[[Metrics, Report], Cell]


class Table(NamedTuple):
    """columns: (head, hint). rows: the cells of each model."""

    columns: list[tuple[str, str]]
    rows: list[list[Cell]]


def kept(make: Callable[[Report], Iterator[Column]], models: Sequence[Metrics], report: Report) -> Table:
    """The columns in which some model has a value."""
    columns = list(make(report))
    rows = [[column.read(metrics, report) for column in columns] for metrics in models]
    shown = [index for index in range(len(columns)) if any(row[index].value is not None for row in rows)]
    heads = [(columns[index].head, columns[index].hint) for index in shown]
    return Table(heads, [[row[index] for index in shown] for row in rows])


def quality(report: Report) -> Iterator[Column]:
    yield Column("Kept", "mean share of the base model's score kept, ± one standard error of this model's scores", _kept)
    yield Column("On disk", "sizes of the weight files", _on_disk)
    yield Column("Smaller", "bytes of the base / bytes of this model", _smaller)
    bits = "over the compressed layers, scales and indices included"
    yield Column("Bits/weight", bits, _number(lambda metrics: metrics.cost.compressed_bits_per_weight, "{:.2f}".format))
    for name, score in report.base.tasks.items():
        hint = f"{score.primary}, {'higher' if score.higher_is_better else 'lower'} is better"
        yield Column(name, hint, _task(name))
    yield Column("Flips", "answers that went from right to wrong / from wrong to right, all tasks", _flips)
    hint = "expected calibration error: how far confidence and accuracy lie apart, mean over tasks, points of 100"
    yield Column("ECE", hint, _calibration)
    yield Column("Bits known", "of the synthetic biographies", _number(lambda one: one.knowledge_bits, "{:,.0f}".format))
    hint = "mean KL(base || model) per token, nats; its 99th percentile on hover"
    yield Column("KL", hint, _divergence)
    hint = "share of tokens at which both models rank the same token first"
    yield Column("Top-1", hint, _number(lambda one: one.fidelity and one.fidelity.top1_agreement, percent))
    yield Column("Bits/byte", "of the held-out windows", _bits_per_byte)
    yield Column("Perplexity", "per token of the held-out windows", _perplexity)
    yield Column("Decode", "tokens per second at batch 1", _number(_speed("decode_tokens_per_second"), _rate))


def cost(report: Report) -> Iterator[Column]:
    yield Column("On disk", "sizes of the weight files", _on_disk)
    hint = "bytes with zeros as a bitmap and codes packed without padding"
    yield Column("Ideal", hint, _number(lambda one: one.cost.ideal_bytes, format_bytes))
    yield Column("Parameters", "of the dense model", _number(lambda one: one.cost.parameters, format_count))
    yield Column("Active", "parameters that one token meets", _number(lambda one: one.cost.active_parameters, format_count))
    yield Column("Load", "seconds to open the model", _number(lambda one: one.cost.load_seconds, "{:.2f} s".format))
    hint = "parameters and buffers as they lie in memory"
    yield Column("Weights in memory", hint, _number(_speed("resident_weight_bytes"), format_bytes))
    hint = "highest resident set of the process (or allocation on the accelerator) while generating"
    yield Column("Peak memory", hint, _number(_peak, format_bytes))
    hint = "key-value cache of one sequence in all layers"
    yield Column("KV/token", hint, _number(lambda one: one.cost.kv_cache_bytes_per_token, format_bytes))
    for head, batch, prefix in (("", 1, ""), (" ×8", 8, "batch_8_")):
        hint = f"tokens per second of prompts, batch {batch}, median of repeats"
        yield Column(f"Prefill{head}", hint, _number(_speed(f"{prefix}prefill_tokens_per_second"), _rate))
        hint = f"new tokens per second, batch {batch}, median of repeats"
        yield Column(f"Decode{head}", hint, _number(_speed(f"{prefix}decode_tokens_per_second"), _rate))


def density(report: Report) -> Iterator[Column]:
    hint = "of the dense member of the family that would do as well"
    yield Column("Effective parameters", hint, _number(lambda one: one.effective_parameters, format_count))
    yield Column("Density", "effective / own parameters", _number(lambda one: one.density, "{:.3f}".format))
    hint = "effective parameters at 16 bits / own bits"
    yield Column("Bit density", hint, _number(lambda one: one.bit_density, "{:.3f}".format))


def low_bits(report: Report) -> Iterator[Column]:
    found = report.low_bits
    assert found is not None
    runs = {run.label: run for run in found.runs}

    def column(head: str, hint: str, read: Callable[[QuantizedRun], float | None]) -> Column:
        def cell(metrics: Metrics, report: Report) -> Cell:
            value = read(runs[metrics.label]) if metrics.label in runs else None
            return Cell(MISSING) if value is None else Cell(f"{value:.3g}", value)

        return Column(head, hint, cell)

    def of_curve(run: QuantizedRun) -> float | None:
        curve = found.curve_of(run)
        return curve.loss(run.bits) if curve is not None else None

    yield column("Bits/weight", "over the compressed layers, scales and indices included", lambda run: run.bits)
    yield column("Loss", "above the base model's, nats per token", lambda run: run.loss)
    yield column("± error", "standard error of that loss, tokens taken as independent", lambda run: run.error)
    yield column("Law of its recipe", "at the same bits", of_curve)
    if (law := found.published) is not None:
        yield column("Published law", "at the same bits, for the base model's size and training", lambda run: law.loss(run.bits))


def estimates(models: Sequence[Metrics]) -> Table | None:
    """A column for each named device."""
    devices = list(dict.fromkeys(one.device for metrics in models for one in metrics.cost.estimates))
    rows = []
    for metrics in models:
        found = {one.device: one for one in metrics.cost.estimates}
        cells = []
        for device in devices:
            one = found.get(device)
            if one is None:
                cells.append(Cell(MISSING))
            elif not one.fits:
                cells.append(Cell("does not fit", None, f"{format_bytes(one.memory_bytes)} needed"))
            else:
                speed = one.decode_tokens_per_second
                hint = f"prefill {_rate(one.prefill_tokens_per_second)}, {format_bytes(one.memory_bytes)}, bound by {one.bound}"
                cells.append(Cell(f"≈ {_rate(speed)}", speed, hint))
        rows.append(cells)
    return Table([(device, "decoded tokens per second, estimated") for device in devices], rows) if devices else None


def layers(found: Sequence[Mapping[str, Any]]) -> Table:
    """A row for each layer; the keys, in order of first appearance, are the columns."""
    keys = list(dict.fromkeys(key for layer in found for key in layer))
    return Table(
        [(key.replace("_", " "), "") for key in keys], [[_layer_cell(layer.get(key)) for key in keys] for layer in found]
    )


def _kept(metrics: Metrics, report: Report) -> Cell:
    error = None if metrics.label == report.base.label else metrics.recovery_error(report.base)
    return Cell(percent(metrics.mean_recovery, error), metrics.mean_recovery)


def _on_disk(metrics: Metrics, report: Report) -> Cell:
    n_bytes = metrics.cost.bytes_on_disk
    return Cell(format_bytes(n_bytes), n_bytes, f"{n_bytes:,} bytes")


def _smaller(metrics: Metrics, report: Report) -> Cell:
    ratio = report.base.cost.bytes_on_disk / metrics.cost.bytes_on_disk
    return Cell(f"{ratio:.2f}×", ratio)


def _task(name: str) -> Callable[[Metrics, Report], Cell]:
    def read(metrics: Metrics, report: Report) -> Cell:
        score = metrics.tasks.get(name)
        if score is None:
            return Cell(MISSING)
        error, difference = score.standard_error, metrics.differences.get(name)
        is_share = score.higher_is_better and 0 <= score.value <= 1
        text = percent(score.value, error) if is_share else _plain(score.value, error)
        hints = [f"{score.primary}, {score.n_samples} documents"]
        if name in metrics.recovery:
            hints.append(f"{percent(metrics.recovery[name])} of the base kept")
        if difference is not None:
            hints.append(_interval(difference, is_share))
        return Cell(text, score.value, "; ".join(hints), difference is not None and not difference.differs)

    return read


def _interval(difference: Difference, is_share: bool) -> str:
    scale, unit = (100, " points") if is_share else (1, "")
    low, high = scale * difference.low, scale * difference.high
    verdict = "differs" if difference.differs else "does not differ"
    return f"{scale * difference.mean:+.3g}{unit} from the base, 95 % interval {low:+.3g} to {high:+.3g}: {verdict}"


def _flips(metrics: Metrics, report: Report) -> Cell:
    if not metrics.flips:
        return Cell(MISSING)
    negative = sum(flips.negative for flips in metrics.flips.values())
    positive = sum(flips.positive for flips in metrics.flips.values())
    hint = "; ".join(f"{name}: −{one.negative} +{one.positive} of {one.n}" for name, one in metrics.flips.items())
    return Cell(f"−{negative} / +{positive}", negative, hint)


def _calibration(metrics: Metrics, report: Report) -> Cell:
    errors = metrics.calibration_error
    if not errors:
        return Cell(MISSING)
    mean = math.fsum(errors.values()) / len(errors)
    return Cell(f"{100 * mean:.1f}", mean, "; ".join(f"{name}: {100 * error:.1f}" for name, error in errors.items()))


def _divergence(metrics: Metrics, report: Report) -> Cell:
    one = metrics.fidelity
    if one is None:
        return Cell(MISSING)
    return Cell(f"{one.kl_mean:.4f}", one.kl_mean, f"± {one.kl_stderr:.4f}; 99 %: {one.kl_p99:.3f}, max: {one.kl_max:.3f}")


def _bits_per_byte(metrics: Metrics, report: Report) -> Cell:
    one = metrics.fidelity
    if one is None or one.bits_per_byte is None:
        return Cell(MISSING)
    base = one.base_bits_per_byte
    return Cell(f"{one.bits_per_byte:.3f}", one.bits_per_byte, "" if base is None else f"base: {base:.3f}")


def _perplexity(metrics: Metrics, report: Report) -> Cell:
    one = metrics.fidelity
    return Cell(MISSING) if one is None else Cell(f"{one.perplexity:.2f}", one.perplexity, f"base: {one.base_perplexity:.2f}")


def _number(read: Callable[[Metrics], Any], shown: Callable[[Any], str]) -> Callable[[Metrics, Report], Cell]:
    def cell(metrics: Metrics, report: Report) -> Cell:
        value = read(metrics)
        return Cell(MISSING) if value is None else Cell(shown(value), value)

    return cell


def _speed(name: str) -> Callable[[Metrics], Any]:
    return lambda metrics: getattr(metrics.cost.speed, name, None)


def _peak(metrics: Metrics) -> int | None:
    speed = metrics.cost.speed
    return speed and (speed.peak_device_bytes or speed.peak_process_bytes)


def _layer_cell(value: Any) -> Cell:
    if value is None:
        return Cell(MISSING)
    if isinstance(value, float):
        return Cell(f"{value:.4g}", value)
    text = " → ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return Cell(text, value if isinstance(value, int) else text)


def percent(share: float | None, error: float | None = None) -> str:
    """A share (0..1) in per cent, with its error where there is one."""
    if share is None or not math.isfinite(share):
        return MISSING
    return f"{100 * share:.1f} %" if error is None else f"{100 * share:.1f} ± {100 * error:.1f} %"


def _plain(value: float, error: float | None) -> str:
    return f"{value:.3f}" + ("" if error is None else f" ± {error:.3f}")


def _rate(per_second: float) -> str:
    return f"{per_second:,.1f}/s" if per_second < 1000 else f"{per_second:,.0f}/s"
