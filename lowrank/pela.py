"""PELA: after factorising, train the factors to give the original's hidden states, with a pull back to where they began (Guo et
al., 2310.10700)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from compress.distill.feature_kd import FeatureKD
from compress.passes import Taxon
from compress.weights import Dense, Masked, Weight
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
        return Changed(weight, torch.zeros_like(inner.values))

    def settle(self, weight: Weight) -> Weight:
        return weight.merged() if isinstance(weight, Changed) else weight


@dataclass(frozen=True)
class Changed(Weight):
    """``base + change``, of which only the change is trained; where the base has a mask, the change is under it too.

    base: a dense matrix, with or without a mask. change: of its shape and dtype.
    """

    base: Weight
    change: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.base.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or self.dtype
        change = self.change.to(dtype)
        return self.base.dense(dtype) + (change if self.mask is None else change * self.mask)

    @property
    def nbytes(self) -> int:
        return self.base.nbytes

    @property
    def numel(self) -> int:
        return self.base.numel

    @property
    def mask(self) -> Tensor | None:
        return self.base.mask

    def parameters(self) -> dict[str, Tensor]:
        return {"change": self.change}

    def rebuild(self, parameters: Mapping[str, Tensor]) -> Changed:
        return replace(self, **parameters)

    def merged(self) -> Weight:
        """The base with its change in it."""
        values = Dense(self.dense(torch.float32).to(self.dtype))
        return values if self.mask is None else Masked(values, self.mask)
