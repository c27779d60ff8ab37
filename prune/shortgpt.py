"""ShortGPT: remove the blocks that turn the residual stream least: those of least one minus the cosine between what enters
a block and what leaves it (Men et al., 2403.03853)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from compress.passes import Taxon
from compress.prune.depth import Shortener, cosine
from compress.walk import Walk


class ShortGPT(Shortener):
    """The blocks of least influence go, all at once and without a second look. The last one stays: it makes what the head
    reads, and its influence tells little of that."""

    taxon: ClassVar[Taxon] = Taxon.STRUCTURED
    paper: ClassVar[str] = "2403.03853"

    def measure(self, walk: Walk) -> list[float]:
        """Every block's influence."""
        return [influence(inputs, outputs) for _, inputs, outputs in walk.blocks()]

    def removed(self, found: list[float], count: int) -> list[int]:
        return sorted(range(len(found) - 1), key=found.__getitem__)[:count]


def influence(inputs: Tensor, outputs: Tensor) -> float:
    """Mean of 1 - cos(x, y) over the tokens of x and y, (n, length, d): in [0, 2], and 0 for a block that does nothing."""
    return min(2.0, max(0.0, 1 - cosine(inputs, outputs)))
