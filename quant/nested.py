"""Nested: one set of integer codes whose leading bits are the codes at every smaller width, chosen so that all widths work: one
artifact for all sizes (Park et al., Any-Precision LLM, 2402.10517; Yi et al., One QuantLLM for ALL, 2405.20202)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from compress.passes import Needs, Taxon
from compress.quant.grids import GroupSize, effective_group_size
from compress.quant.hessian import make_plan
from compress.quant.nesting import Sweep, Widths, fit, refit
from compress.stacking import StackPass
from compress.stats import LinearStats
from compress.weights import BitPlanes, Masked, Weight


class Nested(StackPass):
    """Codes of ``bits`` bits whose leading ``least``, ... bits are codes of their own, with scales for each width.

    All widths are rounded in one sweep over the inputs, in which each hands its own error on to the inputs to come, as GPTQ
    does, and a code is chosen by the sum of the widths' squared errors, each times 2 to the power of ``balance`` for every bit: 0
    is for the narrowest codes first, 2 makes the same error in steps of the grid count alike. ``cycles`` of coordinate descent on
    the codes and of least squares for every width's scales follow, on the same sum. Zero-points nest like codes, and lie where
    the narrower grids' levels are nearest to the middle of the codes that they stand for.

    `compress open --bits 3` then makes an ordinary artifact of 3-bit grids of it, and `--size` one whose layers have the widths
    of the least disturbance that fit; in the artifact itself all bits count. Nesting has its price: a level of integer grids
    cannot lie in the middle of two finer ones, so that 3 bits are a quarter of a step off beside 4.
    """

    taxon: ClassVar[Taxon] = Taxon.WEIGHT_ONLY
    paper: ClassVar[str] = "2405.20202"
    needs: ClassVar[Needs] = Needs(frozenset({"hessian"}))

    bits: int = Field(4, ge=2, le=8, description="of the widest codes")
    least: int = Field(2, ge=2, le=8, description="of the narrowest codes")
    group_size: GroupSize = Field(128, description="consecutive inputs that share scales; -1: the whole row")
    balance: float = Field(
        0.5, ge=0, le=4, description="by which power of two a bit more makes an error count: higher for wide codes"
    )
    cycles: int = Field(3, ge=0, description="of coordinate descent on the codes and scales, after the sweep")
    damping: float = Field(0.01, gt=0, le=1, description="added to the Hessian's diagonal, as a share of its mean")

    @model_validator(mode="after")
    def _widths_rise(self) -> Nested:
        if self.least > self.bits:
            raise ValueError(f"least={self.least} is above bits={self.bits}, the width of the widest codes")
        return self

    @property
    def widths(self) -> Widths:
        """All widths, and what an error of each counts for."""
        return Widths(self.least, self.bits, self.balance)

    def linear(self, weight: Tensor, stats: LinearStats, mask: Tensor | None) -> Weight:
        plan = stats.cached(("gptq", True, self.damping), lambda: make_plan(stats.hessian, self.damping, True))
        values = weight.float().masked_fill(plan.dead, 0)
        values = values if mask is None else values.masked_fill(~mask, 0)
        grids = fit(values, self.widths, effective_group_size(weight.shape[1], self.group_size), weight.dtype)
        sweep = Sweep(values, plan, grids, mask)
        for _ in range(self.cycles):
            sweep.use(refit(values, sweep.codes(), sweep.grids, stats.hessian, weight.dtype))
            sweep.improve(stats.hessian, self.damping)
        codes = sweep.codes()
        scale = refit(values, codes, sweep.grids, stats.hessian, weight.dtype).scale.to(weight.dtype)
        planes = BitPlanes(codes, scale, grids.zero, self.bits, self.priorities(self.widths.count))
        return planes if mask is None else Masked(planes, mask)

    def outline(self, weight: Tensor, stats: LinearStats, mask: Tensor | None) -> Weight:
        n_outputs, n_inputs = weight.shape
        n_groups = n_inputs // effective_group_size(n_inputs, self.group_size)
        meta: dict[str, Any] = {"dtype": torch.int8, "device": "meta"}
        scale = torch.empty(self.widths.count, n_outputs, n_groups, dtype=weight.dtype, device="meta")
        planes = BitPlanes(
            torch.empty(n_outputs, n_inputs, **meta), scale, torch.empty(n_outputs, n_groups, **meta), self.bits,
            self.priorities(self.widths.count),
        )  # fmt: skip
        return planes if mask is None else Masked(planes, mask.to("meta"))
