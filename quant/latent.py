"""Weights that are trained in floating point and rounded whenever they are computed with: what quantization-aware training of a
whole model shares.

Of the two straight-through estimators this is the one that lets gradients through the whole quantizer as if it were not there:
the grid is fitted anew at every step and takes none of its own. The other, of grids that are learned, is ``compress/moving.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from compress.activations import Inputs
from compress.distill.objective import Objective
from compress.weights import Coded, Dense, Weight
from compress.weights.composed import unmasked

Quantize = Callable[[Tensor, Tensor | None, torch.dtype], Weight]
"""(values (out, in) float32, mask (out, in) bool or None, storage dtype) -> what is stored of them, zero outside the mask."""


class _StraightThrough(torch.autograd.Function):
    """The second, with gradients for the first: first + (second - first) would not give the same bits."""

    @staticmethod
    def forward(context: Any, values: Tensor, stored: Tensor) -> Tensor:
        return stored.view_as(stored)

    @staticmethod
    def backward(context: Any, *gradients: Any) -> Any:
        return gradients[0], None


@dataclass(frozen=True)
class Latent(Weight):
    """A matrix that is computed with as it would be stored by now.

    values: (out, in) float32. quantize: see ``Quantize``. storage: dtype of the floating-point parts of what is stored.
    kept: (out, in) bool or None, False where weights are removed for good.
    """

    values: Tensor
    quantize: Quantize
    storage: torch.dtype
    kept: Tensor | None = None

    def stored(self) -> Weight:
        """What the values have become."""
        return self.quantize(self.values.detach(), self.kept, self.storage)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        values = self.values if self.kept is None else self.values * self.kept
        return _StraightThrough.apply(values, self.stored().dense(dtype))  # type: ignore[no-any-return]

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.storage

    @property
    def inputs(self) -> Inputs | None:
        """How readers of what is stored round what enters the layer."""
        return getattr(unmasked(self.stored()), "inputs", None)

    @property
    def mask(self) -> Tensor | None:
        return self.kept

    @property
    def nbytes(self) -> int:
        return self.stored().nbytes

    @property
    def numel(self) -> int:
        return self.stored().numel

    def parameters(self) -> dict[str, Tensor]:
        return {"values": self.values}

    def rebuild(self, parameters: Mapping[str, Tensor]) -> Latent:
        return replace(self, **parameters)  # type: ignore[arg-type]


class LatentPass(Objective):
    """A training pass that ends on a grid and rounds to it at every step.

    Plain and masked matrices, factors of low-rank layers, and plain grids of earlier passes, which are opened, are trained so;
    layers of another form in that form. Says by :meth:`quantize` what is stored.
    """

    regrids: ClassVar[bool] = True

    def quantize(self, values: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Weight:
        """What is stored of values (out, in) float32, with floating-point parts of ``dtype``; zero where ``mask`` is False."""
        raise NotImplementedError(type(self).__name__)

    def quantized(self, shape: tuple[int, int], mask: Tensor | None, dtype: torch.dtype) -> Weight:
        """What :meth:`quantize` makes of such values, of meta tensors. Raises ValueError where it cannot."""
        raise NotImplementedError(type(self).__name__)

    def adapt(self, weight: Weight, generator: torch.Generator) -> Weight:
        return Latent(weight.dense(torch.float32), self.quantize, weight.dtype, weight.mask) if _is_plain(weight) else weight

    def settle(self, weight: Weight) -> Weight:
        return weight.stored() if isinstance(weight, Latent) else weight

    def outline(self, weight: Weight) -> Weight:
        return self.quantized(weight.shape, weight.mask, weight.dtype) if _is_plain(weight) else weight


def _is_plain(weight: Weight) -> bool:
    """Whether a layer or factor is one matrix that a stock layer holds."""
    return isinstance(unmasked(weight), Dense | Coded)
