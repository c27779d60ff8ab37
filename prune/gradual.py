"""Gradual: prune by magnitude a little at a time while the model trains, so that it can make up for what goes and take back
what it misses (Zhu and Gupta, 1710.01878)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator

from compress.distill.objective import Objective
from compress.passes import Taxon
from compress.prune.masks import Pattern, count_kept, kept_of, lowest, with_implied_sparsity
from compress.prune.thinned import Thinned
from compress.weights import Dense, Masked, Weight
from compress.weights.composed import unmasked


class Gradual(Objective):
    """The sparsity rises from 0 to what is asked as ``sparsity * (1 - (1 - t)**3)``, t being the share of the way from ``start``
    to ``end``: fast while there is much to spare. Every ``every`` steps the masks are chosen anew from all weights; removed
    ones take no gradients, so that they stay about as they were, and can return. From ``end`` on the masks stay, for the last
    step at the least.

    A pattern N:M removes of every M what the sparsity of the moment allows. Matrices on grids are trained and not pruned:
    quantize afterwards. See :class:`TrainPass` for the training fields.
    """

    taxon: ClassVar[Taxon] = Taxon.UNSTRUCTURED
    paper: ClassVar[str] = "1710.01878"

    sparsity: float = Field(0.5, ge=0, lt=1, description="share of the weights removed in the end; implied by a pattern N:M")
    pattern: Pattern = Field("tensor", description="what competes: row, tensor, or N:M (N kept of M consecutive inputs)")
    start: float = Field(0.0, ge=0, le=1, description="share of the steps after which pruning begins")
    end: float = Field(0.5, ge=0, le=1, description="share of the steps after which it is done")
    every: int = Field(5, ge=1, description="steps from one choice of masks to the next")

    @model_validator(mode="before")
    @classmethod
    def _implied_sparsity(cls, data: Any) -> Any:
        return with_implied_sparsity(data)

    @model_validator(mode="after")
    def _starts_before_it_ends(self) -> Gradual:
        if self.start > self.end:
            raise ValueError(f"start={self.start:g} is later than end={self.end:g}")
        return self

    @property
    def span(self) -> tuple[int, int]:
        """The steps before which the first and the last masks are chosen."""
        last = min(round(self.end * self.steps), self.steps - 1)
        return min(round(self.start * self.steps), last), last

    def sparsity_at(self, index: int) -> float:
        """Share of the weights that are to be gone at the step of that index."""
        first, last = self.span
        if index >= last:
            return self.sparsity
        return self.sparsity * (1 - (1 - max(index - first, 0) / (last - first)) ** 3)

    def adapt(self, weight: Weight, generator: torch.Generator) -> Weight:
        inner = unmasked(weight)
        return Thinned.start(inner.values, weight.mask) if isinstance(inner, Dense) else weight

    def choose(self, index: int, weight: Weight) -> Weight | None:
        first, last = self.span
        due = index == last or (first < index < last and (index - first) % self.every == 0)
        if not due or not isinstance(weight, Thinned):
            return None
        scores = weight.values.abs() if weight.earlier is None else weight.values.abs().masked_fill(~weight.earlier, -torch.inf)
        sparsity, pattern = self.sparsity_at(index), self.pattern
        if index < last and (kept := kept_of(pattern)) is not None:
            pattern = f"{kept[1] - int(kept[1] * sparsity)}:{kept[1]}"
        return weight.under(lowest(scores, sparsity, pattern))

    def outline(self, weight: Weight) -> Weight:
        if not isinstance(inner := unmasked(weight), Dense):
            return weight
        n_kept = min(weight.numel, count_kept(weight.shape, self.sparsity, self.pattern))
        return Masked(inner, torch.empty(weight.shape, dtype=torch.bool, device="meta"), n_kept)
