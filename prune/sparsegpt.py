"""SparseGPT: prune one input at a time and let the inputs not yet reached make up for what is lost, by the inverse Hessian
of the layer's output error (Frantar and Alistarh, 2301.00774)."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from compress.passes import Needs, Taxon
from compress.prune.masks import Pattern, Pruner, check_divides, kept_of, lowest
from compress.quant.gptq import GPTQ, Sweep
from compress.quant.grids import GroupSize, effective_group_size, fit_grid
from compress.quant.hessian import Plan, make_plan
from compress.quant.sweep import InputSweep
from compress.stats import LinearStats
from compress.weights import Dense, Masked, Weight

_BLOCK = 128  # inputs whose weights compete


class SparseGPT(Pruner):
    """The mask is chosen as the sweep goes, for 128 inputs at a time (or for M, with a pattern N:M): the weights of lowest
    ``w**2 / U_jj**2`` go, the error that a removed weight w of input j would cause, w being what earlier removals made of it
    and U the factor of the inverse Hessian.

    With ``bits`` the kept weights are rounded in the same sweep, each group of them to a grid that is fitted when its turn
    comes, as GPTQ without ``act_order`` does it. Inputs that were never active lose their weights first.
    """

    taxon: ClassVar[Taxon] = Taxon.UNSTRUCTURED
    paper: ClassVar[str] = "2301.00774"
    needs: ClassVar[Needs] = Needs(frozenset({"hessian"}))

    pattern: Pattern = Field(
        "tensor", description="what competes in 128 inputs: tensor (all weights), row, or N:M (N kept of M consecutive inputs)"
    )
    damping: float = Field(0.01, gt=0, le=1, description="added to the Hessian's diagonal, as a share of its mean")
    bits: int | None = Field(None, ge=2, le=8, description="round what is kept to so many bits per weight; none: do not")
    group_size: GroupSize = Field(128, description="consecutive inputs that share a scale; -1: the whole row")
    symmetric: bool = Field(True, description="grids centred on zero, without zero-points")

    @property
    def quantizer(self) -> GPTQ | None:
        """What rounds the kept weights."""
        if self.bits is None:
            return None
        own = {"bits": self.bits, "group_size": self.group_size, "symmetric": self.symmetric}
        return GPTQ.model_validate(own | {"act_order": False})

    def linear(self, weight: Tensor, stats: LinearStats, mask: Tensor | None) -> Weight:
        check_divides(self.pattern, *weight.shape)
        plan = stats.cached(("sparsegpt", self.damping), lambda: make_plan(stats.hessian, self.damping, False))
        work = (weight.float() if mask is None else weight.float() * mask).T.contiguous()
        kept = torch.ones_like(work, dtype=torch.bool)
        quantizer = self.quantizer
        if quantizer is None:
            sweep = PruningSweep(work, plan, kept)
            self._run(sweep, plan, kept, mask, 0)
            return Masked(Dense(sweep.results.T.to(weight.dtype).contiguous()), kept.T.contiguous())
        work.masked_fill_(plan.dead.unsqueeze(1), 0)
        size = effective_group_size(len(work), self.group_size)
        unfitted = fit_grid(work.T, quantizer.bits, size, self.symmetric, False, weight.dtype)
        rounding = Sweep(work, plan, unfitted, lambda group: quantizer.fit(group, weight.dtype), kept)
        self._run(rounding, plan, kept, mask, size)
        return quantizer.wrap(rounding.codes.T.contiguous(), rounding.grid(weight.dtype), kept.T.contiguous())

    def _run(self, sweep: InputSweep, plan: Plan, kept: Tensor, mask: Tensor | None, group_size: int) -> None:
        """Run a sweep that reads ``kept`` (in, out), and fill that in as it goes."""
        assert plan.diagonal is not None
        diagonal = plan.diagonal.masked_fill(plan.dead, math.inf).unsqueeze(1)  # so that their weights score nothing

        def choose(sweep: InputSweep, start: int, stop: int) -> None:
            scores = (sweep.work[start:stop].T / diagonal[start:stop].T).square_()
            if mask is not None:
                scores.masked_fill_(~mask[:, start:stop], -math.inf)
            chosen = lowest(scores, self._share(len(scores), start, stop), self.pattern)
            kept[start:stop] = (chosen if mask is None else chosen & mask[:, start:stop]).T

        unit = self._unit(group_size)
        # The grid of a group of several units is fitted to a mask of the whole group, which is then chosen again.
        again = [(unit, choose)] if unit < group_size else []
        sweep.units = [(max(unit, group_size), choose), *sweep.units, *again]
        sweep.run(0, len(sweep.work))

    def _share(self, n_outputs: int, start: int, stop: int) -> float:
        """The sparsity of inputs start to stop: such that all units together lose as many weights as the whole would."""
        n_competing = n_outputs if self.pattern == "tensor" else 1
        before, after = (int(n_competing * n_inputs * self.sparsity) for n_inputs in (start, stop))
        return (after - before + 0.5) / (n_competing * (stop - start))  # half a weight is rounded down again

    def _unit(self, group_size: int) -> int:
        """Inputs whose mask is chosen at a time: a multiple of the group, or so many that no group or N:M is cut."""
        pattern = kept_of(self.pattern)
        if pattern is not None:
            n_together = pattern[1]
            return n_together if group_size % n_together == 0 else math.lcm(n_together, group_size)
        return _BLOCK // group_size * group_size if 0 < group_size < _BLOCK else _BLOCK

    def outline(self, weight: Tensor, stats: LinearStats, mask: Tensor | None) -> Weight:
        pruned = super().outline(weight, stats, mask)
        assert isinstance(pruned, Masked)
        return pruned if self.quantizer is None else replace(pruned, inner=self.quantizer.outline(weight, stats, None))


class PruningSweep(InputSweep):
    """A sweep that removes the weights at which ``kept`` (in, out) is False by the time it reaches them."""

    def __init__(self, work: Tensor, plan: Plan, kept: Tensor):
        super().__init__(work, plan, torch.empty_like(work))
        self.kept = kept

    def replace(self, index: int, weights: Tensor, result: Tensor) -> Tensor:
        return torch.mul(weights, self.kept[index], out=result)
