"""Comparing hidden states of two models whose depths and widths may differ."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def layer_map(n_student: int, n_teacher: int) -> list[tuple[int, int]]:
    """Which state of the teacher each of the student's is to be like: evenly spread, the last by the last. The first, of the
    embeddings, is left out.

    n_student, n_teacher: how many states there are: blocks and one more. Returns pairs of indices.
    """
    return [(index, round(index * (n_teacher - 1) / (n_student - 1))) for index in range(1, n_student)]


def linear_maps(widths: Iterable[tuple[int, int]]) -> nn.ModuleList:
    """Linear maps without bias, (inputs, outputs) each: the identity where these agree, else random ones that keep the size of
    what they are given. Equal at every call, and no trace in the process's random numbers."""
    generator = torch.Generator().manual_seed(0)
    maps = nn.ModuleList()
    for n_inputs, n_outputs in widths:
        module = nn.utils.skip_init(nn.Linear, n_inputs, n_outputs, bias=False)
        start = torch.eye(n_outputs) if n_inputs == n_outputs else torch.randn(n_outputs, n_inputs, generator=generator)
        module.weight.data = start if n_inputs == n_outputs else start / n_inputs**0.5
        maps.append(module)
    return maps


def relative_error(ours: Tensor, theirs: Tensor) -> Tensor:
    """Mean square of the difference over that of ``theirs``: layers count alike whatever their scale. (tokens, d) each."""
    return (ours.float() - theirs.float()).square().mean() / theirs.float().square().mean().clamp_min(1e-12)


def cosine_distance(ours: Tensor, theirs: Tensor) -> Tensor:
    """Mean over tokens of 1 - cos, as half the squared distance of unit vectors: 0 where the states are equal."""
    return (F.normalize(ours.float(), dim=-1) - F.normalize(theirs.float(), dim=-1)).square().sum(-1).mean() / 2
