"""SLTrain: a low-rank matrix plus a sparse one that has no structure; here fitted to a trained matrix, by turns (Han et al.,
2406.02214)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from compress.lowrank.sparse import LowRankAndSparse, Split, largest, nearest
from compress.passes import Taxon
from compress.stats import LinearStats
from compress.weights import Outliers
from compress.weights.parts import index_dtype

_SOLVER_STEPS = 4  # of conjugate gradients in each round; more change little


class SLTrain(LowRankAndSparse):
    """The paper trains this form from scratch, with a random support that stays. Here it is what a trained matrix becomes: the
    factors are fitted, exactly, to what the sparse part leaves, and the sparse part to what the factors leave, each to the
    outputs on the calibration inputs. Of the entries those are free that, each alone, would reduce the error most.

    An entry takes its value and an index of its column, of 16 bits up to 32768 inputs, and a row where it begins.
    """

    taxon: ClassVar[Taxon] = Taxon.LOW_RANK
    paper: ClassVar[str] = "2406.02214"
    efforts: ClassVar[dict] = {"fast": {"rounds": 3}, "best": {"rounds": 30}}

    rounds: int = Field(10, ge=1, description="times that the parts are fitted to what the other one leaves")
    support: Literal["largest", "random"] = Field("largest", description="which entries: the most useful, or random ones")

    def cost(self, weight: Tensor) -> tuple[int, int]:
        n_outputs, n_inputs = weight.shape
        return 4 * (n_outputs + 1), weight.element_size() + index_dtype(n_inputs).itemsize

    def split(self, weight: Tensor, stats: LinearStats, rank: int, count: int) -> Split:
        root = self.root(stats)
        covariance = stats.cached("covariance of its root", lambda: root @ root.T)  # ridge included
        where = None
        if self.support == "random":
            drawn = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0))
            where = largest(drawn, count).to(weight.device)
        found = rounds(weight, covariance, root, rank, count, where)
        return min(islice(found, self.rounds), key=lambda each: each.error).split

    def part(self, matrix: Tensor, where: Tensor) -> Outliers:
        return Outliers.of(matrix, where)

    def empty(self, weight: Tensor, count: int) -> Outliers:
        n_outputs, n_inputs = weight.shape
        values, columns = (torch.empty(count, dtype=t, device="meta") for t in (weight.dtype, index_dtype(n_inputs)))
        return Outliers(values, columns, torch.empty(n_outputs + 1, dtype=torch.int32, device="meta"), n_inputs)


class Round(NamedTuple):
    """error: tr(E C E^T) of what the parts leave."""

    error: float
    split: Split


def rounds(
    weight: Tensor, covariance: Tensor, root: Tensor, rank: int, count: int, where: Tensor | None = None
) -> Iterator[Round]:
    """Fit factors and a sparse matrix in turn to weight (out, in), for ever. covariance C = root root^T, (in, in); where: the
    sparse entries; None: ``count`` of them, chosen anew each round. All float64.

    With a diagonal covariance, or a support that stays, no round is worse than the one before it.
    """
    fixed, sparse = where, torch.zeros_like(weight)
    down, up = nearest(weight, root, rank)
    diagonal = covariance.diagonal().clamp_min(torch.finfo(weight.dtype).tiny)
    while True:
        left = weight - up @ down
        if fixed is None:  # by what each entry would be, and reduce, if it alone moved
            where = largest((sparse + (left - sparse) @ covariance / diagonal).abs() * diagonal.sqrt(), count)
        assert where is not None
        sparse = fitted(left, covariance, sparse * where, where)
        down, up = nearest(weight - sparse, root, rank)
        error = ((weight - sparse - up @ down) @ root).square().sum()
        yield Round(float(error), Split(down, up, sparse, where))


def fitted(target: Tensor, covariance: Tensor, start: Tensor, where: Tensor) -> Tensor:
    """A matrix with entries only at ``where`` whose error tr((T - S) C (T - S)^T) is smaller than that of ``start``: a few steps
    of conjugate gradients, in all rows at once; with a diagonal covariance one is exact. All (out, in) float64."""
    diagonal = covariance.diagonal().clamp_min(torch.finfo(target.dtype).tiny)
    gradient = (target - start) @ covariance * where
    found, direction = start, gradient / diagonal
    length = (gradient * direction).sum(1, keepdim=True)
    for _ in range(_SOLVER_STEPS):
        along = direction @ covariance * where
        curvature = (direction * along).sum(1, keepdim=True)
        step = torch.where(curvature > 0, length / curvature, 0)
        found, gradient = found + step * direction, gradient - step * along
        scaled = gradient / diagonal
        before, length = length, (gradient * scaled).sum(1, keepdim=True)
        direction = scaled + torch.where(before > 0, length / before, 0) * direction
    return found
