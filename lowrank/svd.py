"""SVD: truncate the singular value decomposition of each weight matrix, without data (Eckart and Young, 1936)."""

from __future__ import annotations

from typing import ClassVar

from compress.lowrank.factor import Factoriser
from compress.passes import Taxon


class SVD(Factoriser):
    """The baseline of low-rank approximation: the closest matrix of its rank, whatever the inputs are."""

    taxon: ClassVar[Taxon] = Taxon.LOW_RANK
    paper: ClassVar[str] = "Eckart and Young, 1936"
