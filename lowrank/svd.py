"""SVD: truncate the singular value decomposition of each weight matrix, without data (Eckart and Young, 1936)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from compress.lowrank.factor import Factoriser, leading_directions
from compress.passes import Taxon
from compress.stats import LinearStats


class SVD(Factoriser):
    """The baseline of low-rank approximation: the closest matrix of its rank, whatever the inputs are."""

    taxon: ClassVar[Taxon] = Taxon.LOW_RANK
    paper: ClassVar[str] = "Eckart and Young, 1936"

    def directions(self, weight: Tensor, stats: LinearStats, rank: int) -> Tensor:
        return leading_directions(weight, rank)
