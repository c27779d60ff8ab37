"""Fine-tuning: train the compressed model to predict the next token of text, such as completions that a teacher wrote
(sequence-level distillation, Kim and Rush, 1606.07947)."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from compress.distill.losses import cross_entropy, per_token
from compress.passes import Taxon
from compress.train_pass import Batch, Signal, TrainPass


class FineTune(TrainPass):
    """The loss that models are made with. On plain text it is what distillation has to beat; on prompts with completions, of
    which only these count, all that can be learned from a teacher that shows nothing but what it writes.

    See :class:`TrainPass` for the training fields.
    """

    taxon: ClassVar[Taxon] = Taxon.BLACK_BOX
    paper: ClassVar[str] = "1606.07947"

    chunk: int | None = Field(None, ge=1, description="tokens whose logits exist at one time; none: those of 40 MB")

    def loss(self, student: Signal, teacher: Signal | None, batch: Batch) -> Tensor:
        """Mean over tokens of -ln q(next token), in nats."""
        return per_token(cross_entropy, student, None, batch.targets, chunk=self.chunk).mean()
