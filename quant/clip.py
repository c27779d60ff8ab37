"""How far to clip a group's weights before they go on a grid, by the error of what the group adds to the outputs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from compress.quant.grids import Grid, dequantize, quantize

_N_LIMITS = 10  # 100 %, 95 %, ... 55 % of the group's largest weight
_SEARCH_ELEMENTS = 1 << 20  # weights searched at a time, which bounds what the search takes beside the matrix


def group_moments(x: Tensor, n_groups: int) -> Tensor:
    """Sums over tokens of the outer products of each group's inputs: (groups, group, group) float32.

    x: (..., in), inputs of a layer whose rows are divided into ``n_groups`` runs.
    """
    groups = x.float().reshape(-1, n_groups, x.shape[-1] // n_groups).transpose(0, 1)
    return groups.mT @ groups


def clip_groups(weight: Tensor, moments: Tensor, fit: Callable[[Tensor], Grid]) -> Tensor:
    """The matrix (out, in), its groups clipped to where rounding to nearest then errs least.

    weight: (out, in) float32. moments: (groups, group, group), of :func:`group_moments`. fit: the grids (n, groups) of some
    rows (n, in). A group errs by the mean square, over tokens, of what the change of its weights adds to an output. Equal
    errors go to the widest range.
    """
    rows = max(1, _SEARCH_ELEMENTS // weight.shape[1])
    return torch.cat([_clip(part.unflatten(1, (len(moments), -1)), moments, fit) for part in weight.split(rows)])


def _clip(groups: Tensor, moments: Tensor, fit: Callable[[Tensor], Grid]) -> Tensor:
    best, least = groups, torch.full_like(groups[..., :1], torch.inf)
    largest = groups.abs().amax(2, keepdim=True)
    for i in range(_N_LIMITS):
        limit = largest * (1 - i / (2 * _N_LIMITS))
        clipped = groups.clamp(-limit, limit)
        grid = fit(clipped.flatten(1))
        change = dequantize(quantize(clipped.flatten(1), grid), grid).view_as(groups) - groups
        error = ((change.transpose(0, 1) @ moments).transpose(0, 1) * change).sum(2, keepdim=True)
        best = torch.where(error < least, clipped, best)
        least = torch.minimum(error, least)
    return best.flatten(1)
