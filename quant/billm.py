"""BiLLM: one sign and one of two scales for a weight, two signs in the few columns that matter most, block after block, the
errors of each made up for by those to come (Huang et al., 2402.04291)."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from compress.passes import LinearPass, Needs, Taxon
from compress.quant.codebooks import refuse_mask
from compress.quant.hessian import Plan, make_plan
from compress.quant.sweep import InputSweep
from compress.stats import LinearStats
from compress.weights import Binary, Weight
from compress.weights.binary import NO_ZEROS

_SHARES = torch.linspace(0.1, 0.9, 81)
"""Of a block's weights, those that the candidates for the middle of the bell have."""


class BiLLM(LinearPass):
    """Weights on two pairs of levels, chosen block by block and row by row.

    What a block's salient columns are is told by ``w**2 / U_jj**2`` summed over a column, U the factor of the inverse Hessian:
    the first k of them for which binarising them and the others apart is nearest to the block. Of the others' magnitudes, the
    best of 81 quantiles splits the middle of the bell from its tails, each binarised by itself. Searches go by the weights, as in the
    paper; the published code's go by that metric. The error of a block is carried on to the next ones exactly, by the block of U.

    True bits per weight: 2, of which one is a sign, and one says where in the bell it is, or is the second sign; and
    4 scales (with means 7 numbers) per row and block: 2.5 (2.875) with blocks of 128 in a 16-bit file. The paper's 1.08 leaves all
    but the signs out.
    """

    taxon: ClassVar[Taxon] = Taxon.WEIGHT_ONLY
    paper: ClassVar[str] = "2402.04291"
    needs: ClassVar[Needs] = Needs(frozenset({"hessian"}))

    block_size: int = Field(128, ge=8, description="consecutive columns that share scales")
    salient: int = Field(50, ge=1, description="most salient columns of a block")
    means: bool = Field(True, description="count weights from the mean of their kind, as published; false: from zero")
    damping: float = Field(0.01, gt=0, le=10, description="added to the Hessian's diagonal, as a share of its mean")
    true_sequential: bool = Field(False, description="measure again after q/k/v, o and gate/up: slower, a little better")

    @property
    def sequential(self) -> bool:
        return self.true_sequential

    def linear(self, weight: Tensor, stats: LinearStats, mask: Tensor | None) -> Weight:
        refuse_mask(mask, NO_ZEROS)
        plan = stats.cached(("billm", self.damping), lambda: make_plan(stats.hessian, self.damping, False))
        work = weight.float().masked_fill(plan.dead, 0).T.contiguous()
        sweep = BinarySweep(work, plan, self.block_size, self.salient, self.means, weight.dtype)
        sweep.run(0, len(work))
        return sweep.weight()

    def outline(self, weight: Tensor, stats: LinearStats, mask: Tensor | None) -> Weight:
        refuse_mask(mask, NO_ZEROS)
        n_outputs, n_inputs = weight.shape
        scale = torch.empty(n_outputs, -(-n_inputs // self.block_size), 4, dtype=weight.dtype, device="meta")
        codes = torch.empty(n_outputs, n_inputs, dtype=torch.int8, device="meta")
        salient = torch.empty(n_inputs, dtype=torch.bool, device="meta")
        return Binary(codes, salient, scale, scale[..., :3] if self.means else None, self.block_size)


class BinarySweep(InputSweep):
    """A sweep that binarises a block of inputs when its turn comes, and then replaces their weights by what was found.

    n_salient: most salient columns of a block. centred: whether weights have means. dtype: of scales and means.
    """

    def __init__(self, work: Tensor, plan: Plan, block_size: int, n_salient: int, centred: bool, dtype: torch.dtype):
        super().__init__(work, plan, torch.empty_like(work), [(block_size, BinarySweep._binarise)])
        assert plan.diagonal is not None
        self.diagonal, self.n_salient, self.centred, self.dtype = plan.diagonal, n_salient, centred, dtype
        self.block_size, self.blocks = block_size, list[Binary]()

    def _binarise(self, start: int, stop: int) -> None:
        values = self.work[start:stop].T
        salient = salient_columns(values, self.diagonal[start:stop], self.n_salient, self.centred)
        block = binarised(values, salient, middle(values, salient, self.centred), self.centred, self.dtype)
        self.blocks.append(block)
        self.results[start:stop] = block.dense(self.work.dtype).T

    def replace(self, index: int, weights: Tensor, result: Tensor) -> Tensor:
        return result.copy_(self.results[index])

    def weight(self) -> Binary:
        """All blocks together."""
        codes, salient = torch.cat([b.codes for b in self.blocks], 1), torch.cat([b.salient for b in self.blocks])
        means = [b.mean for b in self.blocks if b.mean is not None]
        scale, mean = torch.cat([b.scale for b in self.blocks], 1), torch.cat(means, 1) if means else None
        return Binary(codes, salient, scale, mean, self.block_size)


def binarise(values: Tensor, where: Tensor, centred: bool) -> tuple[Tensor, Tensor]:
    """Mean and scale (out, 1) each of those values (out, n) of a row at which ``where`` (out or 1, n) is True: for these signs
    and this mean, the scale of least squared error. Both are zero where there are no values."""
    count = where.sum(1, keepdim=True).clamp_min(1)
    mean = (values * where).sum(1, keepdim=True) / count if centred else torch.zeros_like(values[:, :1])
    return mean, ((values - mean).abs() * where).sum(1, keepdim=True) / count


def nearest(values: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """Of mean - scale and mean + scale, (out, 1) each, the one that is nearer to each of the values (out, n)."""
    return torch.where(values < mean, mean - scale, mean + scale)


def salient_columns(values: Tensor, diagonal: Tensor, most: int, centred: bool) -> Tensor:
    """Which columns (n,) bool of a block (out, n) take two signs. diagonal: (n,), of the factor of the inverse Hessian."""
    order = (values.square().sum(0) / diagonal.square()).argsort(descending=True, stable=True)
    best, least = order[:0], torch.inf
    chosen = torch.zeros(len(order), dtype=torch.bool, device=values.device)
    for count in range(1, min(most, len(order)) + 1):
        chosen[order[count - 1]] = True
        parts = [nearest(values, *binarise(values, where.unsqueeze(0), centred)) for where in (chosen, ~chosen)]
        error = float((values - torch.where(chosen, *parts)).square().sum())
        if error < least:
            best, least = order[:count], error
    return torch.zeros_like(chosen).index_fill(0, best, True)


def middle(values: Tensor, salient: Tensor, centred: bool) -> Tensor:
    """Which weights (out, n) of a block are near the mean, of those in columns that are not salient (n,) bool."""
    sizes = values.abs()
    rest = sizes[:, ~salient].flatten()
    best, least = ~salient.expand_as(values), torch.inf
    for threshold in rest.sort().values[(_SHARES * (len(rest) - 1)).long()] if len(rest) else ():
        near = sizes < threshold
        parts = [nearest(values, *binarise(values, where & ~salient, centred)) for where in (near, ~near)]
        error = float(((values - torch.where(near, *parts)) * ~salient).square().sum())
        if error < least:
            best, least = near & ~salient, error
    return best


def binarised(values: Tensor, salient: Tensor, near: Tensor, centred: bool, dtype: torch.dtype) -> Binary:
    """A block (out, n) as signs and scales of that dtype. salient: (n,) bool; near: (out, n) bool, weights near the mean."""
    kinds = (near, ~near & ~salient, salient.unsqueeze(0))
    means, scales = zip(*(binarise(values, where, centred) for where in kinds), strict=True)
    plus = [values >= mean for mean in means]
    left = values - torch.where(plus[2], means[2] + scales[2], means[2] - scales[2])
    further, second = binarise(left, salient.unsqueeze(0), centred)
    high = torch.where(salient, left >= further, ~near)
    low = torch.where(salient, plus[2], torch.where(near, plus[0], plus[1]))
    codes = low.to(torch.int8) + 2 * high.to(torch.int8)
    mean = torch.stack((means[0], means[1], means[2] + further), -1).to(dtype) if centred else None
    return Binary(codes, salient, torch.stack((*scales, second), -1).to(dtype), mean, values.shape[1])
