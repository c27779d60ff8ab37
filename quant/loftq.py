"""LoftQ: a grid and a low-rank correction that make up for each other, found by rounding what the correction leaves and
approximating what the rounding leaves, in turn (Li et al., 2310.08659).

The factors start near the whole model, so training them alone recovers far more at two bits than from zero. That is what
INT2.1 does (2306.08162): ``loftq:bits=2 logit_kd:trains=weights`` trains the factors, and the scales of the grids, towards
the uncompressed model's predictions, while the codes stay as they are.
"""

from __future__ import annotations

import logging
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from compress.lowrank.factor import leading_directions, project
from compress.passes import Taxon
from compress.quant.grids import Quantizer, dequantize, quantize
from compress.stats import LinearStats
from compress.weights import Dense, LowRank, Sum, Weight

log = logging.getLogger(__name__)


class LoftQ(Quantizer):
    """A grid, rounded to nearest, plus a low-rank matrix; the best of a few rounds. Needs no data.

    A matrix too small for its correction to be smaller than itself (a factor of a low-rank layer, say) is only rounded, and
    so is one with removed weights, whose zeros a low-rank matrix would fill.
    """

    taxon: ClassVar[Taxon] = Taxon.WEIGHT_ONLY
    paper: ClassVar[str] = "2310.08659"

    rank: int = Field(16, ge=0, description="rank of the correction; 0: none, which is rounding to nearest")
    rounds: int = Field(5, ge=1, description="times that the matrix is rounded and its error approximated")

    def rank_of(self, n_outputs: int, n_inputs: int) -> int:
        """The correction's rank for an (out, in) matrix; 0 where it would hold as many numbers as the matrix."""
        return self.rank if self.rank * (n_outputs + n_inputs) < n_outputs * n_inputs else 0

    def linear(self, weight: Tensor, stats: LinearStats, mask: Tensor | None) -> Weight:
        rank, values = self.rank_of(*weight.shape), weight.double()
        if rank and mask is not None:
            log.warning("a layer with removed weights was rounded only: a low-rank correction would fill its zeros")
        if not rank or mask is not None:
            return self.nearest(weight, mask)
        correction, least, best = torch.zeros_like(values), torch.inf, None
        for _ in range(self.rounds):
            left = (values - correction).float()
            grid = self.fit(left, weight.dtype)
            codes = quantize(left, grid)
            error = values - dequantize(codes, grid, torch.float64)
            down, up = (factor.to(weight.dtype) for factor in project(error, leading_directions(error, rank)))
            correction = up.double() @ down.double()
            distance = float((error - correction).square().sum())
            if best is None or distance < least:
                least, best = distance, Sum((self.wrap(codes, grid, None), LowRank(Dense(down), Dense(up))))
        assert best is not None
        return best

    def outline(self, weight: Tensor, stats: LinearStats, mask: Tensor | None) -> Weight:
        (n_outputs, n_inputs), grid = weight.shape, super().outline(weight, stats, mask)
        rank = self.rank_of(n_outputs, n_inputs)
        if not rank or mask is not None:
            return grid
        down, up = (torch.empty(shape, dtype=weight.dtype, device="meta") for shape in ((rank, n_inputs), (n_outputs, rank)))
        return Sum((grid, LowRank(Dense(down), Dense(up))))
