"""PELA: after factorising, train the factors to give the original's hidden states, with a pull back to where they began (Guo et
al., 2310.10700)."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field

from compress.adapted import Shifted
from compress.distill.feature_kd import FeatureKD
from compress.passes import Taxon
from compress.weights import Dense, Weight
from compress.weights.composed import unmasked


class PELA(FeatureKD):
    """The factors are trained as what they began with and a change, and ``weight_decay`` draws the change alone towards 0: the
    penalty on drift. `svd:ratio=0.333 pela` is the paper's recipe. Its penalty is on the products of the factors; here it is on
    the factors. Factors on grids train their scales, without it.

    See :class:`TrainPass` for the training fields.
    """

    taxon: ClassVar[Taxon] = Taxon.LOW_RANK
    paper: ClassVar[str] = "2310.10700"

    trains: Literal["factors", "weights", "blocks", "everything"] = Field("factors", description="see logit_kd")
    logits: float = Field(0.0, ge=0, description="weight of the divergence of the predictions")
    weight_decay: float = Field(0.1, ge=0, description="of the factors' changes")

    def adapt(self, weight: Weight, generator: torch.Generator) -> Weight:
        if not isinstance(inner := unmasked(weight), Dense):
            return weight
        return Shifted(weight, torch.zeros_like(inner.values))
