"""Blocks to tune."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from compress.block import Block
from compress.checkpoint import Checkpoint
from compress.skeleton import Skeleton
from compress.stats import LinearStats


@pytest.fixture
def make_block(make_checkpoint) -> Callable[..., Block]:
    """``make_block(family)`` -> the first block of a tiny checkpoint, as the engine gives it to a pass: every layer selected,
    with inputs, targets (its own outputs) and the largest inputs of each layer."""

    def make(family: str = "llama", **changes) -> Block:
        skeleton = Skeleton(Checkpoint(make_checkpoint(family, **changes)))
        block = Block(skeleton, 0, skeleton.read_weights(0), skeleton.read_others(0))
        tokens = torch.randint(2, 256, (8, 24), generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            block.inputs = next(iter(skeleton.embed([tokens])))
            block.targets = block.run(block.inputs)
            entered = block.layer_inputs(list(block.weights), block.inputs)
        for local, x in entered.items():
            block.stats[local] = LinearStats(x.shape[-1], {"absmax"})
            block.stats[local].add(x)
        block.selected = frozenset(block.weights)
        return block

    return make
