"""Ratios: how much of each layer goes where layers are not all pruned alike, from a small sketch of every layer's scores."""

from __future__ import annotations

from collections.abc import Sequence
from math import floor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

_SHIFT = 15  # of the bits of a float32, which leaves its exponent and 8 bits of its mantissa
_WIDEST = 32 << (23 - _SHIFT)  # bins: scores below 2**-32 of the highest share the lowest one
_LEAST_KEPT = 0.25  # of what a block would keep if all were pruned alike


class Sketch(NamedTuple):
    """A histogram of scores in bins that are 0.2 to 0.4 % wide, so that every 16-bit magnitude has one of its own.

    n: number of weights; those that an earlier mask removed are in no bin. total: the sum of scores, in float64. lowest:
    the first bin; bin b holds the floats whose bits, as an integer, are from ``b << 15`` on. counts: of each bin.
    """

    n: int
    total: float
    lowest: int
    counts: list[int]

    @classmethod
    def of(cls, scores: Tensor, mask: Tensor | None = None) -> Sketch:
        """The sketch of scores, any shape, float32, not negative; mask: False where an earlier pass removed the weight."""
        kept = (scores if mask is None else scores[mask]).float().flatten()
        if not len(kept):
            return cls(scores.numel(), 0.0, 0, [])
        bins = kept.view(torch.int32) >> _SHIFT
        lowest = max(int(bins.min()), int(bins.max()) - _WIDEST)
        counts = torch.bincount((bins - lowest).clamp_(min=0)).tolist()
        return cls(scores.numel(), float(kept.sum(dtype=torch.float64)), lowest, counts)

    def above(self, limit: float) -> float:
        """How many scores are above ``limit``: exact but for the one bin that it falls into, which is split evenly."""
        bits = int(np.float32(limit).view(np.int32))
        index, rest = (bits >> _SHIFT) - self.lowest, (bits & ((1 << _SHIFT) - 1)) / (1 << _SHIFT)
        split = (1 - rest) * self.counts[index] if 0 <= index < len(self.counts) else 0.0
        return sum(self.counts[max(index + 1, 0) :]) + split


def outlier_share(sketches: Sequence[Sketch], threshold: float) -> float:
    """The share of scores above ``threshold`` times their mean, of several matrices taken together. The mean is exact."""
    n = sum(sketch.n for sketch in sketches)
    limit = threshold * sum(sketch.total for sketch in sketches) / n
    return sum(sketch.above(limit) for sketch in sketches) / n


def by_outliers(shares: Sequence[float], sparsity: float, spread: float) -> list[float]:
    """OWL's sparsity of each block, from its share of outliers: linear in it, the mean exactly ``sparsity``, and twice
    ``spread`` between the sparsest block and the densest. The spread is narrowed where a block would otherwise have less
    than nothing removed, or keep less than a quarter of what it would with all blocks alike.
    """
    least, most = min(shares), max(shares)
    if least == most:
        return [sparsity] * len(shares)
    denser = [(share - least) / (most - least) * 2 * spread for share in shares]
    mean = sum(denser) / len(denser)
    changes = [mean - value for value in denser]
    room = min(1, sparsity / -min(changes), (1 - _LEAST_KEPT) * (1 - sparsity) / max(changes)) if spread else 1
    return [sparsity + room * change for change in changes]


def by_threshold(sketches: Sequence[Sketch], sparsity: float) -> list[float]:
    """The sparsity of each layer if all their scores were held against one threshold; the mean over weights is exactly
    ``sparsity``. Of the bin that the threshold falls into, every layer loses the same share. Weights that are removed
    already go first."""
    n_removed = np.array([sketch.n - sum(sketch.counts) for sketch in sketches], dtype=float)
    n_weights = np.array([sketch.n for sketch in sketches])
    wanted = sparsity * n_weights.sum() - n_removed.sum()
    if wanted <= 0:
        return list(n_removed / n_weights * (sparsity * n_weights.sum() / max(n_removed.sum(), 1)))
    first = min(sketch.lowest for sketch in sketches if sketch.counts)
    counts = np.zeros((len(sketches), max(sketch.lowest + len(sketch.counts) for sketch in sketches) - first))
    for row, sketch in zip(counts, sketches, strict=True):
        start = sketch.lowest - first if sketch.counts else 0
        row[start : start + len(sketch.counts)] = sketch.counts
    below = counts.sum(0).cumsum()
    last = int(np.searchsorted(below, wanted))
    share = 1 - (below[last] - wanted) / counts[:, last].sum()
    return list((n_removed + counts[:, :last].sum(1) + share * counts[:, last]) / n_weights)


def in_whole_parts(sparsities: Sequence[float], n_parts: Sequence[int], sizes: Sequence[int]) -> list[int]:
    """How many of a layer's equal parts go: its sparsity times ``n_parts``, rounded down, or up for those of largest
    remainder as long as no more weights go in all than asked. sizes: weights in a part. One part always stays.
    """
    wanted = [share * parts for share, parts in zip(sparsities, n_parts, strict=True)]
    numbers = [min(floor(value + 1e-9), parts - 1) for value, parts in zip(wanted, n_parts, strict=True)]
    remainders = [value - number for value, number in zip(wanted, numbers, strict=True)]
    spare = sum(remainder * size for remainder, size in zip(remainders, sizes, strict=True)) + 1e-3
    for index in sorted(range(len(numbers)), key=lambda index: -remainders[index]):
        if remainders[index] > 1e-9 and sizes[index] <= spare and numbers[index] < n_parts[index] - 1:
            numbers[index] += 1
            spare -= sizes[index]
    return numbers
