"""Conditions that a result must meet to be published under its name; MLOps pipelines branch on the exit code."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from pydantic import BaseModel, Field

from compress.amounts import parse_bytes
from compress.errors import BadInput
from compress.eval.junit import Case
from compress.eval.metrics import Metrics


class Checked(NamedTuple):
    """A gate and what came to it. option: as on the command line. told: value and limit, in words."""

    option: str
    held: bool
    told: str


class Gates(BaseModel):
    """None: no condition. min_recovery: mean share of the base's scores. max_kl: nats per token. max_bytes: of weight files.
    max_flips: share of the base's answers that went from right to wrong, of all tasks with right and wrong answers."""

    min_recovery: float | None = Field(default=None, ge=0, le=1)
    max_bytes: int | None = Field(default=None, ge=0)
    max_kl: float | None = Field(default=None, ge=0)
    max_flips: float | None = Field(default=None, ge=0, le=1)

    @classmethod
    def typed(cls, min_recovery: float | None, max_bytes: str | None, max_kl: float | None, max_flips: float | None) -> Gates:
        """From the command line's options. Raises :class:`BadInput` for a limit that is none."""
        for option, share in (("--min-recovery", min_recovery), ("--max-flips", max_flips)):
            if share is not None and not 0 <= share <= 1:
                raise BadInput(f"{option} {share}: is a share from 0 to 1, such as 0.97")
        if max_kl is not None and not max_kl >= 0:
            raise BadInput(f"--max-kl {max_kl}: is a number of nats, such as 0.05")
        size = parse_bytes(max_bytes, "--max-bytes") if max_bytes is not None else None
        return cls(min_recovery=min_recovery, max_bytes=size, max_kl=max_kl, max_flips=max_flips)

    @property
    def need_measuring(self) -> list[str]:
        """Options of the gates that are about behaviour beside the base's."""
        named = {"--min-recovery": self.min_recovery, "--max-kl": self.max_kl, "--max-flips": self.max_flips}
        return [option for option, limit in named.items() if limit is not None]

    def check_measurable(self, evaluates: bool) -> None:
        """Raise :class:`BadInput` for a gate on something that will not be measured."""
        if not evaluates and self.need_measuring:
            raise BadInput(f"{' and '.join(self.need_measuring)} need the evaluation; drop --no-eval")

    def checked(self, n_bytes: int, metrics: Metrics | None) -> list[Checked]:
        """Every gate that was set, in order. What could not be measured, or is no number, does not hold."""
        return list(self._checked(n_bytes, metrics))

    def _checked(self, n_bytes: int, metrics: Metrics | None) -> Iterator[Checked]:
        fidelity = metrics.fidelity if metrics else None
        if (limit := self.min_recovery) is not None:
            kept = metrics.mean_recovery if metrics else None
            held = kept is not None and kept >= limit
            yield _judged("--min-recovery", "recovery", kept, "at least" if held else "below", limit, held)
        if (limit := self.max_bytes) is not None:
            held = n_bytes <= limit
            yield Checked("--max-bytes", held, f"{n_bytes:,} bytes are {'at most' if held else 'more than'} {limit:,}")
        if (limit := self.max_kl) is not None:
            divergence = fidelity.kl_mean if fidelity else None
            held = divergence is not None and divergence <= limit
            yield _judged("--max-kl", "KL to the base", divergence, "at most" if held else "above", limit, held)
        if (limit := self.max_flips) is not None:
            share = _flipped(metrics)
            held = share is not None and share <= limit
            yield _judged("--max-flips", "share of flips to wrong", share, "at most" if held else "above", limit, held)


def _judged(option: str, what: str, value: float | None, relation: str, limit: float, held: bool) -> Checked:
    if value is None:
        return Checked(option, False, f"{what} was not measured (limit {limit:g})")
    return Checked(option, held, f"{what} {value:.5g} is {relation} {limit:g}")


def _flipped(metrics: Metrics | None) -> float | None:
    flips = metrics.flips.values() if metrics else ()
    n = sum(each.n for each in flips)
    return sum(each.negative for each in flips) / n if n else None


def missed(checked: list[Checked]) -> str:
    """What does not hold, in words; empty where everything does."""
    return "; ".join(f"{each.option}: {each.told}" for each in checked if not each.held)


def gate_cases(checked: list[Checked]) -> list[Case]:
    """For CI: one test case a gate."""
    return [Case("gates", each.option.removeprefix("--"), each.told, failed=not each.held) for each in checked]
