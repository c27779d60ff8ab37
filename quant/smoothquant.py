"""SmoothQuant: move the outliers of activations into the weights before both are quantized (Xiao et al., 2211.10438)."""

from __future__ import annotations

import logging
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from compress.block import Block
from compress.passes import BlockPass, Needs, Taxon

log = logging.getLogger(__name__)

_LEAST = 1e-5  # of either maximum, as in the published code


class SmoothQuant(BlockPass):
    """Divides each input of q/k/v and gate/up by ``max|x| ** alpha / max|w| ** (1 - alpha)``, in the norm before, and multiplies
    the weights by it. The model's function stays; a quantizer of weights and activations is to follow, as in
    ``smoothquant gptq:bits=8,activations=int8``. Layers that read no norm (o, down) are left, and so are those that share an
    input with one that is on a grid or not targeted.

    alpha is how much of the difficulty goes to the weights. The published choices are 0.5 for OPT, 0.8 for Mistral-7B, 0.85
    for Llama-2-7B and 13B, 0.9 for Llama-2-70B.
    """

    taxon: ClassVar[Taxon] = Taxon.WEIGHT_ACTIVATION
    paper: ClassVar[str] = "2211.10438"
    needs: ClassVar[Needs] = Needs(frozenset({"absmax"}))

    alpha: float = Field(0.5, ge=0, le=1, description="share of the outliers that the weights take: 0.5 to 0.9 by model")

    @torch.no_grad()
    def block(self, block: Block) -> None:
        movable = block.edges("norms")
        for edge in block.skeleton.arch.norms:
            if edge in movable:
                weights = [weight for reader in edge.readers for weight in block.entries(reader).values()]
                largest = torch.stack([weight.dense(torch.float32).abs().amax(0) for weight in weights]).amax(0)
                block.fold(edge, smoothing_scale(block.stats[edge.readers[0]].absmax, largest, self.alpha))
            elif block.selected.intersection(edge.readers):
                names = ", ".join(block.name(reader) for reader in edge.readers)
                log.warning("smoothquant leaves %s: one is quantized or not targeted, or their norm has no weight", names)


def smoothing_scale(activations: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """What to divide each input by, (in,), from the largest absolute activations and weights of it, (in,) each; one for
    inputs that were never active."""
    scale = activations.clamp(min=_LEAST) ** alpha / weights.to(activations.device).clamp(min=_LEAST) ** (1 - alpha)
    return torch.where(activations > 0, scale, 1.0)
