"""Angular: remove the run of consecutive blocks across which the last token's direction turns least ("The unreasonable
ineffectiveness of the deeper layers", Gromov et al., 2403.17887)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from compress.passes import Taxon
from compress.prune.depth import Shortener
from compress.walk import Walk


class Angular(Shortener):
    """One run of neighbours goes, measured as a whole: what a block undoes of the one before it counts for nothing, which a
    sum of single influences would not see. The last block stays, as its paper's simpler recipe has it."""

    taxon: ClassVar[Taxon] = Taxon.STRUCTURED
    paper: ClassVar[str] = "2403.17887"

    def measure(self, walk: Walk) -> list[float]:
        """The angular distance across every run of as many blocks as go, by the run's first block."""
        rows: list[Tensor] = []  # the last token of every window, (n, d), in front of each block
        for _, inputs, _ in walk.blocks():
            rows.append(inputs[:, -1].double())
        count = self.n_removed(walk.skeleton)
        return [angle(rows[start], rows[start + count]) for start in range(len(rows) - count)]

    def removed(self, found: list[float], count: int) -> list[int]:
        start = min(range(len(found)), key=found.__getitem__)
        return list(range(start, start + count))


def angle(x: Tensor, y: Tensor) -> float:
    """Mean angle between the rows of x and y, (n, d), as a share of half a turn: in [0, 1]."""
    cosines = torch.cosine_similarity(x, y, dim=-1).clamp(-1, 1)
    return float(cosines.arccos().mean() / torch.pi)
