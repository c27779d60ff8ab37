"""The loop that follows the error of a block's outputs down: the one of all passes that learn something of a block."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from compress.block import Block

Matrices = Callable[[], Mapping[str, Tensor]]
"""Makes the tensors to compute with, as :meth:`compress.block.Block.run` takes them, from the parameters that are learned."""
_N_CHECKS = 5  # times that the error on what it is judged by is measured while the parameters move


def constant(done: float) -> float:
    """The share of the learning rate after that share of the steps: all of it."""
    return 1.0


def linear(done: float) -> float:
    """The same, falling linearly to zero."""
    return 1 - done


def cosine(done: float) -> float:
    """The same, falling to zero along half a cosine."""
    return (1 + math.cos(math.pi * done)) / 2


def output_error(block: Block, replaced: Mapping[str, Tensor], rows: Tensor, targets: Tensor) -> Tensor:
    """Mean squared difference of the block's outputs for ``rows`` (n, length, d), computed with the tensors ``replaced``,
    from ``targets`` of the same shape; a float32 scalar that gradients flow through."""
    outputs = block.run(rows, replaced).float()
    return (outputs - targets.to(outputs.device).float()).square().mean()


def descend(
    block: Block, replaced: Matrices, optimizer: torch.optim.Optimizer, n_steps: int, batch_size: int, *,
    rate: Callable[[float], float], n_held_out: int = 0,
) -> None:  # fmt: skip
    """Move the optimizer's parameters to where the block's outputs are closest to its targets.

    n_steps: of the optimizer, each on ``batch_size`` sequences drawn without replacement. rate: by which share of the learning
    rates to move after a share of the steps. n_held_out: the last so many sequences are not learned from; none: all are. The
    error on these (none: on all) is measured at the start and a few times later, and the parameters are left as they were when
    it was least: they are never worse than at the start.
    """
    assert block.inputs is not None and block.targets is not None, "the pass does not declare inputs and a reference"
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    schedule = LambdaLR(optimizer, lambda step: rate(step / n_steps))
    n_learned = len(block.inputs) - n_held_out
    judged = slice(n_learned if n_held_out else 0, None)
    draws = _draws(n_learned, batch_size, block.index)
    checks = {n_steps * (i + 1) // _N_CHECKS for i in range(_N_CHECKS)}
    least, best = _mean_error(block, replaced, judged, batch_size), [parameter.detach().clone() for parameter in parameters]
    if least == 0:
        return
    for step in range(1, n_steps + 1):
        chosen = next(draws)
        optimizer.zero_grad()
        output_error(block, replaced(), block.inputs[chosen], block.targets[chosen]).backward()
        optimizer.step()
        schedule.step()
        if step in checks and (error := _mean_error(block, replaced, judged, batch_size)) < least:
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
def _mean_error(block: Block, replaced: Matrices, judged: slice, batch_size: int) -> float:
    """:func:`output_error` on those sequences."""
    assert block.inputs is not None and block.targets is not None
    matrices, total = replaced(), 0.0
    inputs, wanted = block.inputs[judged], block.targets[judged]
    for rows, targets in zip(inputs.split(batch_size), wanted.split(batch_size), strict=True):
        total += float(output_error(block, matrices, rows, targets)) * len(rows)
    return total / len(inputs)
