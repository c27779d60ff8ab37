"""Binarising a block of weights: which of them take two signs, where the others' bell is split, and the scales of all."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.weights import Binary

_SHARES = torch.linspace(0.1, 0.9, 81)
"""Of a block's weights, those that the candidates for the middle of the bell have."""


def binarise(values: Tensor, where: Tensor, centred: bool) -> tuple[Tensor, Tensor]:
    """Mean and scale (out, 1) each of those values (out, n) of a row at which ``where`` (out or 1, n) is True: for these signs
    and this mean, the scale of least squared error. Both are zero where there are no values."""
    count = where.sum(1, keepdim=True).clamp_min(1)
    mean = (values * where).sum(1, keepdim=True) / count if centred else torch.zeros_like(values[:, :1])
    return mean, ((values - mean).abs() * where).sum(1, keepdim=True) / count


def explained(values: Tensor, parts: tuple[Tensor, Tensor], centred: bool) -> float:
    """By how much the sum of squares of a block's values falls when each of two parts of it, as in :func:`binarise`, is binarised
    by itself: with ``sum |v - m| = n s``, ``sum (v - m -+ s)**2 = sum v**2 - n (m**2 + s**2)``."""
    found = ((where.sum(1, keepdim=True), *binarise(values, where, centred)) for where in parts)
    return sum(float((count * (mean.square() + scale.square())).sum()) for count, mean, scale in found)


def salient_columns(values: Tensor, diagonal: Tensor, most: int, centred: bool) -> Tensor:
    """Which columns (n,) bool of a block (out, n) take two signs. diagonal: (n,), of the factor of the inverse Hessian."""
    order = (values.square().sum(0) / diagonal.square()).argsort(descending=True, stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device)
    candidates = [rank < count for count in range(1, min(most, len(order)) + 1)]
    return max(candidates, key=lambda chosen: explained(values, (chosen.unsqueeze(0), ~chosen.unsqueeze(0)), centred))


def middle(values: Tensor, salient: Tensor, centred: bool) -> Tensor:
    """Which weights (out, n) of a block are near the mean, of those in columns that are not salient, (n,) bool."""
    if bool(salient.all()):
        return torch.zeros_like(values, dtype=torch.bool)
    rest = values[:, ~salient]
    sizes = rest.abs()
    thresholds = sizes.flatten().sort().values[(_SHARES * (sizes.numel() - 1)).long()]
    best = max(thresholds, key=lambda threshold: explained(rest, (sizes < threshold, sizes >= threshold), centred))
    return (values.abs() < best) & ~salient


def binarised(values: Tensor, salient: Tensor, near: Tensor, centred: bool, dtype: torch.dtype) -> Binary:
    """A block (out, n) as signs and scales of that dtype. salient: (n,) bool; near: (out, n) bool, weights near the mean."""
    kinds = (near, ~near & ~salient, salient.unsqueeze(0))
    means, scales = zip(*(binarise(values, where, centred) for where in kinds), strict=True)
    plus = [values >= mean for mean in means]
    left = values - torch.where(plus[2], means[2] + scales[2], means[2] - scales[2])
    further, second = binarise(left, salient.unsqueeze(0), centred)
    high = torch.where(salient, left >= further, ~near)
    low = torch.where(salient, plus[2], torch.where(near, plus[0], plus[1]))
    codes = low.to(torch.int8) + 2 * high.to(torch.int8)
    mean = torch.stack((means[0], means[1], means[2] + further), -1).to(dtype) if centred else None
    return Binary(codes, salient, torch.stack((*scales, second), -1).to(dtype), mean, values.shape[1])
