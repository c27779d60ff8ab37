"""Shortened LLaMA: remove the blocks without which the model predicts best (Kim et al., 2402.02834); with ``greedy``, one at
a time and looking again after each (SLEB, Song et al., 2402.09025)."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from compress.errors import BadInput
from compress.passes import Taxon
from compress.prune.depth import Shortener
from compress.skeleton import Skeleton
from compress.walk import Walk

_FIRST, _LAST, _DEPTH = 4, 2, 32  # the paper keeps 4 and 2 of 32 blocks


class Shortened(Shortener):
    """Every block's loss is that of the model without it, on a few windows. All those models advance together through
    whichever block is in memory, so that L of them take L^2 / 2 runs of a block, and reading the model once.

    The first and last blocks stay whatever their loss: the paper's 4 and 2 of 32 blocks, and as many in proportion of
    shallower models.
    """

    taxon: ClassVar[Taxon] = Taxon.STRUCTURED
    paper: ClassVar[str] = "2402.02834"
    efforts: ClassVar[dict] = {"fast": {"windows": 4}, "best": {"windows": 32, "greedy": True}}

    windows: int = Field(8, ge=1, description="calibration windows on which losses are measured")
    greedy: bool = Field(False, description="remove one block at a time, and measure all others again after each")
    first: int | None = Field(
        None, ge=0, description="blocks that stay at the beginning; none: 4 of 32, fewer of shallower models"
    )
    last: int | None = Field(None, ge=0, description="blocks that stay at the end; none: 2 of 32, fewer of shallower models")

    def candidates(self, n_blocks: int) -> list[int]:
        """The blocks that may go."""
        depth = min(n_blocks, _DEPTH)
        first = _FIRST * depth // _DEPTH if self.first is None else self.first
        last = _LAST * depth // _DEPTH if self.last is None else self.last
        return list(range(first, n_blocks - last))

    def n_removed(self, model: Skeleton) -> int:
        count, most = super().n_removed(model), len(self.candidates(len(model.blocks)))
        if count > most:
            raise BadInput(f"{self.label()}: only {most} blocks may go besides those kept at both ends; set first and last lower")
        return count

    def measure(self, walk: Walk) -> list[int]:
        """The blocks that go, in the order of their choice."""
        count, few = self.n_removed(walk.skeleton), walk.few(self.windows)
        gone: list[int] = []
        while len(gone) < count:
            left = [index for index in self.candidates(len(walk.skeleton.blocks)) if index not in gone]
            losses = losses_without(few, left, gone)
            gone += sorted(left, key=losses.__getitem__)[: 1 if self.greedy else count]
        return gone

    def removed(self, found: list[int], count: int) -> list[int]:
        return found


def losses_without(walk: Walk, candidates: list[int], gone: list[int]) -> dict[int, float]:
    """The model's loss without the blocks ``gone`` and one candidate, by candidate."""
    places = {index: place for place, index in enumerate(candidates)}
    streams, whole = None, None  # of the models that lack a candidate already, and of the one that still has them all
    for block, inputs, _ in walk.blocks():
        if streams is None or whole is None:
            streams, whole = walk.room(len(candidates), inputs, "candidates"), inputs.clone()
        if block.index in gone:
            continue
        begun = [places[index] for index in candidates if index < block.index]
        if block.index in places:
            streams[places[block.index]] = whole
        for place in begun:
            walk.advance(block, streams[place], streams[place])
        walk.advance(block, whole, whole)
    assert streams is not None
    return dict(zip(candidates, walk.losses(streams), strict=True))
