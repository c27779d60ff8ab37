"""DSnoT: after pruning, swap removed weights for kept ones of the same row, as long as that brings the row's mean output
closer to what it was (Zhang et al., 2310.08915)."""

from __future__ import annotations

import logging
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from compress.passes import CorrectionPass, Needs, Taxon
from compress.prune.masks import groups_of, wanda_scores
from compress.stats import LinearStats
from compress.weights import Dense, Masked, Weight

_INPUTS_PER_CYCLE, _MOST_CYCLES = 80, 50  # swapping a larger share of a narrow row undoes what the pruner chose

log = logging.getLogger(__name__)


class DSnoT(CorrectionPass):
    """No gradient and no second moment: the mean and the variance of each input tell which removed weight to take back, and
    Wanda's score which kept one to give for it.

    The error of a row is what its output has lost in the mean, ``sum (w_now - w_before) E[x]``. Of the removed weights that
    reduce it, the one of largest ``|w E[x]| / Var[x]**variance_power`` comes back, with the value it had; of the kept ones
    whose removal reduces it too, the one of lowest score goes. A swap is made only where the error shrinks. The number of
    weights in a row never changes, nor that in a group of M where the mask is N:M. Weights that were zero when the stage
    began stay zero. Layers that are not plain masked matrices are left as they are: it follows a pruner.
    """

    taxon: ClassVar[Taxon] = Taxon.UNSTRUCTURED
    paper: ClassVar[str] = "2310.08915"
    needs: ClassVar[Needs] = Needs(frozenset({"sum", "sqnorm"}))
    moves_masks: ClassVar[bool] = True

    cycles: int | None = Field(
        None, ge=1, description="swaps tried in each row; none: one for every 80 inputs, at most 50, as published for 4096"
    )
    tolerance: float = Field(0.1, ge=0, description="mean output error below which a row is left as it is")
    variance_power: float = Field(1.0, ge=0, description="how much inputs that vary are passed over")

    def correct(self, original: Tensor, weight: Weight, stats: LinearStats) -> Weight:
        if not isinstance(weight, Masked) or not isinstance(weight.inner, Dense):
            log.warning("a layer that is not a plain matrix with a mask was left as it is: dsnot follows a pruner")
            return weight
        if original.is_meta or stats.n == 0:
            return weight
        before, now = original.float(), weight.dense(torch.float32)
        mean = stats.sum / stats.n
        variance = (stats.sqnorm / stats.n - mean.square()).clamp_min(torch.finfo(torch.float32).tiny)
        swaps = Swaps(before * mean, now * mean, weight.kept, wanda_scores(now, stats), groups_of(weight.kept))
        n_cycles = self.cycles or min(max(len(mean) // _INPUTS_PER_CYCLE, 1), _MOST_CYCLES)
        swaps.offer(variance**self.variance_power, before != 0, n_cycles)
        kept = swaps.run(self.tolerance)
        return Masked(Dense(torch.where(weight.kept, weight.dense(), original) * kept), kept)


class Swaps:
    """The refinement of a mask.

    before, now: (out, in) float32, what each weight adds to its row's mean output, before pruning and since. kept: (out, in)
    bool. cost: (out, in), of removing a kept weight. group: inputs within which a swap must stay, None: the row.
    """

    def __init__(self, before: Tensor, now: Tensor, kept: Tensor, cost: Tensor, group: int | None):
        self.before, self.now, self.kept, self.group = before, now, kept.clone(), group
        self.cost = cost.masked_fill(~kept, torch.inf)
        self.error = (now - before).sum(1)

    def offer(self, variance: Tensor, existed: Tensor, n_cycles: int) -> None:
        """List the weights to swap, for errors below zero and above: at most one of each is needed in a cycle."""
        gain = (self.before.abs() / variance).masked_fill(self.kept | ~existed, -1)
        n_listed = min(n_cycles, self.kept.shape[1])
        self.gains, self.grown = zip(*(_first(gain, sign * self.before > 0, n_listed) for sign in (1, -1)), strict=True)
        _, self.pruned = zip(*(_first(-self.cost, sign * self.now < 0, n_listed) for sign in (1, -1)), strict=True)

    def run(self, tolerance: float) -> Tensor:
        """Swap until nothing in the lists helps; returns the mask."""
        rows = torch.arange(len(self.error), device=self.error.device)
        tried = torch.zeros(2, len(rows), dtype=torch.long, device=rows.device)
        gains, grown, pruned = torch.stack(self.gains), torch.stack(self.grown), torch.stack(self.pruned)
        for _ in range(grown.shape[2]):
            side = (self.error > 0).long()
            turn = tried[side, rows].clamp(max=grown.shape[2] - 1)
            grow, gain = grown[side, rows, turn], gains[side, rows, turn]
            options = pruned[side, rows] if self.group is None else self._group(grow)
            helps = self.now.gather(1, options) * self.error.unsqueeze(1) > 0
            cost, best = self.cost.gather(1, options).masked_fill(~helps, torch.inf).min(1)
            prune = options[rows, best]
            error = self.error + self.before[rows, grow] - self.now[rows, prune]
            better = (gain >= 0) & cost.isfinite() & (error.abs() < self.error.abs()) & (self.error.abs() > tolerance)
            tried[side, rows] += 1
            self._swap(rows[better], grow[better], prune[better])
            self.error = torch.where(better, error, self.error)
        return self.kept

    def _group(self, index: Tensor) -> Tensor:
        """The inputs in the groups of ``index`` (out,): (out, M)."""
        assert self.group is not None
        start = index // self.group * self.group
        return start.unsqueeze(1) + torch.arange(self.group, device=index.device)

    def _swap(self, rows: Tensor, grow: Tensor, prune: Tensor) -> None:
        """What has come back stays, its cost being infinite, and what has gone is in no list."""
        self.kept[rows, grow] = True
        self.kept[rows, prune] = False
        self.cost[rows, prune] = torch.inf


def _first(values: Tensor, wanted: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The n highest of each row of values (out, in) that are wanted, and where they are, the highest first."""
    return values.masked_fill(~wanted, -torch.inf).topk(n, dim=1)
