"""Gradients of the language-modelling loss with regard to every linear layer, with one block in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from compress.block import Block
from compress.walk import Walk
from compress.weights import Dense


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
    Memory: one block with its gradients, and what enters every block for these windows.
    """
    model = walk.skeleton
    forward = Walk(model, tokens, walk.scratch, walk.progress)
    hidden = []  # what enters every block, and what leaves the last
    for block, entering, leaving in forward.blocks():
        hidden.append(entering.clone())
        if block.index == len(model.blocks) - 1:
            hidden.append(leaving.clone())
    ends = zip(tokens.split(1), hidden.pop().split(1), strict=True)
    slopes = torch.cat([model.loss_slope(*each) for each in ends]) / len(tokens)
    shared: dict[int, tuple[dict[str, Tensor], dict[str, Tensor]]] = {}
    for index in reversed(range(len(hidden))):
        weights = {local: weight.dense() for local, weight in model.read_weights(index).items()}
        block = Block(model, index, {local: Dense(matrix) for local, matrix in weights.items()}, model.read_others(index))
        model.block_arguments = forward.calls
        sums = shared.setdefault(model.owner(index), ({}, {}))
        slopes = torch.cat([
            _backward(block, rows, slope, len(tokens) if squares else 0, *sums)
            for rows, slope in zip(hidden.pop().split(1), slopes.split(1), strict=True)
        ])  # fmt: skip
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
