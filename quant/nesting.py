"""Grids of several widths with one set of codes between them: fitting them together, and rounding to all at once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from compress.quant.grids import code_range
from compress.quant.hessian import Plan
from compress.quant.sweep import InputSweep

_N_SHRINKS = 75  # shares of a group's range that are tried: 100 %, 99 %, ... 26 %
_ERROR_POWER = 2.4  # of errors that a range is judged by, as in GPTQ's search
_DAMPING = 0.01  # of the scales' normal equations, as a share of their mean diagonal
_MOST_CHANGE = 2.0  # by which factor a scale is fitted anew at most
_ELEMENTS = 1 << 24  # of the products of steps and Hessian that are held at a time
_BLOCK = 64  # inputs whose pull is worked out at a time


class Widths(NamedTuple):
    """The widths of nested codes, ``least`` to ``most`` bits. balance: an error of each counts 2**balance times that of one bit
    less."""

    least: int
    most: int
    balance: float

    @property
    def count(self) -> int:
        return self.most - self.least + 1

    @property
    def shifts(self) -> list[int]:
        """How many bits of the widest code each width lacks, the narrowest first."""
        return list(range(self.most - self.least, -1, -1))

    @property
    def shares(self) -> list[float]:
        """What a squared error counts for at each width."""
        return [2.0 ** (self.balance * (place - self.count + 1)) for place in range(self.count)]


class Grids(NamedTuple):
    """Grids of a matrix (out, in). scale: (widths, out, groups) float32, representable in the storage dtype, of the narrowest
    codes first. zero: (out, groups) int8, that of the widest codes; those of others are its leading bits, as codes are."""

    widths: Widths
    scale: Tensor
    zero: Tensor

    def steps(self, codes: Tensor, shift: int) -> Tensor:
        """Codes of another width, less its zero: whole numbers (out, in) float32."""
        steps = (codes >> shift).unflatten(1, (self.zero.shape[1], -1)).float() - (self.zero >> shift).float().unsqueeze(-1)
        return steps.flatten(1)


def fit(weight: Tensor, widths: Widths, group_size: int, dtype: torch.dtype) -> Grids:
    """Grids for every group of a matrix (out, in) float32, each a power of two coarser than the next wider one.

    Of the widest grid's range a share is kept by which the widths' errors, rounded to nearest for each alone, have the least sum.
    Its zero-point is moved to the nearest one that the narrower grids' levels suit: with k bits less, a level is that of the
    middle one of 2**k codes. Scales are rounded to ``dtype``.
    """
    groups, first, last = weight.unflatten(1, (-1, group_size)), *code_range(widths.most)
    lowest, highest = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
    empty = lowest == highest
    lowest, highest = lowest.masked_fill(empty, -1), highest.masked_fill(empty, 1)
    least_scale = max(torch.finfo(dtype).tiny / 16, torch.finfo(torch.float32).tiny)
    best_error = torch.full_like(lowest, torch.inf)
    best_step, best_zero = torch.empty_like(lowest), torch.empty_like(lowest)
    for i in range(_N_SHRINKS):
        low, high = lowest * (1 - i / 100), highest * (1 - i / 100)
        step = ((high - low) / (last - first)).clamp(min=least_scale).to(dtype).float()
        zero = nesting_zero(first - low / step, widths)
        error = torch.zeros_like(best_error)
        for shift, share in zip(widths.shifts, widths.shares, strict=True):
            coarse, offset = step * 2**shift, (zero / 2**shift).floor()
            codes = (groups / coarse.unsqueeze(2)).round_().add_(offset.unsqueeze(2)).clamp_(*code_range(widths.most - shift))
            left = codes.sub_(offset.unsqueeze(2)).mul_(coarse.unsqueeze(2)).sub_(groups)
            error += share * left.abs_().pow_(_ERROR_POWER).sum(2)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_step, best_zero = torch.where(better, step, best_step), torch.where(better, zero, best_zero)
    scale = torch.stack([best_step * 2**shift for shift in widths.shifts]).to(dtype).float()
    return Grids(widths, scale, best_zero.to(torch.int8))


def nesting_zero(zero: Tensor, widths: Widths) -> Tensor:
    """The whole number nearest to ``zero``, in the range of the widest codes, that is one of the two in the middle of those with
    its leading ``least`` bits."""
    size = 2 ** (widths.most - widths.least)
    if size == 1:
        return zero.round().clamp(*code_range(widths.most))
    first, last = code_range(widths.least)
    block = ((zero - (size - 1) / 2) / size).round().clamp(first, last) * size
    middle = size / 2 - 1
    return block + (zero - block - middle).round().clamp(0, 1) + middle


class Sweep(InputSweep):
    """Rounds a matrix (out, in) float32 at all widths by one code for each weight: in one pass over its inputs, in which every
    width hands its own errors on, and in passes of coordinate descent (QuantEase, 2309.01885) that improve on it.

    Side by side lie the matrices of all widths. mask: (out, in) bool or None; codes are zero outside it.
    """

    def __init__(self, weight: Tensor, plan: Plan, grids: Grids, mask: Tensor | None):
        widths, work = grids.widths, weight.T[plan.order].repeat(1, grids.widths.count).contiguous()
        self.weight, self.original, self.count, self.order = weight, work.clone(), widths.count, plan.order
        self.kept = None if mask is None else mask.T[plan.order]
        self.zeros = grids.zero.T.float().contiguous()
        self.groups = (plan.order // (len(work) // len(self.zeros))).tolist()
        self.sizes, self.shares, self.low, self.high = (
            torch.tensor(column, dtype=work.dtype, device=work.device).unsqueeze(1)
            for column in zip(
                *(
                    (2**shift, share, *code_range(widths.most - shift))
                    for shift, share in zip(widths.shifts, widths.shares, strict=True)
                ),
                strict=True,
            )
        )  # (widths, 1)
        self.use(grids)
        super().__init__(work, plan, torch.empty_like(work, dtype=torch.int8))
        self.run(0, len(work))

    def use(self, grids: Grids) -> None:
        """Round to grids of these scales from now on."""
        self.grids, self.scales = grids, grids.scale.permute(2, 0, 1).contiguous()  # (groups, widths, out)

    def codes(self) -> Tensor:
        """The widest codes (out, in) int8, in the matrix's own order."""
        widest = self.results.unflatten(1, (self.count, -1))[:, -1]
        return widest[self.order.argsort()].T.contiguous()

    def replace(self, index: int, weights: Tensor, result: Tensor) -> Tensor:
        """Of the codes that are best for one width, each as near as can be to the widest's best, the one that is best for all."""
        wanted, group = weights.view(self.count, -1), self.groups[index]
        scale, zero = self.scales[group], self.zeros[group]
        offsets = (zero / self.sizes).floor_()
        own = (wanted / scale).round_().add_(offsets).clamp_(self.low, self.high) * self.sizes
        candidates = own[-1].clamp(own, own + (self.sizes - 1))  # (widths, out)
        levels = (candidates.unsqueeze(1) / self.sizes).floor_().sub_(offsets).mul_(scale)  # (candidates, widths, out)
        best = levels.sub_(wanted).square_().mul_(self.shares).sum(1).argmin(0, keepdim=True)
        code = candidates.gather(0, best).squeeze(0)
        if self.kept is not None:
            code = torch.where(self.kept[index], code, zero)
        result.copy_(code.repeat(self.count))
        return (code / self.sizes).floor_().sub_(offsets).mul_(scale).flatten()

    def improve(self, hessian: Tensor, damping: float) -> None:
        """Choose every code anew, input by input, given all others: one cycle of coordinate descent. hessian: (in, in)."""
        hessian = hessian[self.order.unsqueeze(1), self.order]
        diagonal = hessian.diagonal()
        diagonal.masked_fill_(diagonal == 0, 1).add_(damping * diagonal.mean())
        left = self.original - self._rounded()
        code = torch.empty_like(left[0])
        for start in range(0, len(left), _BLOCK):
            stop = min(start + _BLOCK, len(left))
            pull = hessian[start:stop] @ left
            for j in range(start, stop):
                before = self.original[j] - left[j]
                change = self.replace(j, before + pull[j - start] / diagonal[j], code) - before
                self.results[j] = code
                left[j] -= change
                pull.addr_(hessian[start:stop, j], change, alpha=-1)

    def _rounded(self) -> Tensor:
        """What the codes stand for at every width, (in, widths * out), in the plan's order."""
        codes = self.codes()
        grouped = (
            self.grids.steps(codes, shift).unflatten(1, (scale.shape[1], -1)) * scale.unsqueeze(2)
            for shift, scale in zip(self.grids.widths.shifts, self.grids.scale, strict=True)
        )
        return torch.cat([values.flatten(1) for values in grouped]).T[self.order].contiguous()


