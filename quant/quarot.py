"""QuaRot: rotate the residual stream and the heads by randomised Hadamard matrices, so that no channel stands out and
rounding loses less; the function stays (Ashkboos et al., 2404.00456).

Only rotations that fold into the weights are made (R1 of the stream, R2 of values and outputs): the artifact is a plain
checkpoint, and a quantizer follows. LayerNorm subtracts a mean, which a rotation keeps if it leaves the vector of ones as it
is: so models with LayerNorm are rotated around that axis, instead of being turned into others.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from compress.passes import ModelPass, Taxon
from compress.quant.hadamard import random_hadamard
from compress.rotate import (
    check_model,
    check_weight,
    head_matrix,
    is_centred,
    multiplied,
    stream_size,
    turn_outputs,
    turned_block,
    turned_outer,
)
from compress.skeleton import Skeleton
from compress.surgery import Surgery
from compress.weights import Weight


class QuaRot(ModelPass):
    """Rotate every layer. All of it is computed in float64 and stored in the checkpoint's dtype.

    A tied head gets a matrix of its own, since it takes up the gains of the last norm. Raises BadInput for architectures
    that norm what they add to the stream (Gemma 2), and for zeros or grids, which a rotation would fill: so it comes first in
    a chain. Heads are rotated where values and outputs are separate layers.
    """

    taxon: ClassVar[Taxon] = Taxon.WEIGHT_ACTIVATION
    paper: ClassVar[str] = "2404.00456"

    heads: bool = Field(True, description="rotate values and outputs within each head too")
    seed: int = Field(0, ge=0, description="of the random signs")

    def outline(self, weight: Weight) -> Weight:
        return check_weight(self, weight)

    def surgery(self, model: Skeleton, found: Any = None) -> Surgery:
        check_model(self, model)
        width, head = stream_size(model), head_matrix(model)
        rotation = random_hadamard(width, self.seed, torch.float64)
        if is_centred(model):
            rotation = mean_keeping_rotation(width, self.seed)
        return Surgery(
            outer=lambda tensors: turned_outer(model, tensors, rotation, rotation),
            block=lambda index, weights, others: self._block(model, index, weights, others, rotation),
            config={"tie_word_embeddings": False},
            added={head: model.outer_meta(f"{model.arch.embeddings[0]}.weight")} if head in model.tied else {},
            preserves=True,
        )

    def _block(
        self, model: Skeleton, index: int, weights: dict[str, Weight], others: dict[str, Tensor], rotation: Tensor
    ) -> tuple[dict[str, Weight], dict[str, Tensor]]:
        arch = model.arch
        weights, others = turned_block(model, index, weights, others, [rotation] * (len(arch.norms) + 1))
        # From values to outputs: attention mixes tokens, never the channels of a head.
        for edge in [edge for edge in arch.products if self.heads and "attn" in edge.source]:
            config = model.checkpoint.config
            size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            turn = random_hadamard(size, self.seed + 1, torch.float64)
            (reader,), n_values, n_inputs = edge.readers, weights[edge.source].shape[0], weights[edge.readers[0]].shape[1]
            turn_outputs(weights, others, edge.source, torch.block_diag(*[turn] * (n_values // size)))
            weights[reader] = multiplied(weights[reader], right=torch.block_diag(*[turn] * (n_inputs // size)))
        return weights, others


def mean_keeping_rotation(size: int, seed: int) -> Tensor:
    """A random orthogonal matrix (size, size), float64, that maps the vector of ones to itself."""
    axis = torch.full((size,), -(size**-0.5), dtype=torch.float64)
    axis[0] += 1
    mirror = torch.eye(size, dtype=torch.float64) - 2 * torch.outer(axis, axis) / axis.dot(axis)  # swaps e_1 and the ones
    inner = torch.block_diag(torch.ones(1, 1, dtype=torch.float64), random_hadamard(size - 1, seed, torch.float64))
    return mirror @ inner @ mirror
