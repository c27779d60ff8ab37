"""Number grids: codes of a few bits, integers or small floats, and scales that they are multiplied by."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from compress.activations import Inputs
from compress.weights.matrix import Masked, Weight

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""What the low three bits of a 4-bit float stand for; the fourth is the sign."""


class Coded(Weight):
    """A matrix on a number grid. library: what reads it. codes: (out, in). scale: (out or 1, groups).
    bits: per code. inputs: how readers round what enters the layer, None: not at all."""

    library: ClassVar[str] = "compressed-tensors"
    codes: Tensor
    scale: Tensor
    inputs: Inputs | None

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def group_size(self) -> int:
        """Inputs that share a scale; the whole row where there is one group."""
        return self.shape[1] // self.scale.shape[1]

    def layer(self, dtype: torch.dtype) -> Callable[[Tensor, Tensor | None], Tensor] | None:
        """How a reader's layer gets its outputs from inputs of ``dtype`` and a bias, where that is no product with
        ``dense(dtype)``; None: it is one. Gradients flow to the inputs."""
        return None

    @property
    def numel(self) -> int:
        return self.codes.numel()


@dataclass(frozen=True)
class Quantized(Coded):
    """An integer grid per group of consecutive inputs: ``dense = (codes - zero_point) * scale``.

    codes: (out, in) int8 in [-2**(bits-1), 2**(bits-1) - 1]. scale: (out, groups) floating point.
    zero_point: (out, groups) int8 in the codes' range, or None for a symmetric grid.
    mixed: the file has other schemes as well. Then stock readers take a grid with zero points only if these are not
    packed, and compute it like a symmetric one; without others they unpack it while loading, in the dtype of its scales.
    plain: 8-bit codes stand in the file as bytes, as readers want them of an embedding.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bits: int
    inputs: Inputs | None = None
    mixed: bool = False
    plain: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return self.scale.dtype

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        out_features, in_features = self.shape
        dtype = dtype or self.dtype
        reader = dtype if self.zero_point is None or self.mixed else self.dtype
        codes = self.codes.reshape(out_features, -1, self.group_size).to(reader)
        if self.zero_point is not None:
            codes = codes - self.zero_point.to(reader).unsqueeze(-1)
        return (codes * self.scale.to(reader).unsqueeze(-1)).reshape(out_features, in_features).to(dtype)

    @property
    def packed(self) -> bool:
        """Whether the file packs the codes. Not those of 8 bits with a scale per row and rounded inputs: as plain bytes
        they are what runtimes know as W8A8."""
        w8a8 = self.inputs and self.bits == 8 and self.scale.shape[1] == 1 and self.zero_point is None
        return not (w8a8 or self.plain)

    @property
    def values_nbytes(self) -> float:
        """Bytes of the codes alone, packed without padding."""
        return self.codes.numel() * self.bits / 8

    @property
    def nbytes(self) -> int:
        out_features, in_features = self.shape
        n_bytes = self.scale.numel() * self.scale.element_size()
        if not self.packed:
            return n_bytes + self.codes.numel()
        n_bytes += 4 * out_features * math.ceil(in_features * self.bits / 32) + 16  # and weight_shape, two int64
        if self.zero_point is not None:  # packed along the outputs
            packed = 4 * math.ceil(out_features * self.bits / 32) * self.scale.shape[1]
            n_bytes += self.zero_point.numel() if self.mixed else packed
        return n_bytes

    @property
    def ideal_nbytes(self) -> float:
        zero_points = 0 if self.zero_point is None else self.zero_point.numel() * self.bits / 8
        return self.values_nbytes + self.scale.numel() * self.scale.element_size() + zero_points

    def parameters(self) -> dict[str, Tensor]:
        return {"scale": self.scale}

    def shares(self) -> dict[str, float]:
        return {"scale": 2.0 ** (1 - self.bits)}

    def rebuild(self, parameters: Mapping[str, Tensor]) -> Quantized:
        return replace(self, scale=parameters["scale"])

    def masked(self, mask: Tensor) -> Masked:
        zero = 0 if self.zero_point is None else self.zero_point.repeat_interleave(self.group_size, dim=1)
        return Masked(replace(self, codes=torch.where(mask, self.codes, zero).to(torch.int8)), mask)


@dataclass(frozen=True)
class FloatQuantized(Coded):
    """A grid of small floats: ``dense = values * scale``.

    codes: (out, in), float8_e4m3fn, or uint8 for 4-bit floats (see ``E2M1``; sign * 8 + index). scale: of 8-bit floats
    floating point, (out, 1), or (1, 1) for one that all share. Of 4-bit ones either (out, in / 32) uint8, exponents of two
    plus 127 (MXFP4), or (out, in / 16) float8_e4m3fn to be divided by global_scale, (1,) float32 (NVFP4).

    Readers multiply 4-bit floats out in bfloat16, whatever they compute in, so that is their dtype here. Where all grids of
    a file are of one such kind it is marked to be unpacked while loading, and then opens in every dtype; beside other
    grids, or with a rounded KV cache, stock transformers opens them in bfloat16 only. Their scales are not trained.
    """

    codes: Tensor
    scale: Tensor
    global_scale: Tensor | None = None
    inputs: Inputs | None = None

    @property
    def bits(self) -> int:
        """8 or 4."""
        return 4 if self.codes.dtype == torch.uint8 else 8

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.bits == 4 else self.scale.dtype

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or self.dtype
        if self.bits == 8:
            return self.codes.to(dtype) * self.scale.to(dtype)
        if self.global_scale is None:
            scale = torch.exp2(self.scale.float() - 127)
        else:
            scale = self.scale.float() / self.global_scale.to(self.scale.device)
        levels = torch.tensor([*E2M1, *(-value for value in E2M1)], device=self.codes.device)
        values = levels[self.codes.int()].unflatten(1, (self.scale.shape[1], -1))
        return (values * scale.unsqueeze(-1)).flatten(1).to(torch.bfloat16).to(dtype)

    @property
    def values_nbytes(self) -> float:
        return self.codes.numel() * self.bits / 8

    @property
    def nbytes(self) -> int:
        scales = self.scale.numel() * self.scale.element_size() + (4 if self.global_scale is not None else 0)
        return self.codes.numel() * self.bits // 8 + scales

    def parameters(self) -> dict[str, Tensor]:
        return {"scale": self.scale} if self.bits == 8 else {}

    def shares(self) -> dict[str, float]:
        return dict.fromkeys(self.parameters(), 1 / torch.finfo(torch.float8_e4m3fn).max)

    def rebuild(self, parameters: Mapping[str, Tensor]) -> FloatQuantized:
        return replace(self, **parameters)

    def masked(self, mask: Tensor) -> Masked:
        codes = self.codes.view(torch.uint8).masked_fill(~mask, 0).view(self.codes.dtype)
        return Masked(replace(self, codes=codes), mask)
