"""Two measured models side by side: which of them is better, and whether the difference is more than chance.

Models of one protocol answered the same documents, so the scores are compared document by document, as a model is with its
base.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Literal

from pydantic import BaseModel, ConfigDict

from compress.eval.chart import format_bytes
from compress.eval.flips import Flips, count_flips
from compress.eval.harness import TaskScore
from compress.eval.junit import Case
from compress.eval.metrics import Metrics
from compress.eval.uncertainty import Difference, paired_difference

Verdict = Literal["better", "worse", "does not differ", "not comparable"]


class TaskComparison(BaseModel):
    """A task's primary metric of two models, and B minus A over the same documents.

    difference, flips: None where there are no outcomes to compare (flips: or they are not right or wrong); negative flips
    are A's right answers that B has wrong. verdict: of B; a score that is no finite number is worse than one that is; "not
    comparable" else without a difference.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    metric: str
    higher_is_better: bool
    a: float
    b: float
    difference: Difference | None = None
    flips: Flips | None = None
    verdict: Verdict

    def words(self) -> str:
        """The verdict, with its interval."""
        if self.difference is None:
            return "not comparable document by document" if self.verdict == "not comparable" else self.verdict
        interval = f"[{self.difference.low:+.4g}, {self.difference.high:+.4g}]"
        return f"{self.verdict} ({self.difference.mean:+.4g} {interval})"


class Costs(BaseModel):
    """What a model takes. tokens_per_second: decoded and prefilled at batch 1. kl: to its base, nats per token."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    label: str
    bytes_on_disk: int
    decode_tokens_per_second: float | None = None
    prefill_tokens_per_second: float | None = None
    resident_weight_bytes: int | None = None
    kl: float | None = None


class Comparison(BaseModel):
    """Model B beside model A. notes: what keeps numbers from being comparable."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    a: Costs
    b: Costs
    tasks: dict[str, TaskComparison]
    notes: tuple[str, ...] = ()

    @property
    def worse(self) -> list[str]:
        """Tasks on which B is worse than A."""
        return [name for name, task in self.tasks.items() if task.verdict == "worse"]

    def lines(self) -> list[str]:
        """The comparison as a table of text."""
        rows = [("", "A", "B", "B against A"), *self._rows()]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        table = [f"{name:<{widths[0]}}  {a:>{widths[1]}}  {b:>{widths[2]}}  {words}".rstrip() for name, a, b, words in rows]
        return [f"A: {self.a.label}", f"B: {self.b.label}", "", *table, *(f"note: {note}" for note in self.notes)]

    def cases(self) -> list[Case]:
        """For CI: one test case a task, which fails where B is worse."""
        return [
            Case("tasks", name, f"{task.metric}: {task.a:.4g} -> {task.b:.4g}, {task.words()}", failed=task.verdict == "worse")
            for name, task in self.tasks.items()
        ]

    def _rows(self) -> Iterator[tuple[str, str, str, str]]:
        for name, task in self.tasks.items():
            arrow = "higher" if task.higher_is_better else "lower"
            yield f"{name}: {task.metric} ({arrow} is better)", f"{task.a:.4g}", f"{task.b:.4g}", task.words()
            if task.flips is not None:
                flips = task.flips
                told = f"{flips.negative} right -> wrong, {flips.positive} wrong -> right of {flips.n}, p = {flips.p_value:.2g}"
                yield "  flips", "", "", told
        a, b = self.a, self.b
        share = f"{b.bytes_on_disk / a.bytes_on_disk:.1%} of A"
        yield "bytes on disk", format_bytes(a.bytes_on_disk), format_bytes(b.bytes_on_disk), share
        speeds = (
            ("decode, tokens/s", a.decode_tokens_per_second, b.decode_tokens_per_second),
            ("prefill, tokens/s", a.prefill_tokens_per_second, b.prefill_tokens_per_second),
        )
        for name, ours, theirs in speeds:
            if ours and theirs:
                yield name, f"{ours:,.1f}", f"{theirs:,.1f}", f"{theirs / ours:.2f} times A's"
        if a.kl is not None and b.kl is not None:
            yield "KL to the base, nats/token", f"{a.kl:.4g}", f"{b.kl:.4g}", f"{b.kl - a.kl:+.4g}"


