"""An integer grid whose codes are learned along with its scales, by rounding at every step: the straight-through estimator of
Block-AP of EfficientQAT (Chen et al., 2407.11062), in steps of the grid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compress.weights import LowRank, Masked, Quantized, Weight

_REACH = 0.49  # of a step: how far from its code a weight may begin
_PACE = 2.0  # by which share of the learning rate a weight moves, in steps of the grid: faster, codes jump about
_SCALE_PACE = 3.0  # how much faster a scale moves than where the codes stay: weights that it would take along can move on


@dataclass(frozen=True)
class Moving(Quantized):
    """A grid, and where on it each weight is, which is rounded whenever the matrix is asked for, with gradients as if it were
    not.

    positions: (out, in) float32, in steps, as codes are; kept: (out, in) bool or None, False where weights are zero. A position
    beyond the last code passes no gradient on. ``codes`` are those that it began with.
    """

    positions: Tensor | None = None
    kept: Tensor | None = None

    @classmethod
    def start(cls, grid: Quantized, kept: Tensor | None, original: Tensor) -> Moving:
        """Each weight as near to the ``original``'s, (out, in), as it is without another code: those that a small move would
        have rounded elsewhere are the first to move."""
        scale = grid.scale.float().unsqueeze(-1)
        steps = original.to(scale).unflatten(1, (scale.shape[1], -1)) / torch.where(scale == 0, 1, scale)
        steps = steps if grid.zero_point is None else steps + grid.zero_point.unsqueeze(-1)
        codes = grid.codes.float()
        return cls(**vars(grid), positions=torch.clamp(steps.flatten(1), codes - _REACH, codes + _REACH), kept=kept)

    def rounded(self) -> Tensor:
        """The codes as they are now, (out, in) whole numbers in float32."""
        assert self.positions is not None
        codes = self.positions + (self.positions.round() - self.positions).detach()
        codes = codes.clamp(-(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1)
        return codes if self.kept is None else torch.where(self.kept, codes, self.codes.to(codes))

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        return self._at(self.rounded()).dense(dtype)

    def stopped(self) -> Quantized:
        """The grid with the codes as they are now."""
        return self._at(self.rounded().detach().to(torch.int8))

    def _at(self, codes: Tensor) -> Quantized:
        own = {name: value for name, value in vars(self).items() if name not in ("codes", "positions", "kept")}
        return Quantized(codes, **own)

    def parameters(self) -> dict[str, Tensor]:
        assert self.positions is not None
        return {"positions": self.positions, "scale": self.scale}

    def shares(self) -> dict[str, float]:
        return {"positions": _PACE, "scale": _SCALE_PACE * super().shares()["scale"]}

    def rebuild(self, parameters: Mapping[str, Tensor]) -> Moving:
        return replace(self, **parameters)


def moving(weight: Weight, original: Tensor | None = None) -> Weight:
    """The same weight with codes that can be trained, where it is an integer grid of compressed-tensors, or has factors that
    are; other weights as they are. original: (out, in), what it was before; None: that is not known, as of factors."""
    if isinstance(weight, LowRank):
        return LowRank(moving(weight.down), moving(weight.up))
    if isinstance(weight, Masked) and isinstance(weight.inner, Quantized):
        return Masked(Moving.start(weight.inner, weight.kept, weight.dense() if original is None else original), weight.kept)
    if isinstance(weight, Quantized):
        return Moving.start(weight, None, weight.dense() if original is None else original)
    return weight


def stopped(weight: Weight) -> Weight:
    """What :func:`moving` made, as a plain grid again."""
    if isinstance(weight, LowRank):
        return LowRank(stopped(weight.down), stopped(weight.up))
    if isinstance(weight, Masked) and isinstance(weight.inner, Moving):
        return Masked(weight.inner.stopped(), weight.kept)
    return weight.stopped() if isinstance(weight, Moving) else weight
