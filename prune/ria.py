"""RIA: score weights by their share of what their row and column hold, times their input's norm to a power (Zhang et al.,
"Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models", ICLR 2024)."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from compress.passes import Needs, Taxon
from compress.prune.masks import Pruner
from compress.stats import LinearStats


class RIA(Pruner):
    """Relative importance and activations: ``(|w| / sum of its column + |w| / sum of its row) * ||x|| ** power``. No input and
    no output loses all its weights, as small ones do where weights compete by magnitude; no weight is updated."""

    taxon: ClassVar[Taxon] = Taxon.UNSTRUCTURED
    paper: ClassVar[str] = "Zhang et al., 2024"
    needs: ClassVar[Needs] = Needs(frozenset({"sqnorm"}))

    power: float = Field(0.5, ge=0, le=2, description="exponent of the inputs' norms; 0: relative importance alone")

    def scores(self, weight: Tensor, stats: LinearStats) -> Tensor:
        sizes = weight.abs()
        least = torch.finfo(sizes.dtype).tiny  # of sums that are divided by: all of a row or column may be zero
        relative = sizes / sizes.sum(0).clamp(min=least) + sizes / sizes.sum(1, keepdim=True).clamp(min=least)
        if stats.n == 0:  # no token came by (an idle expert, say): the weights are all that is known
            return relative
        return relative * (stats.sqnorm / stats.n).sqrt() ** self.power
