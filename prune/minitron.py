"""Minitron: remove the neurons, heads and hidden channels of least activation: the mean of |a| over each window, and its
Euclidean norm over the windows (Muralidharan et al., 2407.14679)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from compress.block import Block
from compress.narrow import attention
from compress.passes import Taxon
from compress.prune.width import Narrower, Unit
from compress.walk import Walk


class Minitron(Narrower):
    """A neuron is measured where the last layer of its MLP reads it, a head by the norm over its channels where the output
    projection reads them, a hidden channel at the outputs of the blocks' norms, summed over these. A group of heads counts for
    the norm of its heads. As published, only neurons and hidden channels go from models that are released, and distillation
    follows; here hidden channels go when asked for."""

    taxon: ClassVar[Taxon] = Taxon.STRUCTURED
    paper: ClassVar[str] = "2407.14679"
    trims_queries: ClassVar[bool] = True

    units: tuple[Unit, ...] = Field(("neurons",), min_length=1, description="neurons, heads, hidden: joined with +")

    def measure(self, walk: Walk) -> dict[str, Any]:
        """Scores by block of neurons, heads and groups of heads, and of hidden channels."""
        arch = walk.skeleton.arch
        norms = [edge.readers[0] for edge in arch.norms]
        readers = [arch.neurons.reader] + ([arch.heads.reader] if arch.heads else [])
        found: dict[str, list] = {"neurons": [], "heads": [], "groups": []}
        hidden = torch.zeros(walk.skeleton.checkpoint.config.hidden_size, dtype=torch.float64)
        for block, inputs, _ in walk.blocks():
            scores = activation(block, inputs, readers + norms, walk.batch)
            found["neurons"].append(scores[arch.neurons.reader].tolist())
            if arch.heads:
                channels = scores[arch.heads.reader]
                shape = attention(walk.skeleton, block.index)
                found["heads"].append(channels.unflatten(0, (shape.n_heads, -1)).norm(dim=1).tolist())
                found["groups"].append(channels.unflatten(0, (shape.n_groups, -1)).norm(dim=1).tolist())
            hidden += sum(scores[name] for name in norms)
        return found | {"hidden": hidden.tolist()}


def activation(block: Block, inputs: Tensor, names: Sequence[str], batch: int) -> dict[str, Tensor]:
    """Of what enters each of those modules of the block, by channel: the norm over windows of the mean of |a|, (in,) float64.

    inputs: (n, length, d) of the block; batch: windows that are run at a time.
    """
    sums: dict[str, Tensor] = {}
    for rows in inputs.split(batch):
        for name, seen in block.layer_inputs(names, rows).items():
            means = seen.reshape(len(rows), -1, seen.shape[-1]).abs().mean(1, dtype=torch.float64)
            sums[name] = means.square().sum(0) + sums.get(name, 0)
    return {name: total.sqrt().cpu() for name, total in sums.items()}
