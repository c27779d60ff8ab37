"""GKD: train on what the student itself writes, so that it learns to go on from its own mistakes (Agarwal et al., 2306.13649)."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from compress.distill.white_box import Divergent
from compress.passes import Taxon
from compress.rollouts import Rollouts
from compress.train_pass import Batch, Signal


class GKD(Divergent):
    """With probability ``on_policy`` a batch is continued by the student from the beginnings of its sequences, and only what it
    wrote counts; all other batches are the text itself, or with ``seq_kd`` the teacher's continuations. Then the divergence
    is minimised, without a gradient through the sampling. ``temperature`` divides logits in both.

    The paper's mix with a reward is left out. See :class:`TrainPass` for the training fields.
    """

    taxon: ClassVar[Taxon] = Taxon.WHITE_BOX
    paper: ClassVar[str] = "2306.13649"

    divergence: Literal["forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "adaptive_kl"] = Field(
        "jsd", description="what is minimised between the two models' predictions"
    )
    temperature: float = Field(0.9, gt=0, description="divides both models' logits, where they write too")
    on_policy: float = Field(0.5, ge=0, le=1, description="share of the batches that the student writes")
    seq_kd: bool = Field(False, description="the teacher writes all others")
    prompt: float = Field(0.5, ge=0, lt=1, description="share of a sequence that is given, where the data has no prompts")

    def prepare(self, batch: Batch, rollouts: Rollouts) -> Batch:
        on_policy = rollouts.chance(batch.index) < self.on_policy
        if not (on_policy or self.seq_kd):
            return batch
        return rollouts.rewrite(batch, self.prompt, temperature=self.temperature, teacher=0.0 if on_policy else 1.0)

    def loss(self, student: Signal, teacher: Signal | None, batch: Batch) -> Tensor:
        """Mean of the divergence over tokens, in nats; without Hinton's factor, as the paper has it."""
        return self.divergences(student, teacher).mean()
