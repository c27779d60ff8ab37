"""Block-AP: train all weights of a block together with the scales and zero-points of their grids, rounded at every step, to put out
what the original's block does (phase one of EfficientQAT, Chen et al., 2407.11062)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from compress.activations import round_inputs
from compress.block import Block
from compress.descent import cosine, descend
from compress.moving import moving, stopped
from compress.passes import BlockPass, Needs, Taxon
from compress.quant.grids import Gridded
from compress.weights import Weight

_LAST = 0.05  # of the learning rates, at the last step


class BlockAP(Gridded, BlockPass):
    """Codes, scales and zero-points of a whole block, from rounding to nearest on.
    """

    taxon: ClassVar[Taxon] = Taxon.QAT
    paper: ClassVar[str] = "2407.11062"
    needs: ClassVar[Needs] = Needs(inputs=True, reference=True, teacher=True)
    efforts: ClassVar[dict[str, dict[str, Any]]] = {"fast": {"iterations": 50}, "best": {"iterations": 1000}}

    symmetric: bool = Field(False, description="grids centred on zero, without zero-points")
    iterations: int = Field(200, ge=0, description="steps of AdamW per block")
    batch_size: int = Field(4, ge=1, description="calibration sequences per step")
    learning_rate: float = Field(5e-3, gt=0, description="of the weights")
    grid_rate: float = Field(5e-3, gt=0, description="of the grid")
    zero_rate: float = Field(5e-3, gt=0, description="of the grid")
    held: float = 0.125

    def learning_tokens(self, samples: int, length: int) -> int:
        return self.iterations * min(self.batch_size, samples) * length

    def begin(self, weight: Weight) -> Weight:
        values = weight.dense()
        import os; from compress.moving import Moving; return moving(self.nearest(values, weight.mask), values, Moving.start if os.environ.get('FOLLOW') else Moving.free)

    def block(self, block: Block) -> None:
        for name in block.matrices():
            round_inputs(block.module.get_submodule(name), self.activations)
        device = block.skeleton.device
        begun = {name: self.begin(weight.map(lambda tensor: tensor.to(device))) for name, weight in block.matrices().items()}
        learned = {
            name: {key: value.float().clone().requires_grad_() for key, value in weight.parameters().items()}
            for name, weight in begun.items()
        }
        groups = []
        for name, own in learned.items():
            for key, value in own.items():
                rate = {"positions": self.learning_rate, "scale": self.grid_rate * float(begun[name].parameters()["scale"].float().abs().mean()), "zeros": self.zero_rate}[key]
                groups.append({"params": [value], "lr": rate})

        def matrices() -> dict[str, Tensor]:
            return {name: weight.rebuild(learned[name]).dense(torch.float32) for name, weight in begun.items()}

        if self.iterations and begun:
            assert block.inputs is not None
            optimizer = torch.optim.AdamW(groups, weight_decay=0, eps=1e-16)
            descend(
                block, matrices, optimizer, self.iterations, self.batch_size,
                rate=lambda done: _LAST + (1 - _LAST) * cosine(done), n_held_out=int(len(block.inputs) * self.held),
            )  # fmt: skip
        for name, weight in begun.items():
            final = {key: value.detach() for key, value in learned[name].items()}
            block.replace(name, stopped(weight.rebuild(final)))
