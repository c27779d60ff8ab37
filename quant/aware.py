"""The base of the methods that train a model through the rounding of its weights."""

from __future__ import annotations

from abc import abstractmethod
from functools import partial

import torch
from pydantic import Field
from torch import Tensor

from compress.activations import Inputs
from compress.distill.objective import Objective
from compress.latent import latent, rounded
from compress.weights import Coded, Weight


class QuantizationAware(Objective):
    """Free weights in float32, which every step rounds to a grid that it fits to them, and whose gradients are those of the
    rounded ones; trained towards the uncompressed model's predictions, or by another ``objective``.

    What an earlier pass left of a matrix is what training begins with: masks, ranks and sparse parts stay, a grid does not. See
    :class:`TrainPass` for the training fields; ``weight_decay`` is of the free weights.
    """

    activations: Inputs | None = Field(
        None, description="round the layers' inputs too, token by token: int8, int4 or fp8; none: leave them"
    )

    @abstractmethod
    def grid(self, values: Tensor, kept: Tensor | None, dtype: torch.dtype) -> Coded:
        """The values (out, in) float32 on this pass's grid, with scales of ``dtype``; without gradients. kept: (out, in) bool,
        False where they are zero and are to stay so, or None. They may be meta tensors."""

    def adapt(self, weight: Weight, generator: torch.Generator) -> Weight:
        return latent(weight, lambda dtype: partial(self.grid, dtype=dtype), self.activations)

    def settle(self, weight: Weight) -> Weight:
        return rounded(weight)

    def outline(self, weight: Weight) -> Weight:
        return self.settle(self.adapt(weight, torch.Generator()))
