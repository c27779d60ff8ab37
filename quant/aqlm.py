"""AQLM: vectors of weights as sums of one entry from each of several codebooks, found by turns: which entries, by beam search
on the layer's output error, and what they are, by least squares (Egiazarian et al., 2401.06118)."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from compress.passes import Needs, Taxon
from compress.quant.additive import Search, damped
from compress.quant.codebooks import CodebookQuantizer, kmeans, nearest, refuse_mask
from compress.stats import LinearStats
from compress.weights import Codebook, Weight


class AQLM(CodebookQuantizer):
    """Vectors along the inputs of a row, with a scale for every row.

    The error that falls at every turn is that of the layer's outputs, tr((Q - W) H (Q - W)^T). Where the paper runs Adam on the
    codebooks and the scales together, they are solved for in turn, which needs no learning rate: entries by conjugate gradients,
    scales in closed form. Training them from the block's outputs, its next step, is `reconstruct`; from the model's, `logit_kd`.
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
        hessian = stats.cached(("aqlm", self.damping), lambda: damped(stats.hessian, self.damping))
        search = Search(weight.float(), hessian, self.start(weight.float()), self.beam)
        error = search.error()
        for number in range(self.rounds):
            search.improve_indices(number)
            search.solve_books()
            search.solve_scales()
            before, error = error, search.error()
            if before - error < self.tolerance * before:
                break
        found = search.found
        return Codebook(found.indices, found.books.to(weight.dtype), found.scale.to(weight.dtype), self.axis)

    def start(self, values: Tensor) -> Codebook:
        """Codebooks by k-means of what those before leave, of rows scaled to a mean square of one."""
        length = self.form((values.shape[0], values.shape[1])).length
        scale = values.square().mean(1, keepdim=True).sqrt()
        scale = torch.where(scale > 0, scale, 1)
        left = (values / scale).view(-1, length)
        books, indices = [], []
        for _ in range(self.books):
            books.append(kmeans(left, left.new_ones(len(left)), self.entries, self.iterations))
            indices.append(nearest(left, books[-1]))
            left = left - books[-1][indices[-1]]
        grid = torch.stack(indices).view(self.books, len(values), -1).to(torch.int32)
        return Codebook(grid, torch.stack(books), scale, self.axis)
