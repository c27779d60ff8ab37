"""OmniQuant: learn, from the error of a block's outputs, how far to clip each group's range, and which factors to move
between neighbouring layers before they are rounded (Shao et al., 2308.13137)."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from compress.activations import round_inputs
from compress.arch import Edge
from compress.block import Block
from compress.descent import constant, descend
from compress.passes import BlockPass, Needs, Taxon
from compress.quant.grids import Gridded
from compress.quant.smoothquant import smoothing_scale
from compress.quant.tuning import LEAST_SHARE, Rounded, round_softly
from compress.weights import Weight

_FIRST_LOGIT = 4.0  # leaves 98 % of the range
_LEAST_FACTOR = 1e-2


class OmniQuant(Gridded, BlockPass):
    """Nearest codes on clipped grids, with weights that stay as they are.

    The shares of a group's range above and below zero that are kept are sigmoids of learned numbers ("learnable weight
    clipping"). With ``transform``, a factor per channel is learned as well for every edge of the block along which one can
    be moved, starting from SmoothQuant's ("learnable equivalent transformation"); it is folded into norms and matrices. The
    block runs on what the compressed blocks before it put out, and is to give what it gave before the stage.

    The published code has asymmetric grids (``symmetric=false``) whose range need not hold zero, which here it always does.
    It also scales queries against keys and learns shifts, which would need biases; up is not scaled against down there.
    """

    taxon: ClassVar[Taxon] = Taxon.WEIGHT_ONLY
    paper: ClassVar[str] = "2308.13137"
    needs: ClassVar[Needs] = Needs(frozenset({"absmax"}), inputs=True, reference=True)
    efforts: ClassVar[dict[str, dict[str, Any]]] = {"fast": {"epochs": 10}, "best": {"epochs": 40}}

    epochs: int = Field(20, ge=0, description="times that each calibration sequence is seen")
    batch_size: int = Field(1, ge=1, description="calibration sequences per step")
    learning_rate: float = Field(1e-2, gt=0, description="of the clipping (AdamW)")
    transform: bool | None = Field(None, description="learn factors to move between layers; none: if activations are rounded")
    transform_rate: float = Field(5e-3, gt=0, description="learning rate of the factors' logarithms")

    @model_validator(mode="after")
    def _grids_follow_the_factors(self) -> OmniQuant:
        if self.mse and self.transforms:
            raise ValueError("learned factors fit the grids anew at every step: drop mse=true, or say transform=false")
        return self

    @property
    def transforms(self) -> bool:
        """Whether factors are learned."""
        return self.activations is not None if self.transform is None else self.transform

    def learning_tokens(self, samples: int, length: int) -> int:
        return self.epochs * samples * length

    def block(self, block: Block) -> None:
        for name in block.matrices():
            round_inputs(block.module.get_submodule(name), self.activations)
        for local in block.selected:
            block.weights[local] = block.weights[local].map(lambda tensor: tensor.to(block.skeleton.device))
        edges = [*block.edges("norms"), *block.edges("products")] if self.transforms else []
        factors = {edge: first_factor(block, edge).log().requires_grad_() for edge in edges}
        clippings = {name: Clipping(self, weight) for name, weight in block.matrices().items()}
        logits = [logit for clipping in clippings.values() for logit in clipping.logits]
        optimizer = torch.optim.AdamW(
            [
                {"params": logits, "lr": self.learning_rate},
                {"params": list(factors.values()), "lr": self.transform_rate},
            ],
            weight_decay=0,
        )

        def replaced() -> dict[str, Tensor]:
            moved, others = block.folded({edge: factor_of(logarithm) for edge, logarithm in factors.items()})
            matrices = block.matrices(moved)
            return others | {name: clippings[name].rounded(weight).values(weight.mask) for name, weight in matrices.items()}

        if self.epochs and logits:
            assert block.inputs is not None
            n_steps = self.epochs * math.ceil(len(block.inputs) / self.batch_size)
            descend(block, replaced, optimizer, n_steps, self.batch_size, rate=constant)
        for edge, logarithm in factors.items():
            block.fold(edge, factor_of(logarithm.detach()))
        for name, weight in block.matrices().items():
            block.replace(name, clippings[name].rounded(weight).weight(self, weight.dtype, weight.mask))


def first_factor(block: Block, edge: Edge) -> Tensor:
    """SmoothQuant's factors with exponent 1/2, (channels,) float32."""
    matrices = [weight for reader in edge.readers for weight in block.entries(reader).values()]
    largest = torch.stack([weight.dense(torch.float32).abs().amax(0) for weight in matrices]).amax(0)
    return smoothing_scale(block.stats[edge.readers[0]].absmax, largest, 0.5).clamp(min=_LEAST_FACTOR)


def factor_of(logarithm: Tensor) -> Tensor:
    """A factor from what is learned: positive, and not so small that its inverse blows up."""
    return logarithm.exp().clamp(min=_LEAST_FACTOR)


class Clipping:
    """How a matrix's groups are clipped: the logits (out, groups), float32 leaves, of the shares of the range above and
    below zero that are left; a symmetric grid has one range."""

    def __init__(self, settings: Gridded, weight: Weight):
        self.settings, self.weight = settings, weight
        self.grid = settings.fit(weight.dense(torch.float32), weight.dtype)
        first = torch.full_like(self.grid.scale, _FIRST_LOGIT, dtype=torch.float32)
        self.logits = [first.clone().requires_grad_() for _ in range(1 if self.grid.zero_point is None else 2)]

    def rounded(self, weight: Weight) -> Rounded:
        """The matrix, or what factors have made of it, on its clipped grid."""
        values = weight.dense(torch.float32)
        grid = self.grid if weight is self.weight else self.settings.fit(values, weight.dtype)
        shares = [logit.sigmoid().clamp(min=LEAST_SHARE) for logit in self.logits]
        return round_softly(values, grid, shares[0], shares[-1])
