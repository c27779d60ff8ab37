"""A weight that is trained by a low-rank change of it, and is merged with that change afterwards."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compress.weights import Dense, LowRank, Masked, Sum, Weight
from compress.weights.composed import unmasked


@dataclass(frozen=True)
class Adapted(Weight):
    """``base + up @ down``, of which only the factors are trained; where the base has a mask, the change is under it too.

    base: a matrix in any form. down: (rank, in), up: (out, rank), floating point.
    """

    base: Weight
    down: Tensor
    up: Tensor

    @classmethod
    def start(cls, base: Weight, rank: int, generator: torch.Generator) -> Adapted:
        """No change at first, as LoRA begins: ``down`` uniform within 1 / sqrt(in), like a new layer, and ``up`` zero."""
        n_outputs, n_inputs = base.shape
        down = (torch.rand(rank, n_inputs, generator=generator) * 2 - 1) / math.sqrt(n_inputs)
        return cls(base, down.to(base.dtype), torch.zeros(n_outputs, rank, dtype=base.dtype))

    @property
    def shape(self) -> tuple[int, int]:
        return self.base.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or self.dtype
        change = self.up.to(dtype) @ self.down.to(dtype)
        return self.base.dense(dtype) + (change if self.mask is None else change * self.mask)

    @property
    def nbytes(self) -> int:
        return self.merged().nbytes

    @property
    def numel(self) -> int:
        return self.merged().numel

    @property
    def mask(self) -> Tensor | None:
        return self.base.mask

    def parameters(self) -> dict[str, Tensor]:
        return {"down": self.down, "up": self.up}

    def rebuild(self, parameters: Mapping[str, Tensor]) -> Adapted:
        return replace(self, **parameters)

    def merged(self) -> Weight:
        """The base with its change in it, in the base's form: free values take it up. Any other form keeps it beside, in a sum;
        one with a mask cannot, and raises ValueError."""
        if isinstance(unmasked(self.base), Dense):
            values = Dense(self.dense(torch.float32).to(self.dtype))
            return values if self.mask is None else Masked(values, self.mask)
        if self.mask is not None:
            raise ValueError("a change beside a grid would fill the zeros of its mask")
        parts = self.base.parts if isinstance(self.base, Sum) else (self.base,)
        return Sum((*parts, LowRank(Dense(self.down), Dense(self.up))))
