"""Reconstruct: train one block after the other, in the form that compression gave it, to put out what the original's block does
(after BRECQ, Li et al., 2102.05426)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from compress.activations import CACHE_SCALES
from compress.block import Block
from compress.descent import cosine, descend
from compress.moving import moving, stopped
from compress.passes import BlockPass, Needs, Taxon
from compress.trainable import TrainableLinear, trainable_layers

_SMALLEST = 1e-16  # added to Adam's root of squares: gradients of a mean over all outputs are tiny
_SCALES = tuple(CACHE_SCALES.values())


class Reconstruct(BlockPass):
    """Recovery without labels, and without a backward pass through more than a block: memory is that of one.

    What a block's layers keep (values, factors, scales of grids) moves in float32, by Adam with a rate that falls along a
    cosine; masks, ranks and zero points stay. With ``codes`` those of integer grids may move to other steps: as in Block-AP of
    EfficientQAT (2407.11062) weights move too, and are rounded at every step. Where the grid was made in the same stage each
    begins as near to where the original's is as it can without another code: so the quantizer's choice is kept at first, and
    the first to be rounded elsewhere are those of which the choice was close. The block runs on what the blocks before it put
    out as they are now, and is to give what the *uncompressed* model's gives on that model's own activations: so it also
    repairs what earlier blocks do wrong. An eighth of the sequences is not learned from: by it is decided when a block was
    best, which may be at the start.

    Where no block of the uncompressed model corresponds to one that is left (blocks or hidden channels have gone, or are in
    another basis), what the blocks put out when the stage began takes its place, with a warning: then only what passes of the
    same stage did is repaired.
    """

    taxon: ClassVar[Taxon] = Taxon.WHITE_BOX
    paper: ClassVar[str] = "2102.05426"
    needs: ClassVar[Needs] = Needs(inputs=True, reference=True, teacher=True)
    efforts: ClassVar[dict[str, dict[str, Any]]] = {"fast": {"iterations": 50}, "best": {"iterations": 1000}}

    iterations: int = Field(200, ge=0, description="steps of Adam per block")
    batch_size: int = Field(4, ge=1, description="calibration sequences per step")
    learning_rate: float = Field(1e-3, gt=0, description="of the first step; it falls to zero along a cosine")
    codes: bool = Field(True, description="let codes of integer grids move to other steps of their grid")
    trains: Literal["weights", "blocks"] = Field("blocks", description="weights: linear layers; blocks: norms and biases too")

    def learning_tokens(self, samples: int, length: int) -> int:
        return self.iterations * min(self.batch_size, samples) * length

    def block(self, block: Block) -> None:
        chosen = {local: weight for local, weight in block.weights.items() if local in block.selected}
        if self.codes:
            chosen = {local: moving(weight, block.before[local].dense()) for local, weight in chosen.items()}
        if not (self.iterations and chosen):
            return
        with trainable_layers(block.module, chosen, block.skeleton.device) as layers:
            others = self.others(block)
            groups = [
                {"params": [master], "lr": share * self.learning_rate}
                for layer in block.module.modules() if isinstance(layer, TrainableLinear) for _, master, share in layer.shares()
            ]  # fmt: skip
            biases = {f"{local}.bias": layer.bias for local, layer in layers.items() if layer.bias is not None}
            if self.trains == "blocks":
                groups.append({"params": [*others.values(), *biases.values()]})
            if any(group["params"] for group in groups):
                assert block.inputs is not None
                optimizer = torch.optim.Adam(groups, lr=self.learning_rate, eps=_SMALLEST)
                descend(
                    block, lambda: others, optimizer, self.iterations, self.batch_size,
                    rate=cosine, n_held_out=len(block.inputs) // 8,
                )  # fmt: skip
            trained = {local: stopped(layer.trained()) for local, layer in layers.items()}
        for local, weight in trained.items():
            block.set(local, weight)
        for name, value in (others | biases).items() if self.trains == "blocks" else ():
            block.set_other(name, value.detach())

    def others(self, block: Block) -> dict[str, Tensor]:
        """Float32 copies of the block's norms by name, as they are trained; biases of linear layers are these layers' own."""
        if self.trains == "weights":
            return {}
        kept = {f"{local}.bias" for local in block.weights} | {name for name in block.others if name.endswith(_SCALES)}
        return {
            name: nn.Parameter(value.to(block.skeleton.device, torch.float32))
            for name, value in block.others.items() if name not in kept and value.dim() == 1 and value.is_floating_point()
        }  # fmt: skip
