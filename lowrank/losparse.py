"""LoSparse: a low-rank matrix for what neurons have in common, and whole rows for those that have little of it (Li et al.,
2306.11222)."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from compress.lowrank.factor import leading_directions
from compress.lowrank.sparse import LowRankAndSparse, Split, largest, nearest
from compress.passes import Taxon
from compress.stats import LinearStats
from compress.weights import Rows


class LoSparse(LowRankAndSparse):
    """The rows are those that the factors would approximate worst on the calibration inputs; they stay as they are, and the
    factors are fitted to the others, in turn until the rows stay the same.

    In the paper all rows are there at first, and leave one after the other while the model is trained. Here those that would
    leave do so at once; train what is left with a training pass behind this one. Before that, at equal bytes, factors alone are
    nearer to a matrix unless some of its neurons really are unlike the others: a row costs as much as it does in the matrix.
    """

    taxon: ClassVar[Taxon] = Taxon.LOW_RANK
    paper: ClassVar[str] = "2306.11222"

    sparse_share: float = Field(0.1, ge=0, lt=1, description="share of the kept bytes that goes to the rows")
    rounds: int = Field(10, ge=1, description="most times that rows are chosen and factors fitted to the others")

    def cost(self, weight: Tensor) -> tuple[int, int]:
        return 0, weight.shape[1] * weight.element_size() + 4

    def split(self, weight: Tensor, stats: LinearStats, rank: int, count: int) -> Split:
        return set_apart(weight, self.root(stats), rank, count, self.rounds)

    def part(self, matrix: Tensor, where: Tensor) -> Rows:
        return Rows.of(matrix, where)

    def empty(self, weight: Tensor, count: int) -> Rows:
        values = torch.empty(count, weight.shape[1], dtype=weight.dtype, device="meta")
        return Rows(values, torch.empty(count, dtype=torch.int32, device="meta"), len(weight))


def set_apart(weight: Tensor, root: Tensor, rank: int, count: int, rounds: int) -> Split:
    """Take ``count`` rows out of weight (out, in) and fit factors to the others, by the error behind ``root`` (in, in); float64.

    For given rows the factors are the best, and for the space that these span so are the rows: no round is worse than the one
    before it.
    """
    outputs = weight @ root
    where = torch.zeros(len(weight), dtype=torch.bool, device=weight.device)
    for _ in range(rounds):
        space = leading_directions(outputs.masked_fill(where.unsqueeze(1), 0).T, rank)  # of the inputs, (in, rank)
        left = outputs.square().sum(1) - (outputs @ space).square().sum(1)
        before, where = where, largest(left, count)
        if before.equal(where):
            break
    down, up = nearest(weight.masked_fill(where.unsqueeze(1), 0), root, rank)
    return Split(down, up, weight * where.unsqueeze(1), where)
