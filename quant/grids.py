"""Integer grids: fitting scales and zero-points to groups of weights, rounding to codes, and the bases of the
quantizers.

A group is a run of consecutive inputs of one output row. Codes are signed, in [-2**(bits-1), 2**(bits-1) - 1], the
convention of compressed-tensors, and a weight is ``(code - zero_point) * scale``.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, NamedTuple

import torch
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor

from compress.activations import Inputs
from compress.passes import LinearPass, Pass, StreamPass
from compress.stats import LinearStats
from compress.weights import Masked, Quantized, Weight

_MIN_FALLBACK_GROUP = 16
_N_SHRINKS = 80  # the mse search tries ranges of 100 %, 99 %, ... 21 % of the group's own
_ERROR_POWER = 2.4
_LEAST_ERROR = 1e-15
_SEARCH_ELEMENTS = 1 << 17  # weights searched at a time: what a core's cache holds


class Grid(NamedTuple):
    """Integer grids of a matrix (out, in), one per row and group.

    scale: (out, groups), the storage dtype, finite and not zero; negative only on full-range grids. zero_point: (out,
    groups) int8 within the codes' range, or None for a symmetric grid. bits: 2 to 8.
    """

    scale: Tensor
    zero_point: Tensor | None
    bits: int


def code_range(bits: int) -> tuple[int, int]:
    """The lowest and highest code of a grid."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def effective_group_size(in_features: int, group_size: int | None) -> int:
    """Inputs per scale: ``group_size`` where it divides the inputs, else their greatest common divisor if that is at
    least 16, else the whole row, as for None."""
    if group_size is None or group_size >= in_features:
        return in_features
    shared = math.gcd(in_features, group_size)
    return shared if shared == group_size or shared >= _MIN_FALLBACK_GROUP else in_features


def fit_grid(
    weight: Tensor, bits: int, group_size: int | None, symmetric: bool, mse: bool, dtype: torch.dtype, full_range: bool = False
) -> Grid:
    """Fit a grid to every group of a matrix.

    weight: (out, in) float32. group_size: a divisor of ``in``, or None for one group per row. dtype: of the scales,
    which are rounded to it before any code is chosen.
    symmetric: ``scale = max|w| / (2**(bits-1) - 1/2)``, the same as GPTQ's and compressed-tensors'
    ``2 max|w| / (2**bits - 1)``: all codes are used, and the extreme weight errs by half a step, as any other may.
    Otherwise the grid spans [min(0, min w), max(0, max w)] with an integer zero-point, so that zero, hence a pruned
    weight, is on the grid.
    full_range: of a symmetric grid, put the extreme weight on the one code that has no opposite: AutoRound's
    ``scale = -extreme / 2**(bits-1)``, which is negative where the extreme is positive.
    mse: shrink the range to whichever of 100 %, 99 %, ... 21 % gives the least sum of |error|**2.4 (the GPTQ code's).
    An all-zero group gets the grid of [-1, 1]. Raises ValueError for weights that are not finite.
    """
    groups = weight.unflatten(1, (-1, group_size or weight.shape[1]))
    lowest, highest = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
    if not bool((lowest.isfinite() & highest.isfinite()).all()):
        raise ValueError("cannot quantize: the weight has entries that are not finite")
    empty = lowest == highest
    lowest, highest = lowest.masked_fill_(empty, -1), highest.masked_fill_(empty, 1)
    if symmetric and full_range:
        flip = torch.where(highest > -lowest, -1.0, 1.0).to(weight)  # so that the extreme is negative, as its code
        reach = torch.maximum(-lowest, highest) * ((2**bits - 1) / 2**bits)
        grid = _fit(groups * flip.unsqueeze(2), -reach, reach, bits, symmetric, mse, dtype)
        return grid._replace(scale=grid.scale * flip.to(dtype))
    if symmetric:
        highest = torch.maximum(-lowest, highest)
        lowest = -highest
    return _fit(groups, lowest, highest, bits, symmetric, mse, dtype)