def compare_models(a: Metrics, b: Metrics, *, same_base: bool = True, seed: int = 0) -> Comparison:
    """Compare two measured models. same_base: whether they were made from one base model, to which their KL then refers.

    Raises ValueError where they were measured by different protocols, or have no task in common.
    """
    ours, theirs = (one.protocol.model_dump(exclude={"versions"}) for one in (a, b))
    if differing := [key for key in ours if ours[key] != theirs[key]]:
        raise ValueError(f"they were measured differently ({', '.join(differing)})")
    common = [name for name, score in a.tasks.items() if name in b.tasks and b.tasks[name].primary == score.primary]
    if not common:
        raise ValueError("they have no task in common")
    notes = [f"{name}: measured of one model only" for name in sorted(a.tasks.keys() ^ b.tasks.keys())]
    if not same_base:
        notes.append("the two have different base models: their divergences from them are left out")
    changed = [name for name in a.protocol.versions if b.protocol.versions.get(name) != a.protocol.versions[name]]
    if changed:
        notes.append(f"measured with other versions of {', '.join(changed)}")
    if a.cost.speed and b.cost.speed and (note := _unlike(a, b)):
        notes.append(note)
    return Comparison(
        a=_costs(a, same_base), b=_costs(b, same_base), tasks={name: _task(name, a, b, seed) for name in common},
        notes=tuple(notes),
    )  # fmt: skip


def _unlike(a: Metrics, b: Metrics) -> str | None:
    assert a.cost.speed and b.cost.speed
    ours, theirs = a.cost.speed, b.cost.speed
    keys = ("device", "dtype", "n_threads", "prompt_tokens", "new_tokens")
    differing = [key for key in keys if getattr(ours, key) != getattr(theirs, key)]
    return f"speeds were measured differently ({', '.join(differing)})" if differing else None


def _task(name: str, a: Metrics, b: Metrics, seed: int) -> TaskComparison:
    before, after = a.tasks[name], b.tasks[name]
    outcomes = a.outcomes.get(name, ()), b.outcomes.get(name, ())
    difference, flips = None, None
    weights = a.weights.get(name)
    paired = outcomes[0] and len(outcomes[0]) == len(outcomes[1]) and weights == b.weights.get(name)
    if paired and all(map(math.isfinite, chain(*outcomes))):
        difference = paired_difference(outcomes[1], outcomes[0], weights, seed=seed)
        flips = count_flips(*outcomes)
    return TaskComparison(
        metric=before.primary, higher_is_better=before.higher_is_better, a=before.value, b=after.value, difference=difference,
        flips=flips, verdict=_verdict(difference, before, after),
    )  # fmt: skip


def _verdict(difference: Difference | None, before: TaskScore, after: TaskScore) -> Verdict:
    finite = math.isfinite(before.value), math.isfinite(after.value)
    if finite[0] != finite[1]:  # a model whose predictions are ruined
        return "better" if finite[1] else "worse"
    if difference is None:
        return "not comparable"
    if not difference.differs:
        return "does not differ"
    return "better" if (difference.mean > 0) == before.higher_is_better else "worse"


def _costs(metrics: Metrics, same_base: bool) -> Costs:
    speed = metrics.cost.speed
    return Costs(
        label=metrics.label,
        bytes_on_disk=metrics.cost.bytes_on_disk,
        decode_tokens_per_second=speed.decode_tokens_per_second if speed else None,
        prefill_tokens_per_second=speed.prefill_tokens_per_second if speed else None,
        resident_weight_bytes=speed.resident_weight_bytes if speed else None,
        kl=metrics.fidelity.kl_mean if metrics.fidelity and same_base else None,
    )


def task_cases(metrics: Metrics, base: Metrics | None) -> Sequence[Case]:
    """For CI: one test case a task that was measured, which holds its score; gates are what may fail."""
    cases = []
    for name, score in metrics.tasks.items():
        told = f"{score.primary}: {score.value:.6g}"
        if base is not None and name in base.tasks:
            told = f"{score.primary}: {base.tasks[name].value:.6g} -> {score.value:.6g}"
        if difference := metrics.differences.get(name):
            said = "differs" if difference.differs else "does not differ"
            told += f"; {said} from the base ({difference.mean:+.4g} [{difference.low:+.4g}, {difference.high:+.4g}])"
        cases.append(Case("tasks", name, told))
    return cases