def refit(weight: Tensor, codes: Tensor, grids: Grids, hessian: Tensor, dtype: torch.dtype) -> Grids:
    """The grids with the scales of least error of the layer's outputs for given codes (out, in) int8, rounded to ``dtype``.

    For each row it is a linear least-squares problem in the scales of its groups, one width after the other.
    """
    rows, found = max(1, _ELEMENTS // (grids.zero.shape[1] * len(hessian))), []
    for shift, before in zip(grids.widths.shifts, grids.scale, strict=True):
        parts = zip(weight.split(rows), grids.steps(codes, shift).split(rows), before.split(rows), strict=True)
        found.append(torch.cat([_fitted(own, steps, scale, hessian) for own, steps, scale in parts]))
    return grids._replace(scale=torch.stack(found).to(dtype).float())


def _fitted(weight: Tensor, steps: Tensor, before: Tensor, hessian: Tensor) -> Tensor:
    """Scales (rows, groups) for steps of the grid (rows, in) instead of those before, (rows, groups)."""
    n_groups = before.shape[1]
    grouped = steps.unflatten(1, (n_groups, -1))
    products = torch.einsum("rgi,gij->rgj", grouped, hessian.unflatten(0, (n_groups, -1)))  # (rows, groups, in)
    matrix = (products.unflatten(2, (n_groups, -1)) * grouped.unsqueeze(1)).sum(3)
    left = (products * weight.unsqueeze(1)).sum(2) - (matrix @ before.unsqueeze(2)).squeeze(2)
    damping = _DAMPING * matrix.diagonal(dim1=1, dim2=2).mean(1) + torch.finfo(matrix.dtype).tiny
    damped = matrix + damping.view(-1, 1, 1) * torch.eye(n_groups, device=matrix.device)
    moved = before + torch.linalg.solve(damped, left)
    return moved.clamp(before / _MOST_CHANGE, before * _MOST_CHANGE)
