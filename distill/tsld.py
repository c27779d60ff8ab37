"""TSLD: distillation of quantized models in which tokens count the more the less sure of them the teacher is (Kim et al.,
2308.06744)."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from compress.distill.losses import Divergence, cross_entropy, per_token
from compress.distill.white_box import Divergent
from compress.passes import Taxon
from compress.train_pass import Batch, Signal


class TSLD(Divergent):
    """In every window the tokens' divergences are weighted by a softmax of the teacher's own losses on them, divided by
    ``confidence_temperature``; there is no loss of the text's own. After a quantizer it trains what the grid leaves free.

    The paper sums the teacher's cross-entropies -sum_v p_v ln q_v; a divergence differs from these by the teacher's entropy,
    which takes no gradient, and is 0 once nothing is left to learn. See :class:`TrainPass` for the training fields.
    """

    taxon: ClassVar[Taxon] = Taxon.QAT
    paper: ClassVar[str] = "2308.06744"

    confidence_temperature: float = Field(10.0, gt=0, description="divides the teacher's losses: large makes tokens count alike")

    def loss(self, student: Signal, teacher: Signal | None, batch: Batch) -> Tensor:
        """Mean over windows of the weighted sum over their tokens, in nats."""
        given = self.given(teacher)
        return token_scaled(self.measure, student, given, batch, self.confidence_temperature, chunk=self.chunk)


def token_scaled(
    measure: Divergence, student: Signal, teacher: Signal, batch: Batch, temperature: float, *, chunk: int | None = None
) -> Tensor:
    """Mean over windows of the sum over their tokens of a divergence times the token's weight: a softmax over the window of the
    teacher's losses divided by ``temperature``."""

    def both(student_logits: Tensor, teacher_logits: Tensor, targets: Tensor) -> Tensor:
        return torch.stack([measure(student_logits, teacher_logits), cross_entropy(teacher_logits, targets)], -1)

    divergences, confidence = per_token(both, student, teacher, batch.targets, chunk=chunk).unbind(-1)
    weights = window_softmax(confidence.detach() / temperature, batch.windows)
    return (weights * divergences).sum() / len(batch.windows.unique())


def window_softmax(values: Tensor, windows: Tensor) -> Tensor:
    """A softmax within each window. values: (tokens,). windows: (tokens,) int64, which window each is of. Returns (tokens,)."""
    raised = (values - values.max()).exp()
    return raised / raised.new_zeros(int(windows.max()) + 1).index_add(0, windows, raised)[windows]
