"""Magnitude: prune the weights of least absolute value, without data (Han et al., 1506.02626)."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from compress.passes import Taxon
from compress.prune.masks import Pattern, Pruner
from compress.stats import LinearStats


class Magnitude(Pruner):
    """The baseline of unstructured pruning; all weights of a matrix compete by default."""

    taxon: ClassVar[Taxon] = Taxon.UNSTRUCTURED
    paper: ClassVar[str] = "1506.02626"

    pattern: Pattern = Field("tensor", description="what competes: row, tensor, or N:M (N kept of M consecutive inputs)")

    def scores(self, weight: Tensor, stats: LinearStats) -> Tensor:
        return weight.abs()
