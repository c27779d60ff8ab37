"""The record of what was measured: one :class:`Metrics` a model, one :class:`Report` a comparison, JSON both ways.

Everything that a chart or a table shows is in ``metrics.json``; both can be made again from it without the models.
"""

from __future__ import annotations

import math
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from compress.eval.cost import Cost
from compress.eval.density import Density
from compress.eval.fidelity import Fidelity
from compress.eval.files import write_whole
from compress.eval.flips import Flips
from compress.eval.harness import TaskScore
from compress.eval.low_bits import LowBits
from compress.eval.uncertainty import Difference

PACKAGES = ("compress-lm", "torch", "transformers", "lm-eval")
UNPLACED = dict.fromkeys(("effective_parameters", "density", "bit_density"))
SCHEMA_ID = "urn:compress-lm:metrics:1"
"""Names the schema of ``metrics.json``; its number rises where old readers would misread new files."""


class Protocol(BaseModel):
    """How the numbers were measured; two points are comparable only where all of it but ``versions`` agrees.

    data: the held-out text of the fidelity numbers. context_length: tokens per window. limit: documents per task (None:
    all). n_shot: examples in the prompt (None: what each task says).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: str | None = None
    context_length: int | None = None
    dtype: str = "float32"
    device: str = "cpu"
    seed: int = 0
    limit: int | None = None
    n_shot: int | None = None
    versions: dict[str, str] = {}


class Metrics(BaseModel):
    """One model, base or compressed.

    label: short and unique within a report. model: directory or hub name. digest: of its weights.
    taxon: value of the :class:`compress.passes.Taxon` of the last pass; None for a base model. passes: as the command
    line writes them, in order. parent: label of the point that this one was made from (None: the base).
    recovery: share of the base model's score kept, per task; 1 is unharmed, whichever way the metric runs.
    mean_recovery: over the tasks where higher is better, or over all where there are none; None where no task allows
    it. outcomes: the primary metric of each document, in document order, for the tasks whose score is the mean of it;
    weights: of the documents in that mean, where they are not equal. flips, differences: against the base, for the tasks
    where answers are right or wrong, and where there are outcomes. calibration_error: of multiple-choice tasks, 0..1.
    knowledge_bits: of the bundled synthetic biographies. layers: a row for each compressed layer. effective_parameters,
    density, bit_density: see :class:`compress.eval.density.Density`. command: what reproduces this point.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    label: str
    model: str
    digest: str
    cost: Cost
    taxon: str | None = None
    passes: tuple[str, ...] = ()
    parent: str | None = None
    tasks: dict[str, TaskScore] = {}
    fidelity: Fidelity | None = None
    protocol: Protocol = Protocol()
    recovery: dict[str, float] = {}
    mean_recovery: float | None = None
    outcomes: dict[str, tuple[float, ...]] = {}
    weights: dict[str, tuple[float, ...]] = {}
    flips: dict[str, Flips] = {}
    differences: dict[str, Difference] = {}
    calibration_error: dict[str, float] = {}
    knowledge_bits: float | None = None
    layers: tuple[dict[str, Any], ...] = ()
    effective_parameters: float | None = None
    density: float | None = None
    bit_density: float | None = None
    command: str | None = None

    def recovered(self, base: Metrics) -> Metrics:
        """A copy whose recovery is against ``base``. Tasks that only one of the two has are left out."""
        shares = recovery(self.tasks, base.tasks)
        averaged = _averaged(shares, self.tasks)
        mean = math.fsum(shares[name] for name in averaged) / len(averaged) if averaged else None
        return self.model_copy(update={"recovery": shares, "mean_recovery": mean})

    def recovery_error(self, base: Metrics) -> float | None:
        """Standard error of ``mean_recovery``: that of this model's own scores, the base's being taken as exact.

        None where a task has no standard error.
        """
        averaged = _averaged(self.recovery, self.tasks)
        squares = []
        for name in averaged:
            score, error = self.tasks[name], self.tasks[name].standard_error
            if error is None or not score.value:
                return None
            squares.append((error / score.value * self.recovery[name]) ** 2)
        return math.sqrt(math.fsum(squares)) / len(averaged) if averaged else None


