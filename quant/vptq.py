"""VPTQ: name vectors of an input's weights by entries of a codebook that k-means weighted by the Hessian finds, input after
input, the error of each made up for by those to come (Liu et al., 2409.17066)."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from compress.passes import Needs, Taxon
from compress.quant.additive import Search, damped
from compress.quant.codebooks import CodebookQuantizer, kmeans, nearest, refuse_mask
from compress.quant.hessian import Plan, make_plan
from compress.quant.sweep import InputSweep
from compress.stats import LinearStats
from compress.weights import Codebook, Weight


class VectorSweep(InputSweep):
    """A sweep that replaces an input's weights by entries of books (n_books, n_entries, length) float32, vector by vector.

    indices: (n_books, in, out / length) int32, of what was taken, in the plan's order.
    """

    def __init__(self, work: Tensor, plan: Plan, books: Tensor):
        super().__init__(work, plan, torch.empty_like(work))
        self.books = books
        self.indices = torch.zeros(len(books), len(work), work.shape[1] // books.shape[2], dtype=torch.int32, device=work.device)

    def replace(self, index: int, weights: Tensor, result: Tensor) -> Tensor:
        left = weights.view(-1, self.books.shape[2])
        for number, book in enumerate(self.books):
            chosen = nearest(left, book)
            self.indices[number, index] = chosen.to(torch.int32)
            left = left - book[chosen]
        return torch.sub(weights, left.flatten(), out=result)


class VPTQ(CodebookQuantizer):
    """Vectors along the outputs, ``length`` consecutive outputs of one input, so that an input is rounded as a whole.

    Inputs are first divided by the root mean square of their weights (the paper takes their range). Every further book is
    fitted to what the sweep with those before has left, and the sweep is done again with all. The paper's codebook of their
    own for inputs with outliers is left out: ``act_order`` rounds them first, before errors have gathered. Its fine-tuning of
    entries and scales on the layer's outputs is a least-squares problem, which is solved, by turns with the choice of entries.
    `reconstruct` behind it trains them on the block's outputs, `pv_tuning` on the model's.
    """

    taxon: ClassVar[Taxon] = Taxon.WEIGHT_ONLY
    paper: ClassVar[str] = "2409.17066"
    needs: ClassVar[Needs] = Needs(frozenset({"hessian"}))
    efforts: ClassVar[dict] = {"fast": {"iterations": 10, "rounds": 0}, "best": {"iterations": 100, "rounds": 10}}

    axis: ClassVar[int] = 0
    damping: float = Field(0.01, gt=0, le=10, description="added to the Hessian's diagonal, as a share of its mean")
    rounds: int = Field(3, ge=0, description="turns of solving for entries and scales, at most")
    tolerance: float = Field(0.01, ge=0, description="relative fall of the error below which the turns end")
    act_order: bool = Field(True, description="inputs of large activations first")

    def linear(self, weight: Tensor, stats: LinearStats, mask: Tensor | None) -> Weight:
        refuse_mask(mask)
        key = ("vptq", self.damping, self.act_order)
        plan = stats.cached(key, lambda: make_plan(stats.hessian, self.damping, self.act_order))
        values = weight.float().masked_fill(plan.dead, 0)
        scale = values.square().mean(0, keepdim=True).sqrt()
        scale = torch.where(scale > 0, scale, 1).to(weight.dtype)
        length = self.form((weight.shape[0], weight.shape[1])).length
        ordered = scale.float().flatten()[plan.order]
        work = (values / scale.float()).T[plan.order].contiguous()
        basis = plan._replace(factor=plan.factor * ordered.unsqueeze(1) / ordered)  # of inputs that are as much larger
        curvature = (stats.hessian.diagonal()[plan.order] * ordered.square()).repeat_interleave(work.shape[1] // length)
        books, left = work.new_empty(0, self.entries, length), work
        for _ in range(self.books):
            book = kmeans(left.view(-1, length), curvature, self.entries, self.iterations)
            books = torch.cat([books, book.unsqueeze(0).to(weight.dtype).float()])
            sweep = VectorSweep(work.clone(), basis, books)
            sweep.run(0, len(work))
            indices, left = sweep.indices, sweep.work
        in_place = torch.empty_like(indices)
        in_place[:, plan.order] = indices
        found = Codebook(in_place.transpose(1, 2).contiguous(), books, scale.float(), self.axis)
        search = Search(values, stats.cached(("vptq", self.damping), lambda: damped(stats.hessian, self.damping)), found, beam=1)
        search.refine(self.rounds, self.tolerance)
        found = search.found
        return Codebook(found.indices, found.books.to(weight.dtype), found.scale.to(weight.dtype), self.axis)
