"""Codebooks: weighted k-means, the nearest entries, and the base of the methods that quantize vectors of weights."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from compress.passes import LinearPass
from compress.stats import LinearStats
from compress.weights import Codebook, Weight
from compress.weights.codebook import NO_ZEROS

_ELEMENTS = 1 << 24  # of a table of distances that is held at a time


def nearest(vectors: Tensor, entries: Tensor) -> Tensor:
    """Which of the entries (k, length) is closest to each of the vectors (n, length): (n,) int64; float32."""
    half = entries.square().sum(1) / 2
    rows = max(1, _ELEMENTS // len(entries))
    return torch.cat([torch.addmm(half, part, entries.T, alpha=-1).argmin(1) for part in vectors.split(rows)])


def kmeans(vectors: Tensor, weights: Tensor, n_entries: int, iterations: int, seed: int = 0) -> Tensor:
    """Entries (n_entries, length) float32 that are close to the vectors (n, length): the sum over vectors of their weight (n,)
    times the squared distance to the nearest entry falls with every iteration (Lloyd's).

    It begins with vectors drawn in proportion to their weighted distance from the mean, and gives the place of an entry that
    stays without vectors to the vector that is served worst.
    """
    generator = torch.Generator(vectors.device).manual_seed(seed)
    mean = (vectors * weights.unsqueeze(1)).sum(0) / weights.sum().clamp_min(torch.finfo(weights.dtype).tiny)
    chances = (vectors - mean).square().sum(1) * weights
    chances = chances + chances.mean().clamp_min(torch.finfo(weights.dtype).tiny)
    drawn = torch.rand(len(vectors), generator=generator, device=vectors.device).log() / chances  # as if without replacement
    picked = drawn.topk(min(n_entries, len(vectors))).indices
    entries = vectors[picked].clone()
    if len(entries) < n_entries:
        entries = torch.cat([entries, entries.new_zeros(n_entries - len(entries), entries.shape[1])])
    for _ in range(iterations):
        chosen = nearest(vectors, entries)
        shares = weights.new_zeros(n_entries).index_add_(0, chosen, weights)
        sums = torch.zeros_like(entries).index_add_(0, chosen, vectors * weights.unsqueeze(1))
        used = shares > 0
        entries = torch.where(used.unsqueeze(1), sums / shares.clamp_min(torch.finfo(shares.dtype).tiny).unsqueeze(1), entries)
        if n_idle := int((~used).sum()):
            far = ((vectors - entries[chosen]).square().sum(1) * weights).topk(min(n_idle, len(vectors))).indices
            entries[(~used).nonzero().flatten()[: len(far)]] = vectors[far]
    return entries


class Form(NamedTuple):
    """length: entries of a vector. n_entries: of every book. n_books: that are added up."""

    length: int
    n_entries: int
    n_books: int


class CodebookQuantizer(LinearPass):
    """Base of the methods that name vectors of weights by entries of codebooks.

    True bits per weight: books * log2(entries) / length, and the books, books * entries * length values to a matrix: for small
    matrices take few entries, for large ones many of longer vectors (65536 of 8). A length that does not divide a dimension
    is lowered to one that does.
    """

    length: int = Field(4, ge=1, description="weights of a vector")
    entries: int = Field(256, ge=2, le=1 << 16, description="entries of a codebook; powers of two waste no bits")
    books: int = Field(1, ge=1, le=8, description="codebooks, one entry of each of which are added up")
    iterations: int = Field(30, ge=1, description="of k-means")

    axis: ClassVar[int] = 1
    """Along which vectors lie: 1: the inputs of a row; 0: the outputs of a column."""

    def form(self, shape: tuple[int, int]) -> Form:
        """The vectors and books of an (out, in) matrix. Raises ValueError where its books would be larger than the matrix."""
        length = next(length for length in range(self.length, 0, -1) if shape[self.axis] % length == 0)
        if self.books * self.entries * length >= shape[0] * shape[1]:
            raise ValueError(
                f"{self.books} x {self.entries} entries of {length} weights are no fewer numbers than a matrix {shape} has; "
                "use fewer entries, or skip the layer"
            )
        return Form(length, self.entries, self.books)

    def outline(self, weight: Tensor, stats: LinearStats, mask: Tensor | None) -> Weight:
        refuse_mask(mask)
        (n_outputs, n_inputs), form = weight.shape, self.form((weight.shape[0], weight.shape[1]))
        grid = (n_outputs, n_inputs // form.length) if self.axis else (n_outputs // form.length, n_inputs)
        meta: dict[str, Any] = {"dtype": weight.dtype, "device": "meta"}
        indices = torch.empty(form.n_books, *grid, dtype=torch.int32, device="meta")
        books = torch.empty(form.n_books, form.n_entries, form.length, **meta)
        return Codebook(indices, books, torch.empty((n_outputs, 1) if self.axis else (1, n_inputs), **meta), self.axis)


def refuse_mask(mask: Tensor | None, reason: str = NO_ZEROS) -> None:
    """Raise ValueError for a layer with removed weights."""
    if mask is not None:
        raise ValueError(reason)
