"""A low-rank matrix and a sparse one beside it, together in the bytes of a low-rank matrix alone."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from compress.lowrank.factor import Factoriser, leading_directions, project
from compress.lowrank.svd_llm import covariance_root
from compress.passes import Needs
from compress.stats import LinearStats
from compress.weights import Dense, LowRank, SparsePart, Sum, Weight


class Split(NamedTuple):
    """down: (rank, in), up: (out, rank), float64. sparse: (out, in) float64, zero where ``where`` (out, in) or (out,) is not."""

    down: Tensor
    up: Tensor
    sparse: Tensor
    where: Tensor


class LowRankAndSparse(Factoriser):
    """Base of the methods whose result is a sum of two factors and a sparse part.

    Together they take at most the bytes, indices counted, of the factors that ``ratio``, ``rank`` or ``ranks`` alone would give
    the matrix; ``sparse_share`` of them go to the sparse part.
    """

    needs: ClassVar[Needs] = Needs(frozenset({"covariance"}))

    sparse_share: float = Field(0.35, ge=0, lt=1, description="share of the kept bytes that goes to the sparse part")

    def root(self, stats: LinearStats) -> Tensor:
        """(in, in) float64: behind it, errors of the matrix are those of the outputs on the calibration inputs."""
        return stats.cached("covariance root", lambda: covariance_root(stats.covariance, stats.n))

    def metric(self, weight: Tensor, stats: LinearStats) -> Tensor:
        return weight @ self.root(stats)

    def cost(self, weight: Tensor) -> tuple[int, int]:
        """Bytes of a sparse part of a matrix (out, in) that holds nothing, and of each thing (an entry, a row) that it holds."""
        raise NotImplementedError(type(self).__name__)

    def split(self, weight: Tensor, stats: LinearStats, rank: int, count: int) -> Split:
        """The parts of weight (out, in) float64: factors of that rank, and so many entries or rows."""
        raise NotImplementedError(type(self).__name__)

    def part(self, matrix: Tensor, where: Tensor) -> SparsePart:
        """The weight that holds what a matrix has at ``where``."""
        raise NotImplementedError(type(self).__name__)

    def empty(self, weight: Tensor, count: int) -> SparsePart:
        """The same of meta tensors, that holds so much of a matrix."""
        raise NotImplementedError(type(self).__name__)

    def counts(self, weight: Tensor) -> tuple[int, int]:
        """The factors' rank, 0 for a matrix that stays whole, and how many entries or rows go beside them."""
        whole = self.rank_of(*weight.shape)
        if whole is None:
            return 0, 0
        per_rank, (least, each) = sum(weight.shape) * weight.element_size(), self.cost(weight)
        budget = whole * per_rank
        count = int((min(self.sparse_share * budget, budget - per_rank) - least) / each)
        if not self.sparse_share or count < 1:
            return whole, 0
        rank = (budget - least - count * each) // per_rank
        return rank, (budget - least - rank * per_rank) // each  # what no whole rank is left for goes to the sparse part

    def linear(self, weight: Tensor, stats: LinearStats, mask: Tensor | None) -> Weight:
        rank, count = self.counts(weight)
        if not count:
            return super().linear(weight, stats, mask)
        split = self.split(weight.double(), stats, rank, count)
        low = LowRank(Dense(split.down.to(weight.dtype)), Dense(split.up.to(weight.dtype)))
        return Sum((low, self.part(split.sparse.to(weight.dtype), split.where)))

    def outline(self, weight: Tensor, stats: LinearStats, mask: Tensor | None) -> Weight:
        rank, count = self.counts(weight)
        if not count:
            return super().outline(weight, stats, mask)
        down, up = torch.empty(rank, weight.shape[1], device="meta"), torch.empty(weight.shape[0], rank, device="meta")
        low = LowRank(Dense(down.to(weight.dtype)), Dense(up.to(weight.dtype)))
        return Sum((low, self.empty(weight, count)))


def largest(scores: Tensor, count: int) -> Tensor:
    """Where the ``count`` largest scores are: bool, of their shape. Ties go to the first."""
    order = scores.flatten().argsort(descending=True, stable=True)
    return torch.zeros_like(scores, dtype=torch.bool).view(-1).index_fill(0, order[:count], True).view_as(scores)


def nearest(weight: Tensor, root: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """down and up of the matrix of that rank that is nearest to weight, both float64, measured behind ``root`` (in, in)."""
    return project(weight, leading_directions(weight @ root, rank))
