"""Logit distillation: train the compressed model to predict what the original predicts (Hinton et al., 1503.02531).

The loss is a divergence between next-token distributions over the whole vocabulary, by default KL(teacher || student), at
every token of plain text. Compared with the next-token loss it needs no labels, carries a whole distribution per token,
and cannot pull the model away from the original towards the training text: its minimum is the original.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from compress.distill.losses import cross_entropy, per_token
from compress.distill.white_box import Divergent
from compress.passes import Taxon
from compress.train_pass import Batch, Signal


class LogitKD(Divergent):
    """``cross_entropy`` of the next token's negative log-likelihood, the rest of T**2 times the divergence: Hinton et al.
    multiply by it so that the learning rate means the same at every temperature. See :class:`TrainPass` for the training fields.
    """

    taxon: ClassVar[Taxon] = Taxon.WHITE_BOX
    paper: ClassVar[str] = "1503.02531"

    cross_entropy: float = Field(0.0, ge=0, lt=1, description="share of the loss that is the text's own, not the teacher's")

    def loss(self, student: Signal, teacher: Signal | None, batch: Batch) -> Tensor:
        """Mean over tokens, in nats."""

        def mixed(student_logits: Tensor, teacher_logits: Tensor, targets: Tensor) -> Tensor:
            distilled = (1 - self.cross_entropy) * self.temperature**2 * self.measure(student_logits, teacher_logits)
            if not self.cross_entropy:
                return distilled
            return distilled + self.cross_entropy * cross_entropy(student_logits, targets)

        return per_token(mixed, student, self.given(teacher), batch.targets, chunk=self.chunk).mean()
