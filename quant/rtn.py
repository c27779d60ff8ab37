"""RTN: round every weight to the nearest point of its group's grid, without data; the baseline of every other quantizer
(compared throughout GPTQ, 2210.17323)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from compress.passes import Taxon
from compress.quant.grids import Quantizer
from compress.stats import LinearStats
from compress.weights import Weight


class RTN(Quantizer):
    """Round to nearest. Needs no calibration; with ``mse`` the ranges are searched."""

    taxon: ClassVar[Taxon] = Taxon.WEIGHT_ONLY
    paper: ClassVar[str] = "2210.17323"

    def linear(self, weight: Tensor, stats: LinearStats, mask: Tensor | None) -> Weight:
        return self.nearest(weight, mask)
