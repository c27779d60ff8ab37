"""Weights that are trained by a change of them, and are merged with that change afterwards."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compress.weights import Affine, Dense, LowRank, Masked, Provisional, Sum, Weight
from compress.weights.composed import unmasked


@dataclass(frozen=True)
class Adapted(Provisional):
    """``base`` and a change, of which only the change is trained; where the base has a mask, the change is under it too."""

    base: Weight

    @abstractmethod
    def change(self) -> Weight:
        """What is added to the base, without its mask."""

    @property
    def shape(self) -> tuple[int, int]:
        return self.base.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or self.dtype
        change = self.change().dense(dtype)
        return self.base.dense(dtype) + (change if self.mask is None else change * self.mask)

    @property
    def mask(self) -> Tensor | None:
        return self.base.mask

    def final(self) -> Weight:
        """The base with its change in it, in the base's form: free values take it up. Any other form keeps it beside, in a sum;
        one with a mask cannot, and raises ValueError."""
        if isinstance(unmasked(self.base), Dense):
            values = Dense(self.dense(torch.float32).to(self.dtype))
            return values if self.mask is None else Masked(values, self.mask)
        return self.beside()

    def beside(self) -> Sum:
        """The base as it is, and its change. Raises ValueError where the base has a mask."""
        if self.mask is not None:
            raise ValueError("a change beside a matrix would fill the zeros of its mask; kept weights take it up (merge=true)")
        parts = self.base.parts if isinstance(self.base, Sum) else (self.base,)
        return Sum((*parts, self.change()))


@dataclass(frozen=True)
class Shifted(Adapted):
    """``base + shift``. shift: of the base's shape and dtype."""

    shift: Tensor

    def change(self) -> Dense:
        return Dense(self.shift)

    def parameters(self) -> dict[str, Tensor]:
        return {"shift": self.shift}


@dataclass(frozen=True)
class Corrected(Adapted):
    """``base + up @ down``. down: (rank, in), up: (out, rank), floating point."""

    down: Tensor
    up: Tensor

    @classmethod
    def start(cls, base: Weight, rank: int, generator: torch.Generator) -> Corrected:
        """No change at first, as LoRA begins: ``down`` uniform within 1 / sqrt(in), like a new layer, and ``up`` zero."""
        n_outputs, n_inputs = base.shape
        down = (torch.rand(rank, n_inputs, generator=generator) * 2 - 1) / math.sqrt(n_inputs)
        return cls(base, down.to(base.dtype), torch.zeros(n_outputs, rank, dtype=base.dtype))

    def change(self) -> LowRank:
        return LowRank(Dense(self.down), Dense(self.up))

    def parameters(self) -> dict[str, Tensor]:
        return {"down": self.down, "up": self.up}


@dataclass(frozen=True)
class Pooled(Adapted):
    """An integer grid and ``up @ down`` times the sums of its input groups: ``base.dense() + (up @ down)`` repeated over each
    group, which is what zero-points do (QA-LoRA, 2309.14717). down: (rank, groups), up: (out, rank)."""

    base: Affine
    down: Tensor
    up: Tensor

    @classmethod
    def start(cls, base: Affine, rank: int, generator: torch.Generator) -> Pooled:
        """No change at first; see :meth:`Corrected.start`."""
        n_outputs, n_groups = base.scale.shape
        begun = Corrected.start(Dense(base.scale), min(rank, n_outputs, n_groups), generator)
        return cls(base, begun.down / (base.shape[1] // n_groups) ** 0.5, begun.up)

    def change(self) -> Dense:
        product = self.up.float() @ self.down.float()
        return Dense(product.repeat_interleave(self.shape[1] // product.shape[1], dim=1).to(self.up.dtype))

    def parameters(self) -> dict[str, Tensor]:
        return {"down": self.down, "up": self.up}

    def final(self) -> Affine:
        """The grid with other zero-points. Where a scale is 0 there is nothing to move."""
        scale = self.base.scale.float()
        shift = torch.where(scale == 0, 0, self.up.float() @ self.down.float() / torch.where(scale == 0, 1, scale))
        return replace(self.base, zero=(self.base.zero.float() - shift).to(self.base.scale.dtype))
