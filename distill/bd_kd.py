"""BD-KD: forward and reverse KL, balanced sample by sample by which model is the surer one (Amara et al., 2212.12965)."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from compress.distill.losses import entropy, forward_kl, per_token, reverse_kl
from compress.distill.white_box import WhiteBox
from compress.passes import Taxon
from compress.train_pass import Batch, Signal


class BDKD(WhiteBox):
    """Where the teacher's entropy is the larger, forward KL weighs more, which spreads the student out; where the student's is,
    reverse KL, which draws it together: so that confidence is matched and not only the likeliest token. The weight of forward
    KL is sigmoid(sharpness * (H(p) - H(q))), and takes no gradient.

    The paper trains the teacher along; here it is the uncompressed model, and stays. See :class:`TrainPass` for the training
    fields.
    """

    taxon: ClassVar[Taxon] = Taxon.WHITE_BOX
    paper: ClassVar[str] = "2212.12965"
    sharpness: float = Field(1.0, ge=0, description="per nat of entropy; 0 weighs both alike")
    sample: Literal["window", "token"] = Field("window", description="over what entropies are averaged")

    def loss(self, student: Signal, teacher: Signal | None, batch: Batch) -> Tensor:
        """Mean over tokens of w KL(p || q) + (1 - w) KL(q || p), in nats."""

        def measures(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
            pair = student_logits, teacher_logits
            gap = entropy(teacher_logits, self.temperature) - entropy(student_logits.detach(), self.temperature)
            return torch.stack([forward_kl(*pair, self.temperature), reverse_kl(*pair, self.temperature), gap], -1)

        forward, reverse, gap = per_token(measures, student, self.given(teacher), chunk=self.chunk).unbind(-1)
        gap = gap.detach() if self.sample == "token" else window_means(gap.detach(), batch.windows)
        share = torch.sigmoid(self.sharpness * gap)
        return (share * forward + (1 - share) * reverse).mean()


def window_means(values: Tensor, windows: Tensor) -> Tensor:
    """Each value replaced by its window's mean. values: (tokens,). windows: (tokens,) int64. Returns (tokens,)."""
    sums = values.new_zeros(2, int(windows.max()) + 1).index_add(1, windows, torch.stack([values, torch.ones_like(values)]))
    return (sums[0] / sums[1])[windows]
