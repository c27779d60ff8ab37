"""A grid of small groups whose scales lie on grids of their own."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compress.weights.matrix import Masked
from compress.weights.packing import pack_bits
from compress.weights.parts import PackedGrid

ROWS = 16
"""Rows whose scales share a second-level grid."""
SCALE_BITS = 3


@dataclass(frozen=True)
class Bilevel(PackedGrid):
    """An integer grid per group of consecutive inputs, ``dense = (codes - zero) * scale``, with scales of three bits:
    ``scale = base + scale_codes * step``, base and step shared by 16 rows.

    codes: (out, in) int8 in [-2**(bits-1), 2**(bits-1) - 1]. zero: (out, groups) int8 in the same range. scale_codes: (out,
    groups) int8, 0 to 7. base, step: (ceil(out / 16), groups) floating point. In the file all codes and zero-points are
    streams of bits.
    """

    kind = "bilevel"
    tensor_names = ("packed", "packed_zero", "packed_scale", "base", "step")
    codes: Tensor
    zero: Tensor
    scale_codes: Tensor
    base: Tensor
    step: Tensor
    bits: int

    def scale(self, dtype: torch.dtype) -> Tensor:
        """(out, groups), as a reader computes it in ``dtype``."""
        rows = torch.arange(len(self.codes), device=self.codes.device) // ROWS
        return self.base.to(dtype)[rows] + self.scale_codes.to(dtype) * self.step.to(dtype)[rows]

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or self.dtype
        codes = self.codes.unflatten(1, (self.zero.shape[1], -1)).to(dtype) - self.zero.to(dtype).unsqueeze(-1)
        return (codes * self.scale(dtype).unsqueeze(-1)).flatten(1)

    def sizes(self) -> dict[str, int]:
        return {"bits": self.bits, "n_groups": self.zero.shape[1]}

    def tensors(self) -> dict[str, Tensor]:
        return {
            "packed": pack_bits(self.codes, self.bits),
            "packed_zero": pack_bits(self.zero, self.bits),
            "packed_scale": pack_bits(self.scale_codes - 2 ** (SCALE_BITS - 1), SCALE_BITS),
            "base": self.base,
            "step": self.step,
        }

    @classmethod
    def assemble(cls, shape, sizes, tensors, children) -> Bilevel:
        from compress.stored_layers import unpack_bits

        bits, grid_shape = sizes["bits"], (shape[0], sizes["n_groups"])
        codes = unpack_bits(tensors["packed"], bits, shape[0] * shape[1]).reshape(shape)
        n_grids = grid_shape[0] * grid_shape[1]
        zero = unpack_bits(tensors["packed_zero"], bits, n_grids).reshape(grid_shape)
        scale_codes = unpack_bits(tensors["packed_scale"], SCALE_BITS, n_grids).reshape(grid_shape) + 2 ** (SCALE_BITS - 1)
        return cls(codes, zero, scale_codes, tensors["base"], tensors["step"], bits)

    def parameters(self) -> dict[str, Tensor]:
        return {"base": self.base, "step": self.step}

    def masked(self, mask: Tensor) -> Masked:
        size = self.shape[1] // self.zero.shape[1]
        zero = self.zero.repeat_interleave(size, dim=1)
        return Masked(replace(self, codes=torch.where(mask, self.codes, zero)), mask)
