"""Logit distillation: train the compressed model to predict what the original predicts (Hinton et al., 1503.02531).

The loss is the forward divergence KL(teacher || student) between next-token distributions over the whole vocabulary, at
every token of plain text. Compared with the next-token loss it needs no labels, carries a whole distribution per token,
and cannot pull the model away from the original towards the training text: its minimum is the original.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from compress.distill.losses import chunked_forward_kl
from compress.passes import Needs, Taxon
from compress.train_pass import Batch, Signal, TrainPass


class LogitKD(TrainPass):
    """Forward KL to the uncompressed model's next-token distributions; see :class:`TrainPass` for the training fields.

    temperature: T, dividing both models' logits. The loss is multiplied by T**2, as Hinton et al. do, so that the
    learning rate means the same at every temperature. chunk: tokens whose logits exist at one time (memory is about
    chunk * vocabulary * 4 bytes, a few times over).
    """

    taxon: ClassVar[Taxon] = Taxon.WHITE_BOX
    paper: ClassVar[str] = "1503.02531"
    needs: ClassVar[Needs] = Needs(teacher=True)

    temperature: float = Field(1.0, gt=0, description="divides both models' logits")
    chunk: int = Field(256, ge=1, description="tokens whose logits exist at one time")

    def loss(self, student: Signal, teacher: Signal | None, batch: Batch) -> Tensor:
        """T**2 * mean over tokens of KL(teacher || student), in nats."""
        if teacher is None:
            raise ValueError("logit_kd compares with a teacher, and none was given")
        total = chunked_forward_kl(student.hidden, student.head, teacher.hidden, teacher.head, self.temperature, self.chunk)
        return self.temperature**2 * total / len(student.hidden)
