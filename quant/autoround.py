"""AutoRound: learn by signed gradient descent which way each weight of a block is rounded, and how far each group's range
shrinks, from the error of the block's outputs (SignRound, Cheng et al., 2309.05516)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from compress.activations import round_inputs
from compress.block import Block
from compress.descent import descend, linear
from compress.passes import BlockPass, Needs, Taxon
from compress.quant.grids import Gridded
from compress.quant.tuning import LEAST_SHARE, Rounded, round_softly
from compress.weights import Weight


class AutoRound(Gridded, BlockPass):
    """Integer codes next to the nearest ones, tuned for a whole block at a time.

    A weight w becomes ``clip(round(w / s + V) + z)``: its offset V starts at zero, and the shares of the group's range
    above and below zero, which make s and z, at one. All follow the sign of their gradient for ``iterations`` steps with a
    rate that falls linearly to zero. V stays within half a step of the grid, so that no weight goes further than to its
    other neighbour. The block runs on what the compressed blocks before it put out, and is to give what it gave before the
    stage. Zero steps are rounding to nearest.

    Symmetric grids are the paper's, with ``full_range``: the side that has one more code is the one of the group's extreme
    weight, by the sign of the scale, which makes the steps finer by a quarter at 2 bits. Asymmetric ones are as elsewhere.
    """

    taxon: ClassVar[Taxon] = Taxon.WEIGHT_ONLY
    paper: ClassVar[str] = "2309.05516"
    needs: ClassVar[Needs] = Needs(inputs=True, reference=True)
    efforts: ClassVar[dict[str, dict[str, Any]]] = {
        "fast": {"iterations": 50, "learning_rate": 5e-3},
        "best": {"iterations": 1000},
    }

    iterations: int = Field(200, ge=0, description="steps of gradient descent per block")
    batch_size: int = Field(8, ge=1, description="calibration sequences per step")
    learning_rate: float | None = Field(
        None, gt=0, description="of the first step; none: 1 / iterations, twice that from 1000 on where bits are 3 or 2"
    )
    full_range: bool = Field(True, description="symmetric grids whose lowest code is the extreme weight, whatever its sign")

    def first_rate(self) -> float:
        """The learning rate of the first step."""
        return self.learning_rate or (2 if self.bits <= 3 and self.iterations >= 1000 else 1) / self.iterations

    def learning_tokens(self, samples: int, length: int) -> int:
        return self.iterations * min(self.batch_size, samples) * length

    def block(self, block: Block) -> None:
        for name in block.matrices():
            round_inputs(block.module.get_submodule(name), self.activations)
        roundings = {name: Rounding(self, weight, block.skeleton.device) for name, weight in block.matrices().items()}
        if self.iterations and roundings:
            parameters = [parameter for rounding in roundings.values() for parameter in rounding.parameters]
            optimizer = torch.optim.SGD(parameters, lr=self.first_rate())
            for parameter in parameters:
                parameter.register_hook(torch.sign)
            optimizer.register_step_post_hook(lambda *_: confine(roundings.values()))
            descend(
                block, lambda: {name: rounding.values() for name, rounding in roundings.items()},
                optimizer, self.iterations, self.batch_size, rate=linear,
            )  # fmt: skip
        for name, rounding in roundings.items():
            block.replace(name, rounding.result())


class Rounding:
    """How a matrix is rounded, and the parameters that say so.

    offset: (out, in), in steps of the grid, within [-1/2, 1/2]. upper, lower: (out, groups), the shares of the range above
    and below zero that are left; all float32, and leaves for gradients.
    """

    def __init__(self, settings: Gridded, weight: Weight, device: torch.device):
        weight = weight.map(lambda tensor: tensor.to(device))
        self.settings, self.mask, self.dtype = settings, weight.mask, weight.dtype
        self.weight = weight.dense(torch.float32)
        self.grid = settings.fit(self.weight, weight.dtype)
        self.offset = torch.zeros_like(self.weight, requires_grad=True)
        self.upper = torch.ones_like(self.grid.scale, dtype=torch.float32, requires_grad=True)
        self.lower = torch.ones_like(self.upper, requires_grad=True)

    @property
    def parameters(self) -> list[Tensor]:
        """What is learned: a symmetric grid has no range below zero of its own."""
        return [self.offset, self.upper] if self.grid.zero_point is None else [self.offset, self.upper, self.lower]

    def rounded(self) -> Rounded:
        """The codes and the grid as the parameters have them now."""
        return round_softly(self.weight, self.grid, self.upper, self.lower, self.offset)

    def values(self) -> Tensor:
        """The (out, in) matrix to compute with, zero where an earlier pass removed weights."""
        return self.rounded().values(self.mask)

    def result(self) -> Weight:
        """The weight in its final form."""
        return self.rounded().weight(self.settings, self.dtype, self.mask)


@torch.no_grad()
def confine(roundings: Iterable[Rounding]) -> None:
    """Bring parameters back to where they mean something."""
    for rounding in roundings:
        rounding.offset.clamp_(-0.5, 0.5)
        rounding.upper.clamp_(LEAST_SHARE, 1)
        rounding.lower.clamp_(LEAST_SHARE, 1)
