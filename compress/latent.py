"""Matrices that are trained through the rounding to a grid: free values, rounded anew whenever the matrix is asked for, with
gradients as if they were not (the straight-through estimator of a whole quantizer)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.activations import Inputs
from compress.weights import Coded, Composed, Provisional, SparsePart, Weight
from compress.weights.composed import unmasked

Rounding = Callable[[Tensor, Tensor | None], Coded]
"""(values (out, in) float32, which of them are kept (out, in) bool or None: all) -> a grid. Those that are not kept are zero, and
are to stay so."""


@dataclass(frozen=True)
class Latent(Provisional):
    """``rounding(values)``. values: (out, in) float32. kept: (out, in) bool, False where a weight was removed, or None.
    inputs: how readers round what enters the layer."""

    values: Tensor
    kept: Tensor | None
    rounding: Rounding
    inputs: Inputs | None = None

    def grid(self) -> Coded:
        """The values on their grid."""
        return self.rounding(self.values if self.kept is None else self.values * self.kept, self.kept)

    def final(self) -> Weight:
        """The values on their grid, under the mask that there is."""
        return self.grid() if self.kept is None else self.grid().masked(self.kept)

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.grid().dtype

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        with torch.no_grad():
            rounded = self.final().dense(dtype)
        values = self.values if self.kept is None else self.values * self.kept
        return rounded + (values - values.detach()).to(rounded.dtype)  # which adds nothing but the way back for gradients

    @property
    def mask(self) -> Tensor | None:
        return self.kept

    def parameters(self) -> dict[str, Tensor]:
        return {"values": self.values}


def latent(weight: Weight, rounding: Callable[[torch.dtype], Rounding], inputs: Inputs | None = None) -> Weight:
    """A weight whose matrices are latent: itself, or those that it is made of, less sparse parts of sums. rounding: for scales of
    a dtype, that of the matrix."""

    def of_matrix(matrix: Weight) -> Latent:
        return Latent(matrix.dense(torch.float32), matrix.mask, rounding(matrix.dtype), inputs)

    return each_matrix(weight, of_matrix)


def rounded(weight: Weight) -> Weight:
    """What :func:`latent` made, on grids."""
    return each_matrix(weight, lambda matrix: matrix.final() if isinstance(matrix, Latent) else matrix)


def each_matrix(weight: Weight, change: Callable[[Weight], Weight]) -> Weight:
    """The weight with ``change`` of every matrix in it that is neither made of others nor a sparse part of a sum."""
    children = weight.children() if isinstance(weight, Composed) else {}
    if not isinstance(weight, Composed) or not children:
        return weight if isinstance(unmasked(weight), SparsePart) else change(weight)
    changed = {name: each_matrix(part, change) for name, part in children.items()}
    return type(weight).assemble(weight.shape, weight.sizes(), weight.tensors(), changed)
