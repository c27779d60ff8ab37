"""Block-AP: train all weights of a block together with the scales and zero-points of their grids, rounding at every step, until
it puts out what the original's block does (phase one of EfficientQAT, Chen et al., 2407.11062)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from compress.activations import round_inputs
from compress.block import Block
from compress.descent import cosine, descend
from compress.moving import Moving, moving, stopped
from compress.passes import BlockPass, Needs, Taxon
from compress.quant.grids import Gridded
from compress.weights import Weight

_LARGEST_RATE = 0.01  # beyond it the first steps, which are as long for all weights, move too many codes at once
_LAST_SHARE = 0.05  # of the learning rates, which is left at the last step
_SMALLEST = 1e-16  # added to Adam's root of squares: gradients of a mean over all outputs are tiny


class BlockAP(Gridded, BlockPass):
    """A weight w becomes ``clip(round(w / s) + round(z)) - round(z)`` times s, and w, s and z are all trained in float32, by
    AdamW with rates that fall along a cosine; gradients pass the roundings as if they were not there. The block runs on what the
    blocks before it put out as they are now, and is to give what the *uncompressed* model's gives on that model's own
    activations. An eighth of the sequences is not learned from: by it is decided when a block was best. No steps are rounding to
    nearest.

    Rates are in steps of the grid that a group begins with, so that they mean the same for every model; scales move by shares
    of what a matrix's are on average. Published are 4096 steps of 2 sequences at 2e-5 for weights and 1e-4 for s and z: for the
    2-bit grids of Llama 2, whose steps are about 0.03, that is 7e-4 and 3e-3. With the rates of here weights go half a step at
    most, as AutoRound's do, in however few iterations.

    Grids span zero, which the published ones need not.
    """

    taxon: ClassVar[Taxon] = Taxon.QAT
    paper: ClassVar[str] = "2407.11062"
    needs: ClassVar[Needs] = Needs(inputs=True, reference=True, teacher=True)
    efforts: ClassVar[dict[str, dict[str, Any]]] = {"fast": {"iterations": 50}, "best": {"iterations": 1000}}

    symmetric: bool = Field(False, description="grids centred on zero, without zero-points")
    iterations: int = Field(200, ge=0, description="steps of AdamW per block")
    batch_size: int = Field(4, ge=1, description="calibration sequences per step")
    learning_rate: float | None = Field(
        None, gt=0, description="of weights at the first step, in steps of the grid; none: 1 / iterations, 0.01 at most"
    )
    grid_rate: float | None = Field(
        None,
        gt=0,
        description="of scales, as a share of them, and of zero-points, in steps of the grid; none: twice the weights'",
    )

    def learning_tokens(self, samples: int, length: int) -> int:
        return self.iterations * min(self.batch_size, samples) * length

    def block(self, block: Block) -> None:
        for name in block.matrices():
            round_inputs(block.module.get_submodule(name), self.activations)
        begun = {name: self.begin(weight, block.skeleton.device) for name, weight in block.matrices().items()}
        learned = {name: _leaves(weight) for name, weight in begun.items()}
        if self.iterations and begun:
            assert block.inputs is not None
            optimizer = torch.optim.AdamW(
                [group for own in learned.values() for group in self.groups(own)], eps=_SMALLEST, weight_decay=0
            )
            descend(
                block, lambda: {name: weight.rebuild(learned[name]).dense(torch.float32) for name, weight in begun.items()},
                optimizer, self.iterations, self.batch_size,
                rate=lambda done: _LAST_SHARE + (1 - _LAST_SHARE) * cosine(done), n_held_out=len(block.inputs) // 8,
            )  # fmt: skip
        for name, weight in begun.items():
            block.replace(name, stopped(weight.rebuild(learned[name])))

    def begin(self, weight: Weight, device: torch.device) -> Weight:
        """The matrix rounded to nearest, with all of it free to move."""
        values = weight.dense().to(device)
        mask = None if weight.mask is None else weight.mask.to(device)
        return moving(self.nearest(values, mask), values, Moving.free)

    def groups(self, learned: dict[str, Tensor]) -> list[dict[str, Any]]:
        """The optimizer's groups of a matrix's parameters."""
        size = float(learned["scale"].detach().abs().mean())
        rate = self.learning_rate or min(_LARGEST_RATE, 1 / self.iterations)
        grid_rate = self.grid_rate or 2 * rate
        rates = {"positions": rate, "scale": grid_rate * size, "zeros": grid_rate}
        return [{"params": [value], "lr": rates[name]} for name, value in learned.items()]


def _leaves(weight: Weight) -> dict[str, Tensor]:
    """Float32 copies of a weight's parameters, for gradients."""
    return {name: value.to(torch.float32, copy=True).requires_grad_() for name, value in weight.parameters().items()}
