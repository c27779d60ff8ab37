"""BiLLM: one sign and one of two scales for a weight, two signs in the few columns that matter most, block after block, the
errors of each made up for by those to come (Huang et al., 2402.04291)."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from compress.passes import LinearPass, Needs, Taxon
from compress.quant.binary import binarised, middle, salient_columns
from compress.quant.codebooks import refuse_mask
from compress.quant.hessian import Plan, make_plan
from compress.quant.sweep import InputSweep
from compress.stats import LinearStats
from compress.weights import Binary, Weight
from compress.weights.binary import NO_ZEROS


class BiLLM(LinearPass):
    """Weights on two pairs of levels, chosen block by block and row by row.

    What a block's salient columns are is told by ``w**2 / U_jj**2`` summed over a column, U the factor of the inverse Hessian:
    the first k of them for which binarising them and the others apart is nearest to the block. Of the others' magnitudes, the
    best of 81 quantiles splits the middle of the bell from its tails, each binarised by itself. Searches go by the weights, as
    in the paper; the published code's go by that metric. The error of a block is carried on to the next ones exactly, by the
    block of U.

    True bits per weight: 2, of which one is a sign, and one says where in the bell it is, or is the second sign; and 4 scales per
    row and block: 2.5 with blocks of 128 in a 16-bit file. The paper's 1.08 leaves all but the signs out. Its means
    (``means=true``) make that 2.875, and the bundled model worse.
    """

    taxon: ClassVar[Taxon] = Taxon.WEIGHT_ONLY
    paper: ClassVar[str] = "2402.04291"
    needs: ClassVar[Needs] = Needs(frozenset({"hessian"}))

    block_size: int = Field(128, ge=8, description="consecutive columns that share scales")
    salient: int = Field(50, ge=1, description="most salient columns of a block")
    means: bool = Field(False, description="count weights from the mean of their kind, as published; false: from zero")
    within: bool = Field(False, description="carry errors on inside a block too, to the nearest of the levels found for it")
    damping: float = Field(0.01, gt=0, le=10, description="added to the Hessian's diagonal, as a share of its mean")
    true_sequential: bool = Field(False, description="measure again after q/k/v, o and gate/up: slower, a little better")

    @property
    def sequential(self) -> bool:
        return self.true_sequential

    def linear(self, weight: Tensor, stats: LinearStats, mask: Tensor | None) -> Weight:
        refuse_mask(mask, NO_ZEROS)
        plan = stats.cached(("billm", self.damping), lambda: make_plan(stats.hessian, self.damping, False))
        work = weight.float().masked_fill(plan.dead, 0).T.contiguous()
        sweep = BinarySweep(work, plan, self.block_size, self.salient, self.means, self.within, weight.dtype)
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

    n_salient: most salient columns of a block. centred: whether weights have means. within: whether the inputs of a block make up
    for each other, by other codes. dtype: of scales and means.
    """

    def __init__(
        self, work: Tensor, plan: Plan, block_size: int, n_salient: int, centred: bool, within: bool, dtype: torch.dtype
    ):
        super().__init__(work, plan, torch.empty_like(work), [(block_size, BinarySweep._binarise)])
        assert plan.diagonal is not None
        self.diagonal, self.n_salient, self.centred, self.within, self.dtype = plan.diagonal, n_salient, centred, within, dtype
        self.block_size, self.blocks = block_size, list[Binary]()

    def _binarise(self, start: int, stop: int) -> None:
        values = self.work[start:stop].T
        salient = salient_columns(values, self.diagonal[start:stop], self.n_salient, self.centred)
        block = binarised(values, salient, middle(values, salient, self.centred), self.centred, self.dtype)
        self.blocks.append(block)
        self.levels = block.levels(self.work.dtype)[:, 0].unflatten(1, (2, 4))  # of each row, in columns of either kind
        self.results[start:stop] = block.dense(self.work.dtype).T

    def replace(self, index: int, weights: Tensor, result: Tensor) -> Tensor:
        if self.within:
            block, column = self.blocks[-1], index % self.block_size
            options = self.levels.index_select(1, block.salient[column : column + 1].long()).squeeze(1)
            codes = (options - weights.unsqueeze(1)).abs().argmin(1, keepdim=True)
            block.codes[:, column] = codes.squeeze(1).to(torch.int8)
            self.results[index] = options.gather(1, codes).squeeze(1)
        return result.copy_(self.results[index])

    def weight(self) -> Binary:
        """All blocks together."""
        codes, salient = torch.cat([b.codes for b in self.blocks], 1), torch.cat([b.salient for b in self.blocks])
        means = [b.mean for b in self.blocks if b.mean is not None]
        scale, mean = torch.cat([b.scale for b in self.blocks], 1), torch.cat(means, 1) if means else None
        return Binary(codes, salient, scale, mean, self.block_size)
