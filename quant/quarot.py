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

from compress.errors import BadInput
from compress.passes import ModelPass, Taxon
from compress.quant.hadamard import random_hadamard
from compress.skeleton import Skeleton
from compress.surgery import Surgery
from compress.weights import Dense, LowRank, Weight

_FLAT = 1e-5  # a gain this much smaller than the largest cannot be divided by


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
        if weight.mask is not None or not _is_floating(weight):
            raise ValueError("a rotation would fill the zeros of a mask and leave a grid: put quarot before such passes")
        return weight

    def surgery(self, model: Skeleton) -> Surgery:
        arch, config = model.arch, model.checkpoint.config
        if model.tables():
            raise BadInput("quarot would leave the embedding's grid: put quarot before embeddings")
        if arch.writers is None:
            raise BadInput(f"quarot: {config.model_type} norms each layer's output before it is added, so it cannot be rotated")
        final_norm, head = model.model.get_submodule(arch.final_norm), model.model.get_output_embeddings()
        width = final_norm.weight.shape[0]
        if head.weight.shape[1] != width or getattr(config, "do_layer_norm_before", True) is False:
            raise BadInput("quarot: this model projects its embeddings or norms after its layers, so it cannot be rotated")
        centred = "LayerNorm" in type(final_norm).__name__
        rotation = mean_keeping_rotation(width, self.seed) if centred else random_hadamard(width, self.seed, torch.float64)
        head_name = f"{next(name for name, module in model.model.named_modules() if module is head)}.weight"
        untied = {head_name: model.outer_meta(f"{arch.embeddings[0]}.weight")}
        return Surgery(
            outer=lambda tensors: self._outer(model, tensors, rotation, head_name),
            block=lambda index, weights, others: self._block(model, index, weights, others, rotation),
            config={"tie_word_embeddings": False},
            added=untied if head_name in model.tied else {},
            preserves=True,
        )

    def _outer(self, model: Skeleton, tensors: dict[str, Tensor], rotation: Tensor, head: str) -> dict[str, Tensor]:
        arch, new = model.arch, dict(tensors)
        matrix = tensors.get(head, tensors[f"{arch.embeddings[0]}.weight"])
        gain, moved = _fuse(model, arch.final_norm, tensors, rotation, model.model)
        new |= {f"{arch.final_norm}.{key}": value for key, value in moved.items()}
        new[head] = (matrix.double() * gain @ rotation).to(matrix.dtype)
        for table in arch.embeddings:
            old = tensors[f"{table}.weight"]
            new[f"{table}.weight"] = (old.double() @ rotation).to(old.dtype)
        return new

    def _block(
        self, model: Skeleton, index: int, weights: dict[str, Weight], others: dict[str, Tensor], rotation: Tensor
    ) -> tuple[dict[str, Weight], dict[str, Tensor]]:
        arch, weights, others = model.arch, dict(weights), dict(others)
        for edge in arch.norms:
            gain, moved = _fuse(model, edge.source, others, rotation, model.blocks[index])
            others |= {f"{edge.source}.{key}": value for key, value in moved.items()}
            for reader in edge.readers:
                weights[reader] = multiplied(weights[reader], right=gain.unsqueeze(1) * rotation)
        assert arch.writers is not None
        for writer in arch.writers:
            _turn_outputs(weights, others, writer, rotation)
        # From values to outputs: attention mixes tokens, never the channels of a head.
        for edge in [edge for edge in arch.products if self.heads and "attn" in edge.source]:
            config = model.checkpoint.config
            size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            turn = random_hadamard(size, self.seed + 1, torch.float64)
            (reader,), n_values, n_inputs = edge.readers, weights[edge.source].shape[0], weights[edge.readers[0]].shape[1]
            _turn_outputs(weights, others, edge.source, torch.block_diag(*[turn] * (n_values // size)))
            weights[reader] = multiplied(weights[reader], right=torch.block_diag(*[turn] * (n_inputs // size)))
        return weights, others


def mean_keeping_rotation(size: int, seed: int) -> Tensor:
    """A random orthogonal matrix (size, size), float64, that maps the vector of ones to itself."""
    axis = torch.full((size,), -(size**-0.5), dtype=torch.float64)
    axis[0] += 1
    mirror = torch.eye(size, dtype=torch.float64) - 2 * torch.outer(axis, axis) / axis.dot(axis)  # swaps e_1 and the ones
    inner = torch.block_diag(torch.ones(1, 1, dtype=torch.float64), random_hadamard(size - 1, seed, torch.float64))
    return mirror @ inner @ mirror


def multiplied(weight: Weight, left: Tensor | None = None, right: Tensor | None = None) -> Weight:
    """left @ weight @ right, in float64, in the weight's own dtype; of a low-rank weight its outer factors change."""
    if isinstance(weight, LowRank):
        return LowRank(multiplied(weight.down, None, right), multiplied(weight.up, left, None))
    assert isinstance(weight, Dense), "outline lets no other weight through"
    values = weight.values.double()
    values = values if left is None else left @ values
    values = values if right is None else values @ right
    return Dense(values.to(weight.dtype).contiguous())


def _is_floating(weight: Weight) -> bool:
    return isinstance(weight, Dense) or (isinstance(weight, LowRank) and _is_floating(weight.down) and _is_floating(weight.up))


def _turn_outputs(weights: dict[str, Weight], others: dict[str, Tensor], name: str, rotation: Tensor) -> None:
    """Rotate what a layer puts out: y becomes y @ rotation."""
    weights[name] = multiplied(weights[name], left=rotation.T)
    if f"{name}.bias" in others:
        bias = others[f"{name}.bias"]
        others[f"{name}.bias"] = (bias.double() @ rotation).to(bias.dtype)


def _fuse(
    model: Skeleton, norm: str, tensors: dict[str, Tensor], rotation: Tensor, root: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """The gain of a norm, (d,) float64, which its readers take up, and the norm's tensors without it, by their last names.

    An offset stays with the norm: divided by the gain, for the readers to multiply it again, and rotated.
    """
    stored = tensors[f"{norm}.weight"]
    plus_one = model.norm_adds_one(root.get_submodule(norm))
    gain, moved = stored.double() + plus_one, {"weight": torch.full_like(stored, 0.0 if plus_one else 1.0)}
    if (offset := tensors.get(f"{norm}.bias")) is not None:
        if bool(((gain.abs() < _FLAT * gain.abs().max()) & (offset != 0)).any()):
            raise ValueError(f"{norm}: a gain is zero where the offset is not, so the model cannot be rotated")
        moved["bias"] = (torch.where(gain == 0, 0, offset.double() / gain) @ rotation).to(offset.dtype)
    return gain, moved