def _fit(groups: Tensor, lowest: Tensor, highest: Tensor, bits: int, symmetric: bool, mse: bool, dtype: torch.dtype) -> Grid:
    """The grid of groups (out, groups, group) that spans [lowest, highest], or the best share of it where ``mse``."""
    if not mse:
        return _span(lowest, highest, bits, symmetric, dtype)
    rows = max(1, _SEARCH_ELEMENTS // groups[0].numel())
    shares = [
        _best_shrink(*parts, bits, symmetric, dtype)
        for parts in zip(groups.split(rows), lowest.split(rows), highest.split(rows), strict=True)
    ]
    share = torch.cat(shares)
    return _span(lowest * share, highest * share, bits, symmetric, dtype)


def _span(lowest: Tensor, highest: Tensor, bits: int, symmetric: bool, dtype: torch.dtype) -> Grid:
    """The grid whose codes cover [lowest, highest], each (out, groups)."""
    n_steps = 2**bits - 1
    # float16 may go below its least normal number, which 8-bit scales do reach, but not to where few digits are left.
    least = max(torch.finfo(dtype).tiny / 16, torch.finfo(torch.float32).tiny)
    scale = (highest / n_steps - lowest / n_steps).clamp_(min=least).to(dtype)
    if symmetric:
        return Grid(scale, None, bits)
    first, last = code_range(bits)
    zero_point = (first - lowest / scale.to(lowest.dtype)).round_().clamp_(first, last)
    return Grid(scale, zero_point.to(torch.int8), bits)


def _best_shrink(groups: Tensor, lowest: Tensor, highest: Tensor, bits: int, symmetric: bool, dtype: torch.dtype) -> Tensor:
    """The share of each group's range, (rows, groups), that rounds the weights (rows, groups, group) best."""
    best_share = torch.ones_like(lowest)
    best_error = torch.full_like(lowest, math.inf)
    scratch = torch.empty_like(groups)
    for i in range(_N_SHRINKS):
        share = 1 - i / 100
        grid = _span(lowest * share, highest * share, bits, symmetric, dtype)
        _round(groups, grid, scratch)
        if grid.zero_point is not None:
            scratch -= grid.zero_point.unsqueeze(-1)
        scratch.mul_(grid.scale.to(scratch.dtype).unsqueeze(-1)).sub_(groups)
        # |error|**2.4, thrice as fast as pow. Zero errors, of masked weights, are kept from infinity, which is slow.
        error = scratch.abs_().clamp_(min=_LEAST_ERROR).log2_().mul_(_ERROR_POWER).exp2_().sum(2)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_share.masked_fill_(better, share)
    return best_share


def _round(groups: Tensor, grid: Grid, out: Tensor) -> Tensor:
    """Write the codes of weights (rows, groups, group) to ``out``, of the weights' floating dtype."""
    torch.div(groups, grid.scale.to(groups.dtype).unsqueeze(-1), out=out).round_()
    if grid.zero_point is not None:
        out += grid.zero_point.unsqueeze(-1)
    return out.clamp_(*code_range(grid.bits))


def quantize(values: Tensor, grid: Grid) -> Tensor:
    """Round values (out, in), float32, to the nearest codes of a grid (half to even): (out, in) int8."""
    groups = values.unflatten(1, (grid.scale.shape[1], -1))
    return _round(groups, grid, torch.empty_like(groups)).flatten(1).to(torch.int8)


def dequantize(codes: Tensor, grid: Grid, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weights (out, in) that codes (out, in) int8 stand for, computed in ``dtype``."""
    return Quantized(codes, grid.scale.to(dtype), grid.zero_point, grid.bits).dense(dtype)


def _whole_row(value: object) -> object:
    return None if value in (-1, "-1") else value


GroupSize = Annotated[Annotated[int, Field(ge=1)] | None, BeforeValidator(_whole_row)]
"""Consecutive inputs that share a scale; None, also written -1: all of a row."""


class GridSettings(Pass):
    """The integer grids of a pass, and their settings."""

    bits: int = Field(4, ge=2, le=8, description="bits per weight")
    group_size: GroupSize = Field(128, description="consecutive inputs that share a scale; -1: the whole row")
    symmetric: bool = Field(True, description="grids centred on zero, without zero-points")
    full_range: bool = Field(False, description="symmetric grids whose lowest code is the extreme weight, as AutoRound's")
    mse: bool = Field(False, description="search the range that rounds best instead of taking the extremes")
    activations: Inputs | None = Field(
        None, description="round the layers' inputs too, token by token: int8, int4 or fp8; none: leave them"
    )

    @model_validator(mode="after")
    def _full_range_is_of_symmetric_grids(self) -> GridSettings:
        if self.full_range and not self.symmetric and "full_range" in self.model_fields_set:
            raise ValueError("full_range is of symmetric grids: drop it, or symmetric=false")
        return self

    def fit(self, weight: Tensor, dtype: torch.dtype) -> Grid:
        """Fit this pass's grid to weight (out, in) float32, with scales of ``dtype``."""
        group_size = effective_group_size(weight.shape[1], self.group_size)
        return fit_grid(weight, self.bits, group_size, self.symmetric, self.mse, dtype, self.full_range)

    def wrap(self, codes: Tensor, grid: Grid, mask: Tensor | None) -> Weight:
        """The weight that codes (out, in) on a grid make, zero where ``mask`` is False."""
        quantized = Quantized(codes, grid.scale, grid.zero_point, grid.bits, self.activations)
        return quantized if mask is None else quantized.masked(mask)

    def nearest(self, weight: Tensor, mask: Tensor | None, dtype: torch.dtype | None = None) -> Weight:
        """Each weight (out, in) at the nearest point of its group's grid, scales in ``dtype``, None: the weight's; zero outside
        ``mask``. Of meta tensors, such."""
        if weight.is_meta:
            return self._outlined(weight, mask, dtype or weight.dtype)
        values = weight.float() if mask is None else weight.float() * mask
        grid = self.fit(values, dtype or weight.dtype)
        return self.wrap(quantize(values, grid), grid, mask)

    def _outlined(self, weight: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Weight:
        n_outputs, n_inputs = weight.shape
        n_groups = n_inputs // effective_group_size(n_inputs, self.group_size)
        codes = torch.empty(n_outputs, n_inputs, dtype=torch.int8, device="meta")
        scale = torch.empty(n_outputs, n_groups, dtype=dtype, device="meta")
        zero_point = None if self.symmetric else torch.empty(n_outputs, n_groups, dtype=torch.int8, device="meta")
        quantized = Quantized(codes, scale, zero_point, self.bits, self.activations)
        return quantized if mask is None else Masked(quantized, mask)


class Gridded(GridSettings, StreamPass):
    """What integer quantizers share that the block loop applies, whether they see one layer at a time or a whole block."""

    regrids: ClassVar[bool] = True

    def outline(self, weight: Tensor, stats: LinearStats, mask: Tensor | None) -> Weight:
        return self.nearest(weight.to("meta"), None if mask is None else mask.to("meta"))


class Quantizer(Gridded, LinearPass):
    """Base of the integer quantizers that take one layer at a time: codes chosen by the method, on this grid."""
