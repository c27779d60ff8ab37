"""What training passes share whose loss is a choice: towards the uncompressed model's predictions, or the text's own."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from compress.distill.losses import cross_entropy, forward_kl, per_token
from compress.distill.tsld import token_scaled
from compress.passes import Needs
from compress.train_pass import Batch, Signal, TrainPass


class Objective(TrainPass):
    """A training pass whose method is not its loss."""

    objective: Literal["kl", "tsld", "ce"] = Field(
        "kl",
        description="kl: to the uncompressed model's predictions; tsld: the same, tokens weighted by how unsure that model is; "
        "ce: of the next token",
    )
    confidence_temperature: float = Field(10.0, gt=0, description="tsld: divides the teacher's losses that weigh tokens")
    chunk: int | None = Field(None, ge=1, description="tokens whose logits exist at one time; none: those of 40 MB")

    @property
    def needs(self) -> Needs:  # type: ignore[override]  # a constant of other methods, here it depends on a setting
        return Needs(teacher=self.objective != "ce")

    def loss(self, student: Signal, teacher: Signal | None, batch: Batch) -> Tensor:
        """Mean over tokens of KL(teacher || student), or of the next token's negative log-likelihood, in nats; of tsld the mean
        over windows of the weighted sum over tokens."""
        if self.objective == "ce":
            return per_token(cross_entropy, student, None, batch.targets, chunk=self.chunk).mean()
        assert teacher is not None
        if self.objective == "tsld":
            return token_scaled(forward_kl, student, teacher, batch, self.confidence_temperature, chunk=self.chunk)
        return per_token(forward_kl, student, teacher, chunk=self.chunk).mean()
