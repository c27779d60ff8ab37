"""Tensor trains: the digits that sizes are written in, and chains of cores by one truncated decomposition after the other."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from compress.lowrank.factor import leading_directions


def balanced(size: int, count: int) -> tuple[int, ...]:
    """``count`` factors of a size, ascending, whose largest is as small as it can be."""
    if count == 1:
        return (size,)
    smallest = (d for d in range(1, int(size ** (1 / count) + 1e-9) + 1) if size % d == 0)
    return min(((d, *balanced(size // d, count - 1)) for d in smallest), key=max)


def separated(scale: Tensor, digits: Sequence[int]) -> list[Tensor]:
    """The factors, one per digit, whose products come closest to a scale (in,), in logarithms; of entries below a hundredth of
    the mean as if they were that."""
    least = scale.mean() / 100
    logs = (scale.clamp(min=least) if least > 0 else torch.ones_like(scale)).log().reshape(*digits)
    means = [logs.mean([axis for axis in range(len(digits)) if axis != own]) for own in range(len(digits))]
    return [(mean - logs.mean() * (len(digits) - 1) / len(digits)).exp() for mean in means]


def unfolded(tensor: Tensor, n_rows: int) -> Tensor:
    """The matrix whose rows are numbered by the first ``n_rows`` dimensions."""
    return tensor.reshape(prod(tensor.shape[:n_rows]), -1)


def train(tensor: Tensor, bonds: Sequence[int]) -> list[Tensor]:
    """Cores (bond before, size, bond after) of a tensor, float64, by one truncated decomposition after the other. Across every
    bond the norm is shared equally."""
    cores, rest, before = [], tensor, 1
    for size, bond in zip(tensor.shape, bonds, strict=False):
        matrix = rest.reshape(before * size, -1)
        directions = leading_directions(matrix, bond)
        cores.append(directions.reshape(before, size, bond))
        rest, before = directions.T @ matrix, bond
    cores.append(rest.reshape(before, tensor.shape[-1], 1))
    for i in range(len(bonds)):
        left, right = cores[i].flatten(0, 1).norm(dim=0), cores[i + 1].flatten(1).norm(dim=1)
        share = torch.where(left * right > 0, (right / left.clamp(min=1e-300)).sqrt(), 1)
        cores[i], cores[i + 1] = cores[i] * share, cores[i + 1] / share[:, None, None]
    return cores


def least_discarded(sizes: Sequence[int], spectra: Sequence[Tensor], budget: int) -> list[int] | None:
    """The two bonds of three cores, of at most ``budget`` numbers, that discard least of the two spectra (squared singular
    values, falling). None: the budget is too small for any."""
    first, second = (torch.cat([values.flip(0).cumsum(0).flip(0), values.new_zeros(1)]).tolist() for values in spectra)
    options = []
    for bond in range(1, len(first)):
        other = min((budget - bond * sizes[0]) // (bond * sizes[1] + sizes[2]), len(second) - 1, bond * sizes[1])
        if other >= 1 and bond <= sizes[1] * other:
            options.append((first[bond] + second[other], [bond, other]))
    return min(options)[1] if options else None
