"""OWQ: GPTQ that leaves out the few inputs whose rounding would hurt most, and keeps their whole columns (Lee et al.,
2306.02272)."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from compress.passes import Taxon
from compress.quant.gptq import GPTQ, Sweep
from compress.quant.grids import dequantize, quantize
from compress.quant.hessian import make_plan
from compress.stats import LinearStats
from compress.weights import Columns, Sum, Weight
from compress.weights.composed import unmasked


class OWQ(GPTQ):
    """A grid without the weak columns, plus those columns.

    Weak are the inputs of largest ``H_jj |W_j - rounded W_j|**2``. They come last in the order, so that they take up the
    errors of all the others, and the grids, fitted beforehand, need not span them. Under a mask removed weights stay zero
    in the kept columns too.
    """

    taxon: ClassVar[Taxon] = Taxon.WEIGHT_ONLY
    paper: ClassVar[str] = "2306.02272"

    extra_bits: float = Field(0.1, ge=0, description="bits per weight that the kept columns add: 0.1 makes 3 bits 3.1")
    columns: int | None = Field(None, ge=0, description="number of kept columns, instead of what extra_bits gives")

    def n_columns(self, n_inputs: int, dtype: torch.dtype) -> int:
        """Kept columns of a matrix with that many inputs: what the extra bits pay for in that dtype, but at least one."""
        if self.columns is None:
            return max(int(self.extra_bits > 0), min(n_inputs, round(n_inputs * self.extra_bits / (8 * dtype.itemsize))))
        return min(self.columns, n_inputs)

    def linear(self, weight: Tensor, stats: LinearStats, mask: Tensor | None) -> Weight:
        n_inputs, n_kept = weight.shape[1], self.n_columns(weight.shape[1], weight.dtype)
        if not n_kept:
            return super().linear(weight, stats, mask)
        values = weight.float() if mask is None else weight.float() * mask
        weak = self._weak(values, stats.hessian.diagonal(), n_kept, weight.dtype)
        plan = make_plan(stats.hessian, self.damping, self.act_order, last=weak)
        values = values.masked_fill(plan.dead, 0)
        grid = self.fit(values.masked_fill(weak, 0), weight.dtype)
        kept = None if mask is None else mask.T[plan.order].contiguous()
        sweep, first = Sweep(values.T[plan.order].contiguous(), plan, grid, None, kept), n_inputs - n_kept
        if first:
            sweep.run(0, first)
        last = sweep.work[first:].addmm(plan.factor[:first, first:].T, sweep.work[:first], alpha=-1)
        last = last if kept is None else last * kept[first:]
        sweep.codes[first:] = 0
        codes = sweep.codes[plan.order.argsort()].T.contiguous()
        rounded = self.wrap(codes, grid, ~weak if mask is None else mask & ~weak)
        indices, by_index = plan.order[first:].sort()
        columns = Columns(last[by_index].T.contiguous().to(weight.dtype), indices.to(torch.int32), n_inputs)
        return Sum((unmasked(rounded) if mask is None else rounded, columns))

    def _weak(self, values: Tensor, energy: Tensor, n_kept: int, dtype: torch.dtype) -> Tensor:
        """The inputs to keep, (in,) bool. values: (out, in); energy: (in,), the Hessian's diagonal."""
        grid = self.fit(values, dtype)
        error = (values - dequantize(quantize(values, grid), grid)).square().sum(0)
        weak = torch.zeros(values.shape[1], dtype=torch.bool, device=values.device)
        weak[(error * energy).argsort(descending=True, stable=True)[:n_kept]] = True
        return weak

    def outline(self, weight: Tensor, stats: LinearStats, mask: Tensor | None) -> Weight:
        (n_outputs, n_inputs), n_kept = weight.shape, self.n_columns(weight.shape[1], weight.dtype)
        if not n_kept:
            return super().outline(weight, stats, mask)
        values = torch.empty(n_outputs, n_kept, dtype=weight.dtype, device="meta")
        columns = Columns(values, torch.empty(n_kept, dtype=torch.int32, device="meta"), n_inputs)
        return Sum((super().outline(weight, stats, mask), columns))
