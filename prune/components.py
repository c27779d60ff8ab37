"""Principal components of the residual stream, place by place: the bases that SliceGPT turns it to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from compress.block import Block
from compress.rotate import adder, shortcut_factors, stream_size
from compress.stats import LinearStats
from compress.walk import Walk

_DAMPING = 0.01  # of the mean of the covariance's diagonal


def principal(covariance: Tensor, size: int) -> Tensor:
    """The eigenvectors of the largest eigenvalues, the largest first: (d, size) float64, of a covariance (d, d) float64."""
    damping = _DAMPING * covariance.diagonal().mean()
    _, vectors = torch.linalg.eigh(covariance + damping * torch.eye(len(covariance), dtype=torch.float64).to(covariance))
    return vectors.flip(1)[:, :size].contiguous()


def aligned(start: Tensor, basis: Tensor, rank: int, factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A basis of the same span, turned as close to ``start`` as it can be; and F (size, rank), 1 - F F^T being the change from
    ``start`` to it.

    start, basis: (d, size) float64. factor: F (d, any) of the residual connection so far; None: it leaves the stream alone.
    rank: at least d - size and the columns of that factor together, or size: the change has no more dimensions.
    """
    change = start.T @ basis
    if factor is not None:
        change = change - (start.T @ factor) @ (factor.T @ basis)
    left, cosines, right = torch.linalg.svd(change)
    last = slice(len(cosines) - rank, None)  # the others are one
    return basis @ (right.T @ left.T), left[:, last] * (1 - cosines[last]).clamp_min(0).sqrt()


def of_every_place(walk: Walk, size: int, ranks: Callable[[int], list[int]], turn: Callable[[Tensor], Tensor]) -> Iterator[
    tuple[Tensor, Tensor]
]:  # fmt: skip
    """(basis, factor) of every place where a norm reads the stream, in order, the head's included; each is found with the
    stream confined to the bases before it, which is what the model turned and sliced up to there computes.

    ranks: of the factors of a block's shortcuts, by its index. turn: what the first basis is turned by; the others follow it.
    """
    model = walk.skeleton
    basis = torch.empty(0)
    for block, inputs, outputs in walk.blocks():
        earlier: list[Any] = [block.others[name].double().to(model.device) for name in shortcut_factors(model, block.index)]
        first, last = earlier or (None, None)
        if block.index == 0:
            basis = turn(principal(_covariance(walk, inputs.split(walk.batch)), size))
            _confine(walk, inputs, basis)
            yield basis, torch.zeros(0)
        middle = (_entering(block, rows, 1) for rows in inputs.split(walk.batch))
        basis, factor = aligned(basis, principal(_covariance(walk, middle), size), ranks(block.index)[0], first)
        yield basis, factor
        for before, after in zip(inputs.split(walk.batch), outputs.split(walk.batch), strict=True):
            after.copy_(_run_confined(block, before.to(model.device), basis))
        found = principal(_covariance(walk, outputs.split(walk.batch)), size)
        basis, factor = aligned(basis, found, ranks(block.index)[1], last)
        _confine(walk, outputs, basis)
        yield basis, factor


def of_all_places(walk: Walk, size: int) -> Tensor:
    """One basis (d, size) for all the places, from the model as it is. Norms level the stream, so every place counts as much."""
    total: Any = 0
    for block, inputs, outputs in walk.blocks():
        for place in range(len(walk.skeleton.arch.norms)):
            total = total + _level(_covariance(walk, (_entering(block, rows, place) for rows in inputs.split(walk.batch))))
        if block.index == len(walk.skeleton.blocks) - 1:
            total = total + _level(_covariance(walk, outputs.split(walk.batch)))
    return principal(total, size)


def _level(covariance: Tensor) -> Tensor:
    return covariance / covariance.trace().clamp_min(torch.finfo(covariance.dtype).tiny)


def _covariance(walk: Walk, batches: Iterable[Tensor]) -> Tensor:
    """Sum of x x^T, (d, d), in float64 from the products on: the least components are far below the largest."""
    stats = LinearStats(stream_size(walk.skeleton), ("covariance",), walk.skeleton.device)
    for rows in batches:
        stats.add(rows.to(walk.skeleton.device).double())
    return stats.finish().covariance


def _entering(block: Block, rows: Tensor, place: int) -> Tensor:
    norm = block.skeleton.arch.norms[place].source
    return block.layer_inputs([norm], rows)[norm]


def _confined(rows: Tensor, basis: Tensor) -> Tensor:
    """The rows' projection on the basis's span."""
    wide = basis.to(rows.device, torch.promote_types(rows.dtype, torch.float32))
    return ((rows.to(wide) @ wide) @ wide.T).to(rows)


def _confine(walk: Walk, stream: Tensor, basis: Tensor) -> None:
    for rows in stream.split(walk.batch):
        rows.copy_(_confined(rows.to(walk.skeleton.device), basis))


def _run_confined(block: Block, rows: Tensor, basis: Tensor) -> Tensor:
    """The block's outputs where the stream between attention and MLP is confined to the basis's span."""

    def hook(_: nn.Module, inputs: tuple, output: Any) -> Any:
        first, *others = output if isinstance(output, tuple) else (output,)
        first = _confined(rows + first, basis) - rows
        return (first, *others) if isinstance(output, tuple) else first

    handle = block.module.get_submodule(adder(block.skeleton, 0)).register_forward_hook(hook)
    try:
        return block.run(rows)
    finally:
        handle.remove()
