"""Wanda: score weights by |w| * ||x||, prune the lowest of each output row (Sun et al., 2306.11695)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from compress.passes import Needs, Taxon
from compress.prune.masks import Pruner, wanda_scores
from compress.stats import LinearStats


class Wanda(Pruner):
    """Magnitude times the root mean square of the input that the weight multiplies; no weight is updated."""

    taxon: ClassVar[Taxon] = Taxon.UNSTRUCTURED
    paper: ClassVar[str] = "2306.11695"
    needs: ClassVar[Needs] = Needs(frozenset({"sqnorm"}))

    def scores(self, weight: Tensor, stats: LinearStats) -> Tensor:
        return wanda_scores(weight, stats)
