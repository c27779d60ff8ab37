"""LaCo: collapse blocks into the one before them by adding what each has learned beyond it, as long as the model's output
keeps its direction (Yang et al., 2402.11187)."""

from __future__ import annotations

import math
from typing import ClassVar

from pydantic import Field

from compress.block import Block
from compress.errors import BadInput
from compress.passes import Taxon
from compress.prune.depth import Mixture, Shortener, check_addable, cosine, mixed
from compress.skeleton import Skeleton
from compress.surgery import Surgery
from compress.walk import Walk
from compress.weights import Weight


class LaCo(Shortener):
    """From the top down, a few blocks at a time become one, theta = theta_l + sum_k (theta_(l+k) - theta_l), where the
    last block's outputs on a few windows keep a cosine of ``similarity`` with what they were. Where that removes too few
    blocks, that falls to the best merge that it had turned down, until as many are gone as were asked for.

    Linear layers and their biases merge, norms are those of the first block. A merged matrix is masked where all of its
    parts are: what one of them kept is kept.
    """

    taxon: ClassVar[Taxon] = Taxon.STRUCTURED
    paper: ClassVar[str] = "2402.11187"
    efforts: ClassVar[dict] = {"fast": {"windows": 4}, "best": {"merged": 2, "interval": 1, "windows": 16}}

    merged: int | None = Field(None, ge=2, description="blocks that become one at a time; none: 4 of 32, 2 of shallow models")
    interval: int = Field(2, ge=1, description="blocks to go down after a merge")
    similarity: float = Field(0.65, ge=-1, le=1, description="cosine of the last block's outputs that a merge must keep at first")
    windows: int = Field(8, ge=1, description="calibration windows to measure it on")

    def outline(self, weight: Weight) -> Weight:
        check_addable(weight)
        return weight

    def measure(self, walk: Walk) -> list[list[tuple[int, float]]]:
        """Every new block as pairs (old block, how many times over)."""
        count, collapse = self.n_removed(walk.skeleton), _Collapse(walk.few(self.windows))
        wanted, threshold = len(collapse.mixtures) - count, self.similarity
        lowest = 1 if wanted > 1 else 0  # the first block makes what all others read
        merged = self.merged or min(4, max(2, len(collapse.mixtures) // 8))
        while len(collapse.mixtures) > wanted:
            reach = min(merged, len(collapse.mixtures) - wanted + 1)
            refused, place = -math.inf, max(lowest, len(collapse.mixtures) - reach)
            while place >= lowest and len(collapse.mixtures) > wanted:
                n_blocks = len(collapse.mixtures)
                n_joined = min(merged, n_blocks - place, n_blocks - wanted + 1)
                found = collapse.attempt(place, n_joined)
                if found >= threshold:
                    collapse.accept()
                    place = min(place - self.interval, len(collapse.mixtures) - merged)
                else:
                    refused, place = max(refused, found), place - 1
            threshold = threshold if refused == -math.inf else refused
        return [list(mixture.items()) for mixture in collapse.mixtures]

    def surgery(self, model: Skeleton, found: list[list[tuple[int, float]]] | None = None) -> Surgery:
        if model.owners:
            raise BadInput(f"{self.label()}: some blocks share their layers by now; merge blocks before")
        shapes = {tuple(model.shape(index, local) for local in model.arch.linears) for index in range(len(model.blocks))}
        if len(shapes) > 1:
            raise BadInput(f"{self.label()}: blocks of several shapes cannot be added up; merge them before they are narrowed")
        if found is None:
            return super().surgery(model)
        mixtures = {pairs[0][0]: dict(pairs) for pairs in map(tuple, found)}
        return Surgery(blocks=list(mixtures), block=lambda index, *_: mixed(model, mixtures[index]))


class _Collapse:
    """A model on its way. states: (L + 1, n, length, d), what enters each of its blocks, and what leaves the last."""

    def __init__(self, walk: Walk):
        self.walk, n_blocks = walk, len(walk.skeleton.blocks)
        self.mixtures: list[Mixture] = [{index: 1} for index in range(n_blocks)]
        for block, inputs, outputs in walk.blocks():
            if not block.index:
                self.states, self.trial = (walk.room(n_blocks + 1, inputs, name) for name in ("states", "trial"))
            self.states[block.index], self.states[block.index + 1] = inputs, outputs
        self.target = self.states[n_blocks].clone()

    def attempt(self, place: int, n_joined: int) -> float:
        """The cosine of the outputs if that many blocks from ``place`` on became one."""
        self.attempted = joined(self.mixtures, place, n_joined)
        self.place, skeleton = place, self.walk.skeleton
        self.trial[place] = self.states[place]
        for position, mixture in enumerate(self.attempted[place:], start=place):
            index = next(iter(mixture))
            self.walk.advance(Block(skeleton, index, *mixed(skeleton, mixture)), self.trial[position], self.trial[position + 1])
            skeleton.free_block(index)
        similarity = cosine(self.trial[len(self.attempted)], self.target)
        return similarity if math.isfinite(similarity) else -1.0

    def accept(self) -> None:
        """Go on with the model of the last attempt."""
        self.mixtures = self.attempted
        span = slice(self.place + 1, len(self.mixtures) + 1)
        self.states[span] = self.trial[span]


def joined(mixtures: list[Mixture], place: int, n_joined: int) -> list[Mixture]:
    """The model whose block ``place`` has taken in the ones that follow it, ``n_joined`` blocks in all."""
    first, others = mixtures[place], mixtures[place + 1 : place + n_joined]
    total = {index: times * (1 - len(others)) for index, times in first.items()}
    for other in others:
        for index, times in other.items():
            total[index] = total.get(index, 0) + times
    return [*mixtures[:place], total, *mixtures[place + n_joined :]]
