"""SpQR: GPTQ on very small groups whose scales are quantized too, while the few weights that no grid fits stay as they are
(Dettmers et al., 2306.03078)."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from compress.passes import LinearPass, Needs, Taxon
from compress.quant.bilevel import BilevelSweep
from compress.quant.grids import effective_group_size
from compress.quant.hessian import make_plan
from compress.stats import LinearStats
from compress.weights import Bilevel, Masked, Outliers, Sum, Weight
from compress.weights.bilevel import ROWS
from compress.weights.parts import index_dtype

_EXPECTED_OUTLIERS = 0.01  # of all weights, where a file's size is predicted; the paper's share


class SpQR(LinearPass):
    """A sum of a grid and its outliers, in the order of the inputs.

    An outlier is a weight whose squared error, over that of the inverse Hessian's factor, exceeds ``outlier_threshold`` times the
    mean variance of an input's weights over the same. Unlike in the published code, zero-points are integers of ``bits``
    bits, not fractions on a second grid: a removed weight is then exactly zero, and at 3 bits they take no more. A scale
    takes the best point of its second grid, not the nearest one.
    True bits per weight: bits + (bits + 3) / group_size, 2 more values for each 16 groups, and for each outlier its value
    and 16 bits of index.
    """

    taxon: ClassVar[Taxon] = Taxon.WEIGHT_ONLY
    paper: ClassVar[str] = "2306.03078"
    needs: ClassVar[Needs] = Needs(frozenset({"hessian"}))

    bits: int = Field(3, ge=2, le=8, description="bits per weight on the grid")
    group_size: int = Field(16, ge=2, description="consecutive inputs that share a scale")
    outlier_threshold: float = Field(0.2, ge=0, description="error above which a weight stays as it is; 0: every weight does")
    damping: float = Field(1.0, gt=0, le=10, description="added to the Hessian's diagonal, as a share of its mean")
    true_sequential: bool = Field(False, description="measure again after q/k/v, o and gate/up: slower, a little better")

    @property
    def sequential(self) -> bool:
        return self.true_sequential

    def linear(self, weight: Tensor, stats: LinearStats, mask: Tensor | None) -> Weight:
        plan = stats.cached(("spqr", self.damping), lambda: make_plan(stats.hessian, self.damping, False))
        assert plan.diagonal is not None
        values = weight.float().masked_fill(plan.dead, 0)
        values = values if mask is None else values * mask
        threshold = self.outlier_threshold * float((values.var(0, correction=0) / plan.diagonal.square()).mean())
        size = effective_group_size(weight.shape[1], self.group_size)
        sweep = BilevelSweep(values, plan, threshold, self.bits, size, weight.dtype, mask)
        sweep.run(0, weight.shape[1])
        outliers, grid = sweep.outliers.T, sweep.weight()
        rounded = grid if mask is None else grid.masked(mask & ~outliers)
        return Sum((rounded, Outliers.of(sweep.kept_values.T.to(weight.dtype), outliers)))

    def outline(self, weight: Tensor, stats: LinearStats, mask: Tensor | None) -> Weight:
        n_outputs, n_inputs = weight.shape
        n_groups, n_outliers = n_inputs // effective_group_size(n_inputs, self.group_size), self._n_outliers(weight)
        codes, zero, scale_codes = (_empty(n_outputs, n, torch.int8) for n in (n_inputs, n_groups, n_groups))
        base, step = (_empty(math.ceil(n_outputs / ROWS), n_groups, weight.dtype) for _ in range(2))
        grid = Bilevel(codes, zero, scale_codes, base, step, self.bits)
        values, columns = (torch.empty(n_outliers, dtype=t, device="meta") for t in (weight.dtype, index_dtype(n_inputs)))
        outliers = Outliers(values, columns, torch.empty(n_outputs + 1, dtype=torch.int32, device="meta"), n_inputs)
        return Sum((grid if mask is None else Masked(grid, mask.to("meta")), outliers))

    def _n_outliers(self, weight: Tensor) -> int:
        return round(weight.numel() * (_EXPECTED_OUTLIERS if self.outlier_threshold else 1))


def _empty(n_rows: int, n_columns: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(n_rows, n_columns, dtype=dtype, device="meta")
