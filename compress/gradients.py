"""Gradients of the language-modelling loss with regard to every linear layer, with one block in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from compress.block import Block
from compress.errors import BadInput
from compress.journal import block_part
from compress.walk import Walk
from compress.weights import Dense
from compress.writer import BlockStore

_JOINED = 64  # tokens in a row, of windows of one


class Gradients(NamedTuple):
    """Of a block's linear layers, by local name, all (out, in) float32: their matrices, the gradient of the loss, and the mean
    over the windows of the squares of each window's own gradient; empty where these were not wanted."""

    block: Block
    weights: dict[str, Tensor]
    gradients: dict[str, Tensor]
    squares: dict[str, Tensor]


def gradients(walk: Walk, tokens: Tensor, *, squares: bool = False) -> Iterator[Gradients]:
    """The gradients of the mean next-token cross-entropy on tokens (n, length), from the last block to the first.

    Layers are taken as dense matrices of the values that they have. Those of blocks that share them come once, with the sum of
    their gradients; of their squares the mixed terms are left out.
    Memory: one block with its gradients, and what enters every block for these windows (on disk above a limit).
    """
    model = walk.skeleton
    forward, n_blocks = Walk(model, tokens, walk.scratch, walk.progress), len(model.blocks)
    hidden: Tensor | None = None  # what enters every block, and what leaves the last
    for block, entering, leaving in forward.blocks():
        hidden = forward.room(n_blocks + 1, entering, "entering") if hidden is None else hidden
        hidden[block.index], hidden[block.index + 1] = entering, leaving
    assert hidden is not None
    slopes = hidden[-1]  # from here on the gradient with regard to what it was
    for window, rows in zip(tokens.split(1), slopes.split(1), strict=True):
        rows.copy_(model.loss_slope(window, rows) / len(tokens))
    shared: dict[int, tuple[dict[str, Tensor], dict[str, Tensor]]] = {}
    for index in reversed(range(n_blocks)):
        weights = {local: weight.dense() for local, weight in model.read_weights(index).items()}
        block = Block(model, index, {local: Dense(matrix) for local, matrix in weights.items()}, model.read_others(index))
        model.block_arguments = forward.calls
        sums = shared.setdefault(model.owner(index), ({}, {}))
        for rows, slope in zip(hidden[index].split(1), slopes.split(1), strict=True):
            slope.copy_(_backward(block, rows, slope, len(tokens) if squares else 0, *sums))
        if index == model.owner(index):
            yield Gradients(
                block, {local: matrix.float().to(model.device) for local, matrix in weights.items()}, *shared.pop(index)
            )
        model.free_block(index)


def _backward(
    block: Block, rows: Tensor, slope: Tensor, n_windows: int, sums: dict[str, Tensor], squares: dict[str, Tensor]
) -> Tensor:
    """The gradient with regard to one window's inputs (1, length, d), from that with regard to the block's outputs; those of the
    matrices are added to ``sums``, and to ``squares`` unless n_windows is 0."""
    rows = rows.detach().to(block.skeleton.device).requires_grad_()
    with torch.enable_grad(), _seeing(block) as seen:
        outputs = block.run(rows)
        found = torch.autograd.grad(outputs, [rows, *(outputs for _, outputs in seen.values())], slope.to(outputs))
    for (local, (inputs, _)), below in zip(seen.items(), found[1:], strict=True):
        own = below.flatten(0, -2).float().T @ inputs.detach().flatten(0, -2).float()
        sums[local] = own + sums.get(local, 0)
        if n_windows:  # the loss is a mean over windows: a window's own gradient is that many times its part
            squares[local] = own.square() * n_windows + squares.get(local, 0)
    return found[0].detach().cpu()


@torch.no_grad()
def write_fisher(walk: Walk, store: BlockStore) -> None:
    """Store :attr:`LinearStats.fisher` of every layer, by block and local name; blocks that share layers have one entry. The
    gradients are the model's own, as it is, on all windows; a rerun that finds them finished takes no others."""
    model = walk.skeleton
    if all(store.done(block_part(model.owner(index))) for index in range(len(model.blocks))):
        return
    for seen in gradients(walk, _in_sequences(walk.windows), squares=True):
        store.write(block_part(seen.block.index), {local: squares.sum(0) for local, squares in seen.squares.items()}, {})


def _in_sequences(windows: Tensor) -> Tensor:
    """Windows in which something follows: those of one token each are joined."""
    n_windows, length = windows.shape
    if length == 1:
        joined = min(n_windows, _JOINED)
        windows = windows.flatten()[: n_windows // joined * joined].view(-1, joined)
    if windows.shape[1] == 1:
        raise BadInput("the calibration is one token; gradients need two in a row")
    return windows


@contextmanager
def _seeing(block: Block) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """What enters and leaves every linear layer of a block while it runs."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def hook(local: str):
        def see(_: nn.Module, inputs: tuple[Tensor, ...], outputs: Tensor) -> None:
            seen[local] = (inputs[0], outputs)

        return see

    with ExitStack() as hooks:
        for local in block.weights:
            hooks.callback(block.module.get_submodule(local).register_forward_hook(hook(local)).remove)
        yield seen
