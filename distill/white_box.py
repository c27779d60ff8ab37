"""What passes share that compare the student's next-token distributions with the teacher's."""

from __future__ import annotations

import math
from functools import partial
from typing import ClassVar, Literal

from pydantic import Field, model_validator
from torch import Tensor
from transformers import PreTrainedModel

from compress.distill import losses
from compress.distill.selection import select
from compress.passes import Needs
from compress.train_pass import Batch, Signal, TrainPass

DIVERGENCES: dict[str, losses.Divergence] = {
    "forward_kl": losses.forward_kl, "reverse_kl": losses.reverse_kl, "jsd": losses.jsd, "skew_kl": losses.skew_kl,
    "skew_reverse_kl": losses.skew_reverse_kl, "adaptive_kl": losses.adaptive_kl,
}  # fmt: skip


class WhiteBox(TrainPass):
    """A training pass that sees the teacher's predictions.

    temperature: T, dividing both models' logits. chunk: tokens whose logits exist at one time (memory is about
    chunk * vocabulary * 4 bytes, a few times over).
    """

    needs: ClassVar[Needs] = Needs(teacher=True)

    temperature: float = Field(1.0, gt=0, description="divides both models' logits")
    chunk: int | None = Field(None, ge=1, description="tokens whose logits exist at one time; none: those of 40 MB")
    select: Literal["paser"] | None = Field(None, description="paser: train on the windows where compression has cost most")
    selected: float = Field(0.25, gt=0, le=1, description="share of the windows looked at that select leaves")

    @property
    def n_windows(self) -> int:
        return super().n_windows if self.select is None else math.ceil(super().n_windows / self.selected)

    def pick(self, student: PreTrainedModel, teacher: PreTrainedModel, data: Batch, seed: int) -> Tensor | None:
        if self.select is None:
            return None
        n = min(super().n_windows, math.ceil(self.selected * len(data.tokens)))
        return select(student, teacher, data.tokens, data.counted, n, seed=seed)

    @model_validator(mode="after")
    def _selects_with_a_model(self) -> WhiteBox:
        if self.select and self.cache:
            raise ValueError("select looks at the teacher's hidden states, which a cache does not hold: leave out cache")
        return self

    def given(self, teacher: Signal | None) -> Signal:
        """The teacher's signal. Raises ValueError where there is none."""
        if teacher is None:
            raise ValueError(f"{self.method()} compares with a teacher, and none was given")
        return teacher


class Divergent(WhiteBox):
    """One whose loss has a divergence of choice in it; see ``losses.py`` for what each is."""

    divergence: Literal["forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "adaptive_kl"] = Field(
        "forward_kl", description="what is minimised between the two models' predictions"
    )
    beta: float = Field(0.5, ge=0, le=1, description="jsd: the teacher's share of the mixture; 0 is forward KL, 1 reverse KL")
    alpha: float = Field(0.1, gt=0, lt=1, description="skew_kl, skew_reverse_kl: how much of itself the mixture has")

    @property
    def measure(self) -> losses.Divergence:
        """The divergence with its settings."""
        own = {"jsd": {"beta": self.beta}, "skew_kl": {"alpha": self.alpha}, "skew_reverse_kl": {"alpha": self.alpha}}
        return partial(DIVERGENCES[self.divergence], temperature=self.temperature, **own.get(self.divergence, {}))

    def divergences(self, student: Signal, teacher: Signal | None) -> Tensor:
        """The divergence at every token, (tokens,), in nats; without a factor for the temperature."""
        return losses.per_token(self.measure, student, self.given(teacher), chunk=self.chunk)
