"""ASVD: truncate the singular values of the weight, its columns scaled by the size of their inputs (Yuan et al., 2312.05821)."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from compress.lowrank.factor import Factoriser
from compress.passes import Needs, Taxon
from compress.stats import LinearStats


class ASVD(Factoriser):
    """Inputs with large activations are approximated more closely: a diagonal stand-in for SVD-LLM's whitening.

    The decomposition is exact, where the published code draws a random one. ``ranks=sensitivity`` is the paper's search for
    every layer's rank, by what its truncation does to the block's outputs instead of to the perplexity.
    """

    taxon: ClassVar[Taxon] = Taxon.LOW_RANK
    paper: ClassVar[str] = "2312.05821"

    alpha: float = Field(0.5, ge=0, le=1, description="power of the inputs' sizes; 0: plain SVD")
    size: Literal["mean", "largest"] = Field("mean", description="what is taken of the inputs' absolute values")

    @property
    def needs(self) -> Needs:  # type: ignore[override]  # depends on a setting
        return Needs(frozenset({"abssum" if self.size == "mean" else "absmax"}))

    @property
    def undisturbed(self) -> bool:
        return True

    def metric(self, weight: Tensor, stats: LinearStats) -> Tensor:
        sizes = (stats.abssum / max(stats.n, 1) if self.size == "mean" else stats.absmax).double()
        scale = sizes.pow(self.alpha)
        least = 1e-6 * scale.mean()  # so that inputs which were never seen are not forgotten
        return weight * (scale + torch.where(least > 0, least, 1.0))
