"""BitNet b1.58: train a model through the rounding of its weights to -1, 0 and 1, times their mean magnitude (Ma et al.,
2402.17764)."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from compress.passes import Taxon
from compress.quant.aware import QuantizationAware
from compress.weights import Quantized

_LEAST_SCALE = 1e-5
_THRESHOLD = 0.7  # of the mean magnitude, below which TWN's weights are zero


class BitNet(QuantizationAware):
    """Ternary weights, ``scale * round(w / scale)`` within one step, and a scale for each matrix.

    With ``levels=absmean`` the scale is the mean of the magnitudes, as in BitNet and Spectra (2407.12327); with ``levels=twn``
    weights above 0.7 of that mean are rounded away from zero, and the scale is the mean of their magnitudes (ternary weight
    networks, as TSLD, 2308.06744, trains them). The papers train from scratch, with norms before the layers and inputs rounded
    to 8 bits (``activations=int8``, which Spectra leaves out). Here training begins with the model's own weights, of which
    rounding at first leaves next to nothing, so it takes hundreds of steps and more.

    The grid has 2 bits, of whose codes -2 is not used. See :class:`TrainPass` for the training fields.
    """

    taxon: ClassVar[Taxon] = Taxon.QAT
    paper: ClassVar[str] = "2402.17764"

    learning_rate: float = Field(1e-3, gt=0, description="peak, followed by the schedule's fall")
    levels: Literal["absmean", "twn"] = Field("absmean", description="absmean: BitNet's scale and threshold; twn: TWN's")
    per_row: bool = Field(False, description="a scale for every output instead of one for the matrix")

    def grid(self, values: Tensor, kept: Tensor | None, dtype: torch.dtype) -> Quantized:
        codes, scale = ternary(values, kept, self.levels, self.per_row, dtype)
        return Quantized(codes, scale.expand(len(values), 1).contiguous(), None, 2, self.activations)


def ternary(
    values: Tensor, kept: Tensor | None, levels: str, per_row: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Codes (out, in) int8, -1 to 1, and their scale, (out, 1) where ``per_row``, else (1, 1), of ``dtype``.

    values: (out, in) float32, zero where they are not kept, (out, in) bool. levels: "absmean" or "twn".
    """
    size = values.abs()
    mean = _mean(size, torch.ones_like(size) if kept is None else kept.to(size), per_row)
    if levels == "absmean":
        scale = mean.clamp_min(_LEAST_SCALE).to(dtype)
        return torch.round(values / scale.float()).clamp_(-1, 1).to(torch.int8), scale
    large = size > _THRESHOLD * mean
    scale = _mean(size, large.to(size), per_row).clamp_min(_LEAST_SCALE).to(dtype)
    return (values.sign() * large).to(torch.int8), scale


def _mean(values: Tensor, counted: Tensor, per_row: bool) -> Tensor:
    """The mean over those values that count, 1 and not 0: (out, 1) or (1, 1)."""
    total, count = ((part.sum(1, keepdim=True) if per_row else part.sum().view(1, 1)) for part in (values * counted, counted))
    return total / count.clamp_min(1)
