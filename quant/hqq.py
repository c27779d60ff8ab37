"""HQQ: shift each group's zero-point to where few weights err much and most do not, by half-quadratic splitting and without
data (Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023).

The error to make small is the sum of |w - rounded w|**p over a group. With p < 1 the few weights at the ends of the range
may err; a plain mean square would drag the grid towards them.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from compress.passes import Taxon
from compress.quant.grids import Grid, GroupSize, Quantizer, code_range, effective_group_size
from compress.stats import LinearStats
from compress.weights import Affine, Masked, Weight

_PENALTY = 10.0  # of a mismatch between the error and its sparse part, in the steps of the grid
_PENALTY_GROWTH = 1.01
_CHUNK = 1 << 20  # weights that are worked on at a time


class HQQ(Quantizer):
    """Zero-points that are fractions of a step, in the dtype of the scales; the scales are the range's.

    With ``integer_zero`` they are whole numbers and the layer is an ordinary asymmetric grid, which readers of
    compressed-tensors open. Under a mask they are whole numbers too, since removed weights must be on the grid.
    """

    taxon: ClassVar[Taxon] = Taxon.WEIGHT_ONLY
    paper: ClassVar[str] = "Badri and Shaji, 2023"

    group_size: GroupSize = Field(64, description="consecutive inputs that share a scale; -1: the whole row")
    symmetric: bool = Field(False, description="must be false: a symmetric grid has no zero-points to shift")
    integer_zero: bool = Field(False, description="whole zero-points: hardly better than rtn, but opens without our loader")
    power: float = Field(0.7, gt=0, le=1, description="p of the error |w - rounded w|**p")
    iterations: int = Field(20, ge=0, description="steps of half-quadratic splitting")

    @model_validator(mode="after")
    def _has_zeros(self) -> HQQ:
        if self.symmetric:
            raise ValueError("hqq shifts zero-points, which a symmetric grid has not; use symmetric=false")
        if self.activations and not self.integer_zero:
            raise ValueError("no reader rounds the inputs of a grid with fractional zero-points; use integer_zero=true")
        return self

    def linear(self, weight: Tensor, stats: LinearStats, mask: Tensor | None) -> Weight:
        values = weight.float().contiguous()  # sums over a group depend on the layout, if only in the last digit
        values = values if mask is None else values * mask
        grid, whole = self.fit(values, weight.dtype), self.integer_zero or mask is not None
        assert grid.zero_point is not None
        groups = values.unflatten(1, (grid.scale.shape[1], -1))
        rows = max(1, _CHUNK // weight.shape[1])
        parts = zip(groups.split(rows), grid.scale.split(rows), grid.zero_point.split(rows), strict=True)
        zeros, codes = zip(*(best_zero(*part, self.bits, self.power, self.iterations, whole) for part in parts), strict=True)
        zero, chosen = torch.cat(zeros), torch.cat(codes).flatten(1)
        if self.integer_zero:
            return self.wrap(chosen, Grid(grid.scale, zero, self.bits), mask)
        affine = Affine(chosen, grid.scale, zero, self.bits)
        return affine if mask is None else affine.masked(mask)

    def outline(self, weight: Tensor, stats: LinearStats, mask: Tensor | None) -> Weight:
        if self.integer_zero:
            return super().outline(weight, stats, mask)
        n_groups = weight.shape[1] // effective_group_size(weight.shape[1], self.group_size)
        codes = torch.empty(weight.shape, dtype=torch.int8, device="meta")
        scale = torch.empty(len(weight), n_groups, dtype=weight.dtype, device="meta")
        if mask is None:
            return Affine(codes, scale, torch.empty_like(scale), self.bits)
        return Masked(Affine(codes, scale, torch.empty_like(scale, dtype=torch.int8), self.bits), mask.to("meta"))


def best_zero(
    groups: Tensor, scale: Tensor, zero: Tensor, bits: int, power: float, iterations: int, whole: bool
) -> tuple[Tensor, Tensor]:
    """The best zero-points met on the way, and the codes they give: (rows, groups) and (rows, groups, group) int8.

    groups: (rows, groups, group) float32. scale, zero: (rows, groups), the grid to begin with. whole: zero-points must be
    integers in the codes' range, and are returned as int8; else they are returned in the scale's dtype. Everything is
    computed in steps of the grid, so weights that are all twice as large get the same codes.
    """
    low, high = code_range(bits)
    steps = groups / scale.float().unsqueeze(-1)
    current, penalty = zero.float(), _PENALTY
    best, least = current, torch.full_like(current, torch.inf)
    for iteration in range(iterations + 1):
        stored = current.round().clamp(low, high) if whole else current.to(scale.dtype).float()
        codes = (steps + stored.unsqueeze(-1)).round_().clamp_(low, high)
        error = steps - (codes - stored.unsqueeze(-1))
        total = error.abs().pow_(power).sum(-1)
        better = total < least
        best, least = torch.where(better, stored, best), torch.where(better, total, least)
        if iteration < iterations:
            codes = (steps + current.unsqueeze(-1)).round_().clamp_(low, high)
            current = shifted_zero(steps, codes, current, power, penalty)
            penalty *= _PENALTY_GROWTH
    codes = (steps + best.unsqueeze(-1)).round_().clamp_(low, high).to(torch.int8)
    return best.to(torch.int8 if whole else scale.dtype), codes


def shifted_zero(steps: Tensor, codes: Tensor, zero: Tensor, power: float, penalty: float) -> Tensor:
    """One step of the splitting: the zero-points (rows, groups) that fit all but the sparse part of the error best.

    steps: weights in steps of the grid, (rows, groups, group); codes: theirs, by the present ``zero`` (rows, groups). The
    sparse part is the minimiser of ``|e|**power + penalty / 2 * (e - error)**2``, by its generalised soft threshold.
    """
    error = steps - (codes - zero.unsqueeze(-1))
    size = error.abs()
    sparse = error.sign() * (size - size.pow(power - 1) / penalty).clamp_(min=0)
    return (codes - steps + sparse).mean(-1)
