"""Pack: store a sparse matrix as what is kept of it, and a bit for every entry that says where (Han et al., 1510.00149).

They write the gaps between the kept entries of linear layers in 5 bits each; a bitmap takes less up to 80 % of zeros, and is
opened without going from entry to entry. Of b bits per weight remain b (1 - sparsity) + 1.
"""

from __future__ import annotations

from typing import ClassVar

from compress.passes import StoragePass, Taxon
from compress.weights import Weight, bitmasked


class Pack(StoragePass):
    """Masked matrices of floating-point numbers and on integer grids, factors and parts included, take a bit per entry and
    what is kept. The model computes the same; it is opened by the artifact's own loader, to dense matrices.

    Matrices without a mask, those whose inputs are rounded too, and such as would not become smaller are left alone. It comes
    last in a chain: later passes give what they change back as plain masked matrices.
    """

    taxon: ClassVar[Taxon] = Taxon.UNSTRUCTURED
    paper: ClassVar[str] = "1510.00149"

    def store(self, weight: Weight) -> Weight:
        return bitmasked(weight)
