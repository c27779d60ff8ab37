"""MXFP4: 4-bit floats (e2m1) with a power of two per 32 inputs, the Open Compute Project's microscaling format (Rouhani et
al., 2310.10537).

The standard takes the power that brings a group's largest weight between 4 and 8, where above 6 it is clipped. The next
power clips nothing but is coarser; the better of both for the group's squared error is taken here.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from compress.passes import Taxon
from compress.quant.floats import FloatQuantizer, best_scale, to_e2m1
from compress.weights import FloatQuantized

_BIAS = 127


class MXFP4(FloatQuantizer):
    """4.25 bits a weight, rounded to nearest; inputs are left as they are."""

    taxon: ClassVar[Taxon] = Taxon.WEIGHT_ONLY
    paper: ClassVar[str] = "2310.10537"
    group: ClassVar[int] = 32

    mse: bool = Field(True, description="take the better of two powers of two, instead of the standard's")

    def encode(self, values: Tensor, dtype: torch.dtype) -> FloatQuantized:
        groups = values.unflatten(1, (-1, self.group))
        # frexp's mantissa is in [1/2, 1): a largest weight of m * 2**e is divided by 2**(e - 3), to lie in [4, 8).
        power = (groups.abs().amax(2).frexp().exponent - 3).clamp(-_BIAS, _BIAS - 1)
        if self.mse:
            power = power + best_scale(groups, [torch.exp2(power.float()), torch.exp2(power.float() + 1)]).int()
        codes = to_e2m1(groups / torch.exp2(power.float()).unsqueeze(-1)).flatten(1)
        return FloatQuantized(codes, (power + _BIAS).to(torch.uint8))

    def empty(self, shape: tuple[int, int], dtype: torch.dtype) -> FloatQuantized:
        codes, scale = (torch.empty(shape[0], n, dtype=torch.uint8, device="meta") for n in (shape[1], shape[1] // self.group))
        return FloatQuantized(codes, scale)