class Report(BaseModel):
    """A base model and what compression made of it.

    points: in the order measured. command: what reproduces the report, as typed in a shell. density: the family of dense
    models that the points' effective parameters were read off, where one was given. low_bits: what the quantized points say
    of bits per weight. schema_id: see :mod:`compress.eval.schema`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings", populate_by_name=True)

    schema_id: str = Field(default=SCHEMA_ID, alias="$schema")
    schema_version: Literal[1] = 1
    title: str
    base: Metrics
    points: tuple[Metrics, ...] = ()
    command: str | None = None
    density: Density | None = None
    low_bits: LowBits | None = None

    @field_validator("schema_id")
    @classmethod
    def _is_read(cls, schema_id: str) -> str:
        if schema_id != SCHEMA_ID:
            raise ValueError(f"written by another release, whose files are {schema_id!r}; this one reads {SCHEMA_ID!r}")
        return schema_id

    @model_validator(mode="after")
    def _labels_are_unique(self) -> Report:
        labels = Counter([self.base.label, *(point.label for point in self.points)])
        if twice := [label for label, n in labels.items() if n > 1]:
            raise ValueError(f"several models have the label {', '.join(map(repr, twice))}")
        return self

    def add(self, point: Metrics) -> Report:
        """A copy with one more point, its recovery measured against the base. Raises ValueError on a label in use."""
        if point.label in {self.base.label, *(other.label for other in self.points)}:
            raise ValueError(f"the report has a point {point.label!r} already")
        return self.model_copy(update={"points": (*self.points, point.recovered(self.base))})

    def lines(self) -> list[str]:
        """The measurements in words, a line a model, then what they say of low bits."""
        found = []
        for metrics in (self.base, *self.points):
            scores = ", ".join(f"{name} {score.primary} {score.value:.4g}" for name, score in metrics.tasks.items())
            divergence = f", KL {metrics.fidelity.kl_mean:.4g}" if metrics.fidelity else ""
            found.append(f"{metrics.label}: {metrics.cost.bytes_on_disk:,} bytes, {scores}{divergence}")
        return found + (self.low_bits.words() if self.low_bits is not None else [])

    def front(self) -> list[Metrics]:
        """The models, base included, than which none is both smaller and better, smallest first."""
        base = self.base.recovered(self.base)
        charted = [point for point in (base, *self.points) if _is_number(point.mean_recovery)]
        sizes_and_scores = [(point.cost.bytes_on_disk, point.mean_recovery or 0.0) for point in charted]
        return [charted[index] for index in pareto_front(sizes_and_scores)]

    def save(self, path: str | Path) -> Path:
        """Write as JSON, whole or not at all. Infinities and NaN become strings, as JSON has none."""
        return write_whole(Path(path), self.dump(indent=2) + "\n")

    def dump(self, indent: int | None = None) -> str:
        """The JSON text of ``metrics.json``."""
        return self.model_dump_json(by_alias=True, indent=indent)

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """Read what :meth:`save` wrote. Raises pydantic's ValidationError for anything else."""
        return cls.model_validate_json(Path(path).read_text(encoding="utf-8"))


def recovery(tasks: Mapping[str, TaskScore], base: Mapping[str, TaskScore]) -> dict[str, float]:
    """Share of the base's primary metric kept, per task: compressed / base, or base / compressed where lower is better.

    A score that is not a number keeps nothing. A task whose share is undefined (the base's score is zero or not a number) is
    left out.
    """
    shares: dict[str, float] = {}
    for name, score in tasks.items():
        if name not in base or score.primary not in base[name].metrics:
            continue
        ours, theirs = score.value, base[name].metrics[score.primary]
        if math.isnan(ours) and not math.isnan(theirs):
            ours = 0.0 if score.higher_is_better else math.inf
        kept, whole = (ours, theirs) if score.higher_is_better else (theirs, ours)
        share = kept / whole if whole else math.nan
        if not math.isnan(share):
            shares[name] = share
    return shares


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the (size, score) pairs that no other dominates, smallest size first.

    One dominates another if it is no larger and scores no less, and differs from it; equal pairs stay together.
    """
    order = sorted(range(len(points)), key=lambda index: (points[index][0], -points[index][1]))
    front: list[int] = []
    best: tuple[float, float] | None = None
    for index in order:
        if best is None or points[index][1] > best[1] or points[index] == best:
            front.append(index)
            best = points[index]
    return front


def merge(reports: Sequence[Report], title: str | None = None) -> Report:
    """Put the points of several reports on one base model into one report, for one chart.

    The same point measured twice is kept once; different points of one label are numbered. Raises ValueError if there
    is no report, or if they differ in base model or in protocol (versions aside), as their numbers then do not compare.
    Densities are kept where they are of one family; what the points say of low bits together is left to be found.
    """
    if not reports:
        raise ValueError("no report to merge")
    first = reports[0]
    families = [report.density for report in reports if report.density is not None]
    density = families[0] if families and all(one == families[0] for one in families) else None
    fresh = {"title": title or first.title, "points": (), "command": None, "density": density, "low_bits": None}
    merged = first.model_copy(update=fresh)
    known: dict[tuple[str, str], str] = {}
    for report in reports:
        _assert_comparable(first, report)
        taken = {merged.base.label, *(point.label for point in merged.points)}
        renamed = {report.base.label: merged.base.label}
        for point in report.points:
            renamed[point.label] = known.get((point.label, point.digest)) or _free_label(point.label, taken)
            taken.add(renamed[point.label])
        for point in report.points:
            if (point.label, point.digest) in known:
                continue
            label, parent = renamed[point.label], point.parent
            known[point.label, point.digest] = label
            parent = renamed.get(parent, parent) if parent is not None else None
            own = {} if density is not None else UNPLACED
            merged = merged.add(point.model_copy(update={"label": label, "parent": parent, **own}))
    return merged


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that the numbers depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # a checkout that was never installed
            continue
    return found


def _averaged(shares: Mapping[str, float], tasks: Mapping[str, TaskScore]) -> list[str]:
    return [name for name in shares if tasks[name].higher_is_better] or list(shares)


def _is_number(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _assert_comparable(first: Report, other: Report) -> None:
    if first.base.digest != other.base.digest:
        raise ValueError(f"reports on different base models: {first.base.model} and {other.base.model}")
    ours = first.base.protocol.model_dump(exclude={"versions"})
    theirs = other.base.protocol.model_dump(exclude={"versions"})
    differing = [key for key in ours if ours[key] != theirs[key]]
    if differing:
        raise ValueError(f"reports measured differently ({', '.join(differing)}): {first.title} and {other.title}")
    if first.base.tasks.keys() != other.base.tasks.keys():
        raise ValueError(f"reports on different tasks: {sorted(first.base.tasks)} and {sorted(other.base.tasks)}")


def _free_label(label: str, taken: set[str]) -> str:
    candidate, count = label, 1
    while candidate in taken:
        count += 1
        candidate = f"{label} ({count})"
    return candidate
