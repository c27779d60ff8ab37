"""Integer grids whose codes are learned along with their scales, and zero-points if wanted, by rounding at every step: the
straight-through estimator of Block-AP of EfficientQAT (Chen et al., 2407.11062), in steps of the grid.

Of the two straight-through estimators this is the one that takes the rounding alone as if it were not there: a weight beyond the
last code gets no gradient, and scales get one. The other is ``quant/latent.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compress.weights import LowRank, Masked, Quantized, Weight

_REACH = 0.49  # of a step: how far from its code a weight may begin where the quantizer's choice is to hold at first
_PACE = 2.0  # by which share of the learning rate a weight moves, in steps of the grid: faster, codes jump about
_SCALE_PACE = 3.0  # how much faster a scale moves than where the codes stay: weights that it would take along can move on
_LEAST_SHARE = 0.05  # of a scale that weights are divided by: far below what helps, and above what would divide by zero


@dataclass(frozen=True)
class Moving(Quantized):
    """A grid, and where on it each weight is, which is rounded whenever the matrix is asked for, with gradients as if it were
    not.

    positions: (out, in) float32, in steps, without the zero-point. A position beyond the last code passes no gradient on.
    unit: (out, groups), the scales whose steps these are, so that a weight stays where it is when its scale moves; None: those of
    the moment, which take their weights along. zeros: (out, groups) float32, zero-points before they are rounded; None: they stay
    as they are. kept: (out, in) bool or None, False where weights are zero. ``codes`` are those that it began with.
    """

    positions: Tensor | None = None
    unit: Tensor | None = None
    zeros: Tensor | None = None
    kept: Tensor | None = None

    @classmethod
    def start(cls, grid: Quantized, kept: Tensor | None, original: Tensor) -> Moving:
        """Each weight as near to the ``original``'s, (out, in), as it is without another code: those that a small move would
        have rounded elsewhere are the first to move."""
        first = grid.codes.float()  # of 8 bits, a code less a zero-point is more than int8 holds
        if grid.zero_point is not None:
            first = first - grid.zero_point.repeat_interleave(grid.group_size, 1)
        positions = torch.clamp(steps_of(original, grid.scale), first - _REACH, first + _REACH)
        return cls(**vars(grid), positions=positions, kept=kept)

    @classmethod
    def free(cls, grid: Quantized, kept: Tensor | None, original: Tensor) -> Moving:
        """Weights where the ``original``'s are, (out, in), and scales and zero-points that move for themselves."""
        zeros = None if grid.zero_point is None else grid.zero_point.float()
        return cls(**vars(grid), positions=steps_of(original, grid.scale), unit=grid.scale, zeros=zeros, kept=kept)

    def rounded(self) -> Quantized:
        """The grid as it is now; codes (out, in) and zero points (out, groups) are whole numbers in float32, and all takes
        gradients."""
        assert self.positions is not None
        lowest, highest = -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1
        scale, steps = self.scale, self.positions.unflatten(1, (self.scale.shape[1], -1))
        if self.unit is not None:
            least = _LEAST_SHARE * self.unit.float()
            scale = torch.where(scale / least < 1, least, scale).to(self.unit.dtype)  # as it will be stored
            steps = steps * (self.unit.float() / scale.float()).unsqueeze(-1)
        codes, zero_point = round_through(steps), self.zero_point
        if zero_point is not None:
            if self.zeros is not None:
                zero_point = self.zeros + (self.zeros.round().clamp(lowest, highest) - self.zeros).detach()
            codes = codes + zero_point.unsqueeze(-1)
        codes = codes.clamp(lowest, highest)
        if self.kept is not None:
            zero = codes.new_zeros(()) if zero_point is None else zero_point.to(codes).unsqueeze(-1)
            codes = torch.where(self.kept.view_as(codes), codes, zero)
        return Quantized(codes.flatten(1), scale, zero_point, self.bits, self.inputs, self.mixed, self.plain)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.rounded().dense(dtype)

    def stopped(self) -> Quantized:
        """The grid as it is now."""
        grid = self.rounded()
        zero_point = None if grid.zero_point is None else grid.zero_point.detach().to(torch.int8)
        return replace(grid, codes=grid.codes.detach().to(torch.int8), scale=grid.scale.detach(), zero_point=zero_point)

    def parameters(self) -> dict[str, Tensor]:
        assert self.positions is not None
        return {"positions": self.positions, "scale": self.scale} | ({} if self.zeros is None else {"zeros": self.zeros})

    def shares(self) -> dict[str, float]:
        return {"positions": _PACE, "scale": _SCALE_PACE * super().shares()["scale"], "zeros": _PACE}

    def rebuild(self, parameters: Mapping[str, Tensor]) -> Moving:
        return replace(self, **parameters)


def steps_of(values: Tensor, scale: Tensor) -> Tensor:
    """Values (out, in) in steps of scales (out, groups), float32; none where a scale is zero."""
    steps = scale.float().unsqueeze(-1)
    groups = values.to(steps).unflatten(1, (scale.shape[1], -1))
    return (groups / torch.where(steps == 0, 1, steps)).flatten(1)


def round_through(values: Tensor) -> Tensor:
    """Round half to even; gradients pass as if nothing had been done (the straight-through estimator)."""
    return values + (values.round() - values).detach()


def moving(weight: Weight, original: Tensor | None = None, begin: Callable[..., Moving] = Moving.start) -> Weight:
    """The same weight with codes that can be trained, where it is an integer grid of compressed-tensors, or has factors that
    are; other weights as they are. original: (out, in), what it was before; None: that is not known, as of factors. begin: of a
    grid, a mask and the original makes a moving grid."""
    if isinstance(weight, LowRank):
        return LowRank(moving(weight.down, begin=begin), moving(weight.up, begin=begin))
    inner = weight.inner if isinstance(weight, Masked) else weight
    if not isinstance(inner, Quantized):
        return weight
    begun = begin(inner, weight.mask, weight.dense() if original is None else original)
    return begun if weight.mask is None else Masked(begun, weight.mask)


def stopped(weight: Weight) -> Weight:
    """What :func:`moving` made, as a plain grid again."""
    if isinstance(weight, LowRank):
        return LowRank(stopped(weight.down), stopped(weight.up))
    if isinstance(weight, Masked) and isinstance(weight.inner, Moving):
        return Masked(weight.inner.stopped(), weight.kept)
    return weight.stopped() if isinstance(weight, Moving) else weight
