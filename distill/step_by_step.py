"""Distilling step by step: predict a teacher's label and, as a task of its own, the rationale that it gave (Hsieh et al.,
2305.02301)."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from compress.distill.fine_tune import FineTune
from compress.distill.losses import cross_entropy, per_token
from compress.passes import Taxon
from compress.train_pass import Batch, Signal


class StepByStep(FineTune):
    """``alpha`` times the mean loss over the tokens of labels, and the rest of it times that over the tokens of rationales.

    data: rows with ``prompt``, ``rationale`` and ``label``, which a teacher wrote; with ``answer`` and ``expected`` too, those
    are left out in which they differ. Each is trained on as ``[label] PROMPT LABEL`` and as ``[rationale] PROMPT RATIONALE``; the
    model is then asked with ``[label]``, so that the rationales cost nothing. A batch that holds one of the two has its mean
    alone; text of other kinds is taken as labels.
    """

    taxon: ClassVar[Taxon] = Taxon.BLACK_BOX
    paper: ClassVar[str] = "2305.02301"

    alpha: float = Field(0.5, ge=0, le=1, description="weight of the labels; 1 is fine-tuning on them")

    def loss(self, student: Signal, teacher: Signal | None, batch: Batch) -> Tensor:
        losses = per_token(cross_entropy, student, None, batch.targets, chunk=self.chunk)
        if batch.tasks is None:
            return losses.mean()
        is_label = batch.at_predicted(batch.tasks) == 0
        if is_label.all() or not is_label.any():
            return losses.mean()
        return self.alpha * losses[is_label].mean() + (1 - self.alpha) * losses[~is_label].mean()
