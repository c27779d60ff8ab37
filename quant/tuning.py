"""What the methods that tune a block's grids by gradients share: grids whose range can shrink, and rounding that lets
gradients through."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from compress.moving import round_through
from compress.quant.grids import Grid, Gridded, code_range
from compress.weights import Weight

LEAST_SHARE = 0.05  # of a range that is left after clipping: far below what helps, and above what would divide by zero


class Rounded(NamedTuple):
    """A matrix on a grid, differentiable in what it was made from.

    codes: (out, in) whole numbers in float32. scale: (out, groups) float32, representable in the storage dtype.
    zero_point: (out, groups) whole numbers in float32, or None. bits: of the codes.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bits: int

    def values(self, mask: Tensor | None) -> Tensor:
        """The (out, in) matrix, float32, zero where ``mask`` is False."""
        groups = self.codes.unflatten(1, (self.scale.shape[1], -1))
        if self.zero_point is not None:
            groups = groups - self.zero_point.unsqueeze(-1)
        values = (groups * self.scale.unsqueeze(-1)).flatten(1)
        return values if mask is None else values * mask

    def weight(self, settings: Gridded, dtype: torch.dtype, mask: Tensor | None) -> Weight:
        """The weight that a quantizer of these settings makes of it, with scales of the storage dtype."""
        zero_point = None if self.zero_point is None else self.zero_point.detach().to(torch.int8)
        grid = Grid(self.scale.detach().to(dtype), zero_point, self.bits)
        return settings.wrap(self.codes.detach().to(torch.int8), grid, mask)


def shrink(grid: Grid, upper: Tensor, lower: Tensor) -> tuple[Tensor, Tensor | None]:
    """Scale and zero-point, (out, groups) float32, of a grid of which only shares of the range above and below zero are
    left: upper and lower, (out, groups). A symmetric grid has one range, and takes ``upper``. Shares of one leave it as
    it is, exactly; the scale stays representable in its dtype."""
    scale = grid.scale.float()
    if grid.zero_point is None:
        return (scale * upper).to(grid.scale.dtype).float(), None
    first, last = code_range(grid.bits)
    below, above = grid.zero_point.float() - first, last - grid.zero_point.float()
    share = (below * lower + above * upper) / (last - first)
    zero_point = round_through(first + below * lower / share)
    return (scale * share).to(grid.scale.dtype).float(), zero_point


def round_softly(values: Tensor, grid: Grid, upper: Tensor, lower: Tensor, offset: Tensor | None = None) -> Rounded:
    """Round values (out, in) float32 to a grid that is shrunk to those shares (see :func:`shrink`).

    offset: (out, in), in steps of the grid, added before rounding. Rounding passes gradients on; a code at the end of its
    range passes none to what was rounded.
    """
    scale, zero_point = shrink(grid, upper, lower)
    steps = values.unflatten(1, (scale.shape[1], -1)) / scale.unsqueeze(-1)
    codes = round_through(steps if offset is None else steps + offset.view_as(steps))
    if zero_point is not None:
        codes = codes + zero_point.unsqueeze(-1)
    return Rounded(codes.clamp(*code_range(grid.bits)).flatten(1), scale, zero_point, grid.bits)
