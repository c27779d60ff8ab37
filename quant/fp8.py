"""FP8: round weights to 8-bit floats (e4m3) with a scale per output row, and inputs token by token (Micikevicius et al.,
2209.05433).

Floats keep their relative precision over 18 binary orders, so that a row's few large weights cost the small ones nothing,
and no calibration is needed.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from compress.passes import Taxon
from compress.quant.floats import E4M3_MAX, FloatQuantizer, to_e4m3
from compress.weights import FloatQuantized


class FP8(FloatQuantizer):
    """8-bit floats to nearest; the largest weight of a row (or of the matrix) becomes the largest float, 448."""

    taxon: ClassVar[Taxon] = Taxon.WEIGHT_ACTIVATION
    paper: ClassVar[str] = "2209.05433"

    scheme: Literal["channel", "tensor"] = Field("channel", description="one scale per output row, or for the whole matrix")
    activations: Literal["fp8"] | None = Field("fp8", description="round the layers' inputs too, token by token; none: do not")

    def encode(self, values: Tensor, dtype: torch.dtype) -> FloatQuantized:
        largest = values.abs().amax(1, keepdim=True) if self.scheme == "channel" else values.abs().max().reshape(1, 1)
        # The scale is rounded to how it will be stored before any weight is; a row of zeros may have any.
        scale = torch.where(largest == 0, 1, largest / E4M3_MAX).clamp_min(torch.finfo(dtype).tiny).to(dtype)
        return FloatQuantized(to_e4m3(values / scale.float()), scale, None, self.activations)

    def empty(self, shape: tuple[int, int], dtype: torch.dtype) -> FloatQuantized:
        codes = torch.empty(shape, dtype=torch.float8_e4m3fn, device="meta")
        scale = torch.empty(shape[0] if self.scheme == "channel" else 1, 1, dtype=dtype, device="meta")
        return FloatQuantized(codes, scale, None, self.activations)
