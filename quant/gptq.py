"""GPTQ: round one input at a time and let the inputs not yet rounded make up for the error, by the inverse Hessian of
the layer's output error (Frantar et al., 2210.17323)."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from compress.passes import Needs, Taxon
from compress.quant.grids import Grid, Quantizer, code_range, effective_group_size, fit_grid
from compress.quant.hessian import Plan, make_plan
from compress.quant.sweep import InputSweep
from compress.stats import LinearStats
from compress.weights import Weight


class GPTQ(Quantizer):
    """Integer codes that minimise the layer's output error on the calibration inputs, greedily.

    With ``act_order`` inputs are rounded in the order of falling second moment, and grids are fitted beforehand to the
    groups of the original order ("static groups"), so that the file needs no index of groups. Without it, a group's
    grid is fitted to its weights as they are when its turn comes. Weights outside a mask are rounded to zero, and the
    kept ones make up for that too. Inputs that were never active lose their weights, as in the published code.
    """

    taxon: ClassVar[Taxon] = Taxon.WEIGHT_ONLY
    paper: ClassVar[str] = "2210.17323"
    needs: ClassVar[Needs] = Needs(frozenset({"hessian"}))

    full_range: bool = Field(True, description="symmetric grids whose lowest code is the extreme weight, as AutoRound's")
    mse: bool = Field(True, description="search the range that rounds best instead of taking the extremes")
    act_order: bool = Field(True, description="round the inputs of largest second moment first")
    damping: float = Field(0.01, gt=0, le=1, description="added to the Hessian's diagonal, as a share of its mean")
    true_sequential: bool = Field(False, description="measure again after q/k/v, o and gate/up: slower, a little better")

    @property
    def sequential(self) -> bool:
        return self.true_sequential

    def linear(self, weight: Tensor, stats: LinearStats, mask: Tensor | None) -> Weight:
        return self.solve(weight.float(), weight.dtype, stats, mask)

    def solve(self, weight: Tensor, dtype: torch.dtype, stats: LinearStats, mask: Tensor | None) -> Weight:
        """As :meth:`linear`, of a float32 matrix to be stored in ``dtype``."""
        key = ("gptq", self.act_order, self.damping)
        plan = stats.cached(key, lambda: make_plan(stats.hessian, self.damping, self.act_order))
        values = weight.masked_fill(plan.dead, 0)
        kept = None
        if mask is not None:
            values.masked_fill_(~mask, 0)
            kept = mask.T[plan.order].contiguous()
        refit = None if self.act_order else lambda group: self.fit(group, dtype)
        size = effective_group_size(weight.shape[1], self.group_size)
        search = self.mse and refit is None  # a grid that will be fitted anew need not be a good one
        grid = fit_grid(values, self.bits, size, self.symmetric, search, dtype, self.full_range)
        sweep = Sweep(values.T[plan.order].contiguous(), plan, grid, refit, kept)
        sweep.run(0, len(plan.order))
        codes = sweep.codes[plan.order.argsort()].T.contiguous()
        return self.wrap(codes, sweep.grid(dtype), mask)


class Sweep(InputSweep):
    """One pass over the inputs of a matrix, rounding each and spreading its error over those to come.

    work: (in, out), the weights in the plan's order, transposed so that an input's weights are contiguous; overwritten
    by their residuals, weight minus rounded weight. grid: fitted to the original matrix. refit: None, or a function
    that fits the grid of one group (out, group) anew when the sweep reaches it. kept: (in, out) bool, in the plan's
    order, or None.
    """

    def __init__(self, work: Tensor, plan: Plan, grid: Grid, refit: Callable[[Tensor], Grid] | None, kept: Tensor | None):
        self.codes = torch.empty_like(work, dtype=torch.int8)
        self.scales = grid.scale.T.to(work.dtype, memory_format=torch.contiguous_format, copy=True)
        self.zeros = None if grid.zero_point is None else grid.zero_point.T.to(work.dtype).contiguous()
        self.group_size = len(work) // len(self.scales)
        self.groups = (plan.order // self.group_size).tolist()
        self.refit, self.kept, self.bits, self.rounded = refit, kept, grid.bits, torch.empty_like(work[0])
        super().__init__(work, plan, self.codes, [] if refit is None else [(self.group_size, Sweep._fit)])

    def grid(self, dtype: torch.dtype) -> Grid:
        """The grid that the codes are on, its scales in ``dtype``."""
        zero_point = None if self.zeros is None else self.zeros.T.to(torch.int8).contiguous()
        return Grid(self.scales.T.to(dtype).contiguous(), zero_point, self.bits)

    def _fit(self, start: int, stop: int) -> None:
        assert self.refit is not None
        work = self.work[start:stop] if self.kept is None else self.work[start:stop] * self.kept[start:stop]
        grid = self.refit(work.T)
        self.scales[start // self.group_size] = grid.scale.squeeze(1)
        if self.zeros is not None and grid.zero_point is not None:
            self.zeros[start // self.group_size] = grid.zero_point.squeeze(1)

    def replace(self, index: int, weights: Tensor, result: Tensor) -> Tensor:
        """The weights on the grid; their codes go to ``result``."""
        low, high = code_range(self.bits)
        scale = self.scales[self.groups[index]]
        torch.div(weights, scale, out=result).round_()
        if self.zeros is None:
            torch.mul(result.clamp_(low, high), scale, out=self.rounded)
        else:
            zero = self.zeros[self.groups[index]]
            torch.sub(result.add_(zero).clamp_(low, high), zero, out=self.rounded).mul_(scale)
        self.adjust(index, weights, result, self.rounded)
        return self.rounded

    def adjust(self, index: int, weights: Tensor, code: Tensor, rounded: Tensor) -> None:
        """Have the last word, in place, on what one input's weights (out,) were rounded to, before its error is spread."""
        if self.kept is not None:
            rounded.mul_(self.kept[index])
