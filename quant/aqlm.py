"""AQLM: vectors of weights as sums of one entry from each of several codebooks, found by turns: which entries, by beam search
on the layer's output error, and what they are, by least squares (Egiazarian et al., 2401.06118)."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from compress.passes import Needs, Taxon
from compress.quant.additive import Search, beam_search, damped
from compress.quant.codebooks import CodebookQuantizer, kmeans, nearest, refuse_mask
from compress.quant.hessian import Plan, make_plan
from compress.quant.sweep import InputSweep
from compress.stats import LinearStats
from compress.weights import Codebook, Weight


class RunSweep(InputSweep):
    """A sweep that replaces runs of inputs by sums of entries of books (n_books, n_entries, length) float32, times the scale of
    each output (1, out).

    indices: (n_books, out, in / length) int32, of what was taken, in the plan's order, which keeps runs of ``length`` together.
    """

    def __init__(self, work: Tensor, plan: Plan, books: Tensor, scale: Tensor, beam: int):
        n_books, _, length = books.shape
        super().__init__(work, plan, torch.empty_like(work), [(length, RunSweep.choose)])
        assert plan.diagonal is not None
        self.books, self.scale, self.beam, self.diagonal = books, scale, beam, plan.diagonal
        self.indices = torch.zeros(n_books, work.shape[1], len(work) // length, dtype=torch.int32, device=work.device)
        self.first, self.chosen = 0, work[:length]

    def choose(self, start: int, stop: int) -> None:
        """The entries for a run of inputs: what the inputs to come cannot make up for is to be least."""
        own = self.factor[start:stop, start:stop] * self.diagonal[start:stop].unsqueeze(1)
        inverse = torch.linalg.solve_triangular(own, torch.eye(len(own), device=own.device), upper=True)
        corner = inverse @ inverse.T
        wanted = (self.work[start:stop] / self.scale).T
        indices, sums = beam_search(self.books, -2 * wanted @ corner, corner, self.beam)
        self.indices[:, :, start // (stop - start)] = indices
        self.first, self.chosen = start, sums.T * self.scale

    def replace(self, index: int, weights: Tensor, result: Tensor) -> Tensor:
        return self.chosen[index - self.first]


class AQLM(CodebookQuantizer):
    """Vectors along the inputs of a row, with a scale for every row.

    The error that falls at every turn is that of the layer's outputs, tr((Q - W) H (Q - W)^T). Turns stop at a minimum near to
    where they begin. The paper begins with the nearest entries of codebooks by k-means; here k-means is weighted by the Hessian,
    and entries are first taken in a sweep over the inputs, in which those to come make up for the error of those before (as
    QuIP#, 2402.04396, does with a lattice): the minimum is then a sixth lower. Where the paper runs Adam on the codebooks and the
    scales together, they are solved for in turn, which needs no learning rate: entries by conjugate gradients, scales in closed
    form. Training them from the block's outputs, its next step, is `reconstruct`; from the model's, `pv_tuning`.
    """

    taxon: ClassVar[Taxon] = Taxon.WEIGHT_ONLY
    paper: ClassVar[str] = "2401.06118"
    needs: ClassVar[Needs] = Needs(frozenset({"hessian"}))
    efforts: ClassVar[dict] = {"fast": {"rounds": 2}, "best": {"rounds": 16, "beam": 4}}

    rounds: int = Field(5, ge=0, description="turns of search and solution, at most")
    beam: int = Field(2, ge=1, description="sums that are followed up from book to book")
    tolerance: float = Field(0.01, ge=0, description="relative fall of the error below which the turns end")
    damping: float = Field(0.01, gt=0, le=10, description="added to the Hessian's diagonal, as a share of its mean")

    def linear(self, weight: Tensor, stats: LinearStats, mask: Tensor | None) -> Weight:
        refuse_mask(mask)
        length = self.form((weight.shape[0], weight.shape[1])).length
        key = ("aqlm", self.damping, length)
        plan = stats.cached(key, lambda: make_plan(stats.hessian, self.damping, act_order=True, run=length))
        hessian = stats.cached(("aqlm", self.damping), lambda: damped(stats.hessian, self.damping))
        values = weight.float().masked_fill(plan.dead, 0)
        search = Search(values, hessian, self.swept(self.start(values, hessian), values, plan), self.beam)
        search.refine(self.rounds, self.tolerance)
        found = search.found
        return Codebook(found.indices, found.books.to(weight.dtype), found.scale.to(weight.dtype), self.axis)

    def start(self, values: Tensor, hessian: Tensor) -> Codebook:
        """Codebooks by k-means of what those before leave, of rows scaled to a mean square of one, and the nearest entries."""
        length = self.form((values.shape[0], values.shape[1])).length
        scale = values.square().mean(1, keepdim=True).sqrt()
        scale = torch.where(scale > 0, scale, 1)
        weights = (scale.square() * hessian.diagonal().view(1, -1, length).mean(2)).flatten()
        left = (values / scale).view(-1, length)
        books, indices = [], []
        for _ in range(self.books):
            books.append(kmeans(left, weights, self.entries, self.iterations))
            indices.append(nearest(left, books[-1]))
            left = left - books[-1][indices[-1]]
        grid = torch.stack(indices).view(self.books, len(values), -1).to(torch.int32)
        return Codebook(grid, torch.stack(books), scale, self.axis)

    def swept(self, found: Codebook, values: Tensor, plan: Plan) -> Codebook:
        """The same codebooks, with entries that make up for the errors of others."""
        sweep = RunSweep(values.T[plan.order].contiguous(), plan, found.books, found.scale.T, self.beam)
        sweep.run(0, len(plan.order))
        indices = torch.empty_like(sweep.indices)
        indices[:, :, plan.order[:: found.length] // found.length] = sweep.indices
        return replace(found, indices=indices)
