"""NVFP4: 4-bit floats (e2m1) with an 8-bit float per 16 inputs and one scale per matrix (NVIDIA, 2509.25149).

A group's scale usually brings its largest weight to 6. Between 4 and 6 there are no 4-bit floats, so a group with weights
there may do better with its largest at 4 (Cook et al., 2512.02010); the better of both for its squared error is taken.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from compress.passes import Taxon
from compress.quant.floats import E2M1_MAX, E4M3_LEAST, E4M3_MAX, FloatQuantizer, best_scale, to_e2m1, to_e4m3
from compress.weights import FloatQuantized


class NVFP4(FloatQuantizer):
    """4.5 bits a weight, rounded to nearest; inputs are left as they are."""

    taxon: ClassVar[Taxon] = Taxon.WEIGHT_ONLY
    paper: ClassVar[str] = "2509.25149"
    group: ClassVar[int] = 16

    mse: bool = Field(True, description="let a group's largest weight become 6 or 4, whichever rounds it better; else 6")

    def encode(self, values: Tensor, dtype: torch.dtype) -> FloatQuantized:
        groups = values.unflatten(1, (-1, self.group))
        largest = groups.abs().amax(2)
        whole = largest.max().reshape(1)
        global_scale = torch.where(whole == 0, 1, E4M3_MAX * E2M1_MAX / whole)
        scale = self._scale(largest * global_scale / E2M1_MAX)
        if self.mse:
            coarser = self._scale(largest * global_scale / 4)
            better = best_scale(groups, [scale.float() / global_scale, coarser.float() / global_scale])
            scale = torch.where(better == 1, coarser.float(), scale.float()).to(scale.dtype)
        codes = to_e2m1(groups / (scale.float() / global_scale).unsqueeze(-1)).flatten(1)
        return FloatQuantized(codes, scale, global_scale)

    def _scale(self, scale: Tensor) -> Tensor:
        return to_e4m3(scale.clamp_min(E4M3_LEAST))

    def empty(self, shape: tuple[int, int], dtype: torch.dtype) -> FloatQuantized:
        codes = torch.empty(shape, dtype=torch.uint8, device="meta")
        scale = torch.empty(shape[0], shape[1] // self.group, dtype=torch.float8_e4m3fn, device="meta")
        return FloatQuantized(codes, scale, torch.empty(1, device="meta"))
