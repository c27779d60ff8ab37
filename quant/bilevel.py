"""Grids of small groups whose scales are themselves rounded, and a sweep that leaves out the weights no grid fits."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.quant.gptq import Sweep
from compress.quant.grids import Grid, code_range, dequantize, fit_grid, quantize
from compress.quant.hessian import Plan
from compress.weights import Bilevel
from compress.weights.bilevel import ROWS, SCALE_BITS

_LOO_ELEMENTS = 1 << 22  # numbers that the leave-one-out search holds at a time


class BilevelSweep(Sweep):
    """GPTQ's sweep in the given order of inputs. The grid of a group is fitted when its turn comes, to those of its weights
    that are not likely outliers; a weight that its grid misses by too much stays as it is and has no error to spread.

    values: (out, in) float32. plan: not of another order. threshold: the largest squared error of a weight on the grid,
    divided by the diagonal of the factor of the inverse Hessian. dtype: of what is stored. mask: (out, in) bool or None.

    outliers: (in, out) bool, the weights that are left out; kept_values: (in, out), their values, zero elsewhere.
    """

    def __init__(
        self, values: Tensor, plan: Plan, threshold: float, bits: int, group_size: int, dtype: torch.dtype, mask: Tensor | None
    ):  # fmt: skip
        n_outputs, n_groups = len(values), values.shape[1] // group_size
        unfitted = Grid(values.new_ones(n_outputs, n_groups), values.new_zeros(n_outputs, n_groups, dtype=torch.int8), bits)
        kept = None if mask is None else mask.T.contiguous()
        super().__init__(values.T.contiguous(), plan, unfitted, self._refit, kept)
        assert plan.diagonal is not None
        self.diagonal, self.dtype, self.threshold = plan.diagonal, dtype, threshold
        self.limits = (threshold * plan.diagonal.square()).tolist()
        self.outliers = torch.zeros_like(self.work, dtype=torch.bool)
        self.kept_values = torch.zeros_like(self.work)
        self.levels: list[tuple[Tensor, Tensor, Tensor]] = []

    def _refit(self, group: Tensor) -> Grid:
        """Fit the next group (out, group) as it is now."""
        start = len(self.levels) * self.group_size
        diagonal = self.diagonal[start : start + group.shape[1]]
        likely = leave_one_out_gain(group, diagonal, self.bits) > self.threshold
        zero_point, codes, base, step = fit_bilevel(group.masked_fill(likely, 0), diagonal, self.bits, self.dtype)
        self.levels.append((codes, base, step))
        return Grid(bilevel_scale(codes, base, step).unsqueeze(1), zero_point.unsqueeze(1), self.bits)

    def adjust(self, index: int, weights: Tensor, code: Tensor, rounded: Tensor) -> None:
        super().adjust(index, weights, code, rounded)
        far = (weights - rounded).square_() > self.limits[index]
        if self.kept is not None:
            far &= self.kept[index]
        stored = weights.to(self.dtype).to(weights.dtype) * far
        self.outliers[index], self.kept_values[index] = far, stored
        rounded.copy_(torch.where(far, stored, rounded))
        if self.zeros is not None:
            code.copy_(torch.where(far, self.zeros[self.groups[index]], code))

    def weight(self) -> Bilevel:
        """The grid part of the result; zero where there are outliers."""
        assert self.zeros is not None
        scale_codes, base, step = (torch.stack(parts, 1) for parts in zip(*self.levels, strict=True))
        zero = self.zeros.T.to(torch.int8).contiguous()
        return Bilevel(self.codes.T.contiguous(), zero, scale_codes, base, step, self.bits)


def fit_bilevel(group: Tensor, diagonal: Tensor, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fit a group (out, group) float32: zero-points (out,) int8, the codes (out,) int8 of its scales, and for every 16 rows
    the base and the step of these, (ceil(out / 16),) of ``dtype``.

    The second-level grid spans the scales that the rows' ranges ask for; of its points each row takes the one that rounds
    it best, its errors weighted by 1/diagonal^2, diagonal (group,). Zero-points are integers: a removed weight is zero.
    """
    scale = fit_grid(group, bits, None, False, False, torch.float32).scale.squeeze(1)
    padded = torch.cat([scale, scale[-1:].expand(-len(scale) % ROWS)]).view(-1, ROWS)
    base = padded.amin(1).clamp_min(torch.finfo(dtype).tiny).to(dtype)
    step = ((padded.amax(1) - base.float()) / (2**SCALE_BITS - 1)).clamp_min(0).to(dtype)
    candidates = [_with_code(code, group, diagonal, bits, base, step) for code in range(2**SCALE_BITS)]
    best = torch.stack([error for _, error in candidates]).argmin(0)
    zero_point = torch.stack([zero for zero, _ in candidates]).gather(0, best.unsqueeze(0)).squeeze(0)
    return zero_point, best.to(torch.int8), base, step


def _with_code(code: int, group: Tensor, diagonal: Tensor, bits: int, base: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """The zero-points (out,) int8 and the errors (out,) of rows that all take that code."""
    scale = bilevel_scale(torch.full((len(group),), code, device=group.device), base, step)
    low, high = code_range(bits)
    zero_point = (low - group.amin(1).clamp(max=0) / scale).round_().clamp_(low, high).to(torch.int8)
    grid = Grid(scale.unsqueeze(1), zero_point.unsqueeze(1), bits)
    return zero_point, _error_on(group, grid, diagonal)


def bilevel_scale(codes: Tensor, base: Tensor, step: Tensor) -> Tensor:
    """The scales (out,) float32 that codes (out,) stand for."""
    rows = torch.arange(len(codes), device=codes.device) // ROWS
    return base.float()[rows] + codes.float() * step.float()[rows]


def leave_one_out_gain(group: Tensor, diagonal: Tensor, bits: int) -> Tensor:
    """By how much the squared error of its row of a group, weighted by 1/diagonal^2, falls if one weight is left out of the
    grid. group: (out, group) float32; diagonal: (group,) -> (out, group)."""
    size = group.shape[1]
    left_out = torch.eye(size, dtype=torch.bool, device=group.device)
    rows = max(1, _LOO_ELEMENTS // size**2)
    parts = []
    for part in group.split(rows):
        without = part.unsqueeze(1).masked_fill(left_out, 0).flatten(0, 1)  # zero costs nothing and widens no range
        errors = _weighted_error(without, diagonal, bits).view(-1, size)
        parts.append(_weighted_error(part, diagonal, bits).unsqueeze(1) - errors)
    return torch.cat(parts)


def _weighted_error(group: Tensor, diagonal: Tensor, bits: int) -> Tensor:
    return _error_on(group, fit_grid(group, bits, None, False, False, torch.float32), diagonal)


def _error_on(group: Tensor, grid: Grid, diagonal: Tensor) -> Tensor:
    return ((dequantize(quantize(group, grid), grid) - group) / diagonal).square().sum(1)
