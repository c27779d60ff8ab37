"""LoRA: heal by training a low-rank change of every layer instead of the layer, and merge it under the mask (Hu et al.,
2106.09685).

A compressed model has lost little that many parameters would be needed for, and AdamW keeps two numbers for each of them: with
rank 8 that is some hundredth of what training all weights takes. Pruned weights stay pruned (the change is masked while it
is trained, as in LoRAPrune, 2305.18403), factors of low-rank layers keep their rank, and beside a grid the change stays what it
is, as in INT2.1 (2306.08162), or ends in the grid's zero-points (QA-LoRA, 2309.14717).
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field

from compress.adapted import Adapted, Corrected, Pooled
from compress.distill.logit_kd import LogitKD
from compress.passes import Taxon
from compress.weights import Affine, Dense, Quantized, Weight
from compress.weights.composed import unmasked


class LoRA(LogitKD):
    """Low-rank changes, trained towards the uncompressed model's predictions by the loss of ``logit_kd``.

    Dense matrices take the change up, and so do the kept weights of masked ones and the factors of low-rank ones: they
    take as many bytes as before; with ``merge=false`` they keep it beside them, and ``compress export --to peft`` makes an
    adapter of it. A matrix on a grid keeps the change beside it (``grids=beside``, at 16 bits per factor entry), or lets integer
    grids have their zero-points moved by fractions: by a change of the given rank in the sums of the inputs that share a scale,
    as in QA-LoRA (``grids=pooled``), or freely, since those are the numbers that such changes end in (``grids=zeros``). A masked
    grid has neither, and one that rounds its inputs neither: of these the scales are trained.
    """

    taxon: ClassVar[Taxon] = Taxon.WHITE_BOX
    paper: ClassVar[str] = "2106.09685"

    rank: int = Field(8, ge=1, description="rank of the changes")
    learning_rate: float = Field(1e-3, gt=0, description="peak, followed by the schedule's fall")
    trains: Literal["weights", "blocks", "everything"] = Field(
        "weights", description="weights: the changes alone; blocks: norms and biases too; everything: embeddings and head too"
    )
    grids: Literal["beside", "pooled", "zeros"] = Field("beside", description="where the change of a matrix on a grid goes")
    merge: bool = Field(True, description="let dense matrices take up their change; false: it stays beside, for export to peft")

    def adapt(self, weight: Weight, generator: torch.Generator) -> Weight:
        inner = unmasked(weight)
        if (weight.mask is not None and not isinstance(inner, Dense)) or getattr(inner, "inputs", None):
            return weight
        if self.grids != "beside" and isinstance(inner, Quantized | Affine):
            grid = _with_fractional_zeros(inner)
            return grid if self.grids == "zeros" else Pooled.start(grid, self.rank, generator)
        return Corrected.start(weight, min(self.rank, *weight.shape), generator)

    def settle(self, weight: Weight) -> Weight:
        if self.merge or isinstance(weight, Pooled) or not isinstance(weight, Adapted):
            return super().settle(weight)
        return weight.beside()

    def outline(self, weight: Weight) -> Weight:
        return self.settle(self.adapt(weight, torch.Generator()).map(lambda tensor: tensor.to("meta")))


def _with_fractional_zeros(weight: Quantized | Affine) -> Affine:
    """The same matrix, with zero-points that can be trained."""
    if isinstance(weight, Affine):
        zero = weight.zero.to(weight.scale.dtype)
    else:
        zero = torch.zeros_like(weight.scale) if weight.zero_point is None else weight.zero_point.to(weight.scale.dtype)
    return Affine(weight.codes, weight.scale, zero, weight.bits)
