"""What the methods that tune a block's grids by gradients share: grids whose range can shrink, rounding that lets
gradients through, and the loop that follows the error of the block's outputs down."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from compress.block import Block
from compress.quant.grids import Grid, Gridded, code_range
from compress.weights import Weight

LEAST_SHARE = 0.05  # of a range that is left after clipping: far below what helps, and above what would divide by zero
_N_CHECKS = 5  # times that the error on all inputs is measured while the parameters move


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


def round_through(values: Tensor) -> Tensor:
    """Round half to even; gradients pass as if nothing had been done (the straight-through estimator)."""
    return values + (values.round() - values).detach()


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


def output_error(block: Block, replaced: Mapping[str, Tensor], rows: Tensor, targets: Tensor) -> Tensor:
    """Mean squared difference of the block's outputs for ``rows`` (n, length, d), computed with the matrices ``replaced``,
    from ``targets`` of the same shape; a float32 scalar that gradients flow through."""
    outputs = block.run(rows, replaced).float()
    return (outputs - targets.to(outputs.device).float()).square().mean()


def descend(
    block: Block, replaced: Callable[[], Mapping[str, Tensor]], optimizer: torch.optim.Optimizer, n_steps: int,
    batch_size: int, *, decay: bool,
) -> None:  # fmt: skip
    """Move the optimizer's parameters to where the block's outputs are closest to its targets.

    replaced: makes the matrices to compute with from the parameters. n_steps: of the optimizer, each on ``batch_size``
    sequences drawn without replacement. decay: let the learning rates fall linearly to zero. The error on all inputs is
    measured at the start and a few times later, and the parameters are left as they were when it was least: they are never
    worse than at the start.
    """
    assert block.inputs is not None and block.targets is not None, "the pass does not declare inputs and a reference"
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    schedule = LambdaLR(optimizer, lambda step: 1 - step / n_steps if decay else 1.0)
    draws = _draws(len(block.inputs), batch_size, block.index)
    checks = {n_steps * (i + 1) // _N_CHECKS for i in range(_N_CHECKS)}
    least, best = _total_error(block, replaced, batch_size), [parameter.detach().clone() for parameter in parameters]
    for step in range(1, n_steps + 1):
        chosen = next(draws)
        optimizer.zero_grad()
        output_error(block, replaced(), block.inputs[chosen], block.targets[chosen]).backward()
        optimizer.step()
        schedule.step()
        if step in checks and (error := _total_error(block, replaced, batch_size)) < least:
            least, best = error, [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        for parameter, kept in zip(parameters, best, strict=True):
            parameter.copy_(kept)


def _draws(n: int, size: int, seed: int) -> Iterator[Tensor]:
    """Indices of minibatches without end: one permutation of all sequences after the other."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(n, generator=generator).split(size)


@torch.no_grad()
def _total_error(block: Block, replaced: Callable[[], Mapping[str, Tensor]], batch_size: int) -> float:
    """:func:`output_error` on all inputs."""
    assert block.inputs is not None and block.targets is not None
    matrices, total = replaced(), 0.0
    for rows, targets in zip(block.batches(batch_size), block.targets.split(batch_size), strict=True):
        total += float(output_error(block, matrices, rows, targets)) * len(rows)
    return total / len(block.inputs)
