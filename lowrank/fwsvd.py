"""FWSVD: truncate the singular values of the weight with its columns scaled by how much the loss depends on them (Hsu et al.,
2207.00112)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from compress.lowrank.factor import Factoriser
from compress.passes import Needs, Taxon
from compress.stats import LinearStats


class FWSVD(Factoriser):
    """Least is lost of the inputs whose weights have a large Fisher information: the mean, over the calibration windows, of the
    squared gradients of the language-modelling loss. One number for all weights that read an input is what leaves a closed form.

    Gradients are those of the model as it is when the stage begins, on all windows, with one block in memory at a time.
    """

    taxon: ClassVar[Taxon] = Taxon.LOW_RANK
    paper: ClassVar[str] = "2207.00112"
    needs: ClassVar[Needs] = Needs(frozenset({"fisher"}))

    def metric(self, weight: Tensor, stats: LinearStats) -> Tensor:
        scale = stats.fisher.double().sqrt()
        return weight * scale if bool(scale.any()) else weight

    def learning_tokens(self, samples: int, length: int) -> int:
        return samples * length
