"""QuIP: turn a layer into a basis in which neither its weights nor its inputs have outliers, and round there, spreading
errors by the inverse Hessian (Chee et al., 2307.13304; the randomised Hadamard basis is QuIP#'s, 2402.04396).

The papers' rounding (LDLQ) gives the numbers of GPTQ's, so GPTQ's is used. Their E8 codebook is not: codes are integers.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from compress.passes import Taxon
from compress.quant.gptq import GPTQ
from compress.quant.grids import GroupSize
from compress.quant.hadamard import random_signs
from compress.stats import LinearStats
from compress.weights import Incoherent, Weight
from compress.weights.incoherent import carry, turn


class QuIP(GPTQ):
    """GPTQ in a random orthonormal basis on both sides of each layer, whose weights look normally distributed there.

    No group needs a scale of its own in such a basis, so a row shares one by default, its range searched for. The basis
    is that of :func:`compress.loader.spread`, which needs no table for any width, after random signs: readers store a bit
    for each input and output, and transform what enters and leaves the layer. Removed weights would not stay zero in
    another basis, so a matrix with a mask is rounded in its own, as GPTQ does it.
    """

    taxon: ClassVar[Taxon] = Taxon.WEIGHT_ONLY
    paper: ClassVar[str] = "2307.13304"

    group_size: GroupSize = Field(None, description="consecutive inputs that share a scale; -1: the whole row")
    mse: bool = Field(True, description="search the range that rounds best instead of taking the extremes")
    seed: int = Field(0, ge=0, description="of the random signs")

    def linear(self, weight: Tensor, stats: LinearStats, mask: Tensor | None) -> Weight:
        if mask is not None:
            return super().linear(weight, stats, mask)
        n_outputs, n_inputs = weight.shape
        signs_in, signs_out = (self._signs(n, side).to(weight.device) for side, n in enumerate((n_inputs, n_outputs)))
        turned = stats.cached(("quip", self.seed), lambda: carry(stats, signs_in))
        dead = stats.hessian.diagonal() == 0  # their weights are worth nothing, yet would widen every range
        values = weight.float() if bool(dead.all()) else weight.float().masked_fill(dead, 0)
        inner = self.solve(turn(values, signs_in, signs_out), weight.dtype, turned, None)
        return Incoherent(inner, signs_in, signs_out)

    def _signs(self, n: int, side: int) -> Tensor:
        """(n,) int8. The same for all layers of a width, so that those with an input in common share their statistics."""
        return random_signs(n, 2 * self.seed + side).to(torch.int8)

    def outline(self, weight: Tensor, stats: LinearStats, mask: Tensor | None) -> Weight:
        inner = super().outline(weight, stats, mask)
        if mask is not None:
            return inner
        signs_out, signs_in = (torch.empty(n, dtype=torch.int8, device="meta") for n in weight.shape)
        return Incoherent(inner, signs_in, signs_out)
