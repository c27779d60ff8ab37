"""LASER: cut a few matrices of the later blocks to low rank where the model then predicts better, and store them dense again
(Sharma et al., 2312.13558)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from pydantic import Field, field_validator
from torch import Tensor

from compress.lowrank.factor import leading_directions
from compress.passes import ModelPass, Patterns, Taxon, matches_any
from compress.skeleton import Skeleton
from compress.surgery import Surgery
from compress.walk import Walk
from compress.weights import Dense, Weight, opened
from compress.weights.composed import unmasked


class Cut(NamedTuple):
    """name: of the layer. rate: the share of its ranks that goes."""

    name: str
    rate: float


UNCUT = Cut("", 0.0)


class LASER(ModelPass):
    """An intervention, not a compression: no layer gets smaller, and the model may get better, for what goes is taken for noise.

    Every layer is tried at every rate, on a few calibration windows; all those models advance together through whichever block is
    in memory. The cut that predicts best stays, if it predicts better than none, and the search begins again with it, ``changes``
    times. (The paper judges by the accuracy at the task at hand, and tries the attention too, which seldom gains.) With a
    ``rate``, all the layers are cut by it, unmeasured. Removed weights stay zero; grids and factors are left as they are.
    """

    taxon: ClassVar[Taxon] = Taxon.LOW_RANK
    paper: ClassVar[str] = "2312.13558"
    efforts: ClassVar[dict] = {"fast": {"windows": 8}, "best": {"windows": 64, "changes": 4}}

    layers: Patterns | None = Field(None, description="names of the layers to try; none: the MLPs' in the later half")
    rate: float | None = Field(None, ge=0, lt=1, description="share of the ranks to remove from all of them; none: search")
    rates: tuple[float, ...] = Field((0.5, 0.75, 0.9, 0.95), description="shares to try")
    changes: int = Field(1, ge=1, description="most layers that the search cuts, one after the other")
    windows: int = Field(16, ge=1, description="calibration windows on which losses are measured")
    length: int = Field(128, ge=2, description="tokens of each window, from its beginning")

    @field_validator("rates", mode="before")
    @classmethod
    def _rates_from_text(cls, value: object) -> object:
        return tuple(str(value).split("+")) if isinstance(value, str | float) else value

    @field_validator("rates")
    @classmethod
    def _rates_are_shares(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not value or not all(0 < rate < 1 for rate in value):
            raise ValueError("rates must lie between 0 and 1")
        return tuple(sorted(value))

    @property
    def measures(self) -> bool:
        return self.rate is None

    def names(self, model: Skeleton) -> list[str]:
        """The layers that may be cut."""
        n_blocks, mlp = len(model.blocks), {*model.arch.neurons.sources, model.arch.neurons.reader}
        late = {model.owner(index) for index in range(n_blocks // 2, n_blocks)}
        found = []
        for index in sorted(set(range(n_blocks)) - model.owners.keys()):
            for local in model.arch.linears:
                name, weight = model.module_name(index, local), opened(model.read_weight(index, local, meta=True))
                named = index in late and local in mlp if self.layers is None else matches_any(name, self.layers)
                found += [name] if named and isinstance(unmasked(weight), Dense) else []
        return found

    def measure(self, walk: Walk) -> list[tuple[str, float]]:
        """The cuts to make."""
        windows = walk.windows[: self.windows, : self.length].contiguous()
        short = Walk(walk.skeleton, windows, walk.scratch, walk.progress)
        chosen: list[Cut] = []
        while len(chosen) < self.changes:
            left = set(self.names(walk.skeleton)) - {cut.name for cut in chosen}
            losses = losses_with(short, sorted(left), self.rates, chosen)
            best = min(losses, key=lambda cut: losses[cut])
            if best == UNCUT:
                break
            chosen.append(best)
        return [(cut.name, cut.rate) for cut in chosen]

    def surgery(self, model: Skeleton, found: Any = None) -> Surgery:
        cuts = dict(found or ()) if self.rate is None else dict.fromkeys(self.names(model), self.rate)

        def block(index: int, weights: dict[str, Weight], others: dict[str, Tensor]):
            names = {local: model.module_name(model.owner(index), local) for local in weights}
            return {
                local: next(reduced(weight, [cuts[names[local]]])) if names[local] in cuts else weight
                for local, weight in weights.items()
            }, others  # fmt: skip

        return Surgery(block=block)


def reduced(weight: Weight, rates: Sequence[float]) -> Iterator[Weight]:
    """A plain or masked matrix with these shares of its ranks removed, one after the other; a rank of one stays at least."""
    values, mask = weight.dense(torch.float64), weight.mask
    ranks = [max(1, int(min(values.shape) * (1 - rate) + 1e-9)) for rate in rates]
    directions = leading_directions(values, max(ranks))
    for rank in ranks:
        kept = directions[:, :rank]
        cut = Dense((kept @ (kept.T @ values)).to(weight.dtype)) if rank < min(values.shape) else Dense(weight.dense())
        yield cut if mask is None else cut.masked(mask)


def losses_with(walk: Walk, names: Sequence[str], rates: Sequence[float], chosen: Sequence[Cut]) -> dict[Cut, float]:
    """The model's loss with the cuts ``chosen`` and one more, by that one, and with these alone, by ``UNCUT``."""
    cuts = [Cut(name, rate) for name in names for rate in rates]
    begun: set[Cut] = set()
    streams: Tensor | None = None
    for block, inputs, _ in walk.blocks():
        if streams is None:
            streams = walk.room(len(cuts) + 1, inputs, "candidates")
            streams[-1] = inputs
        own = {block.name(local): local for local in block.weights}
        for name, rate in chosen:
            if name in own:
                block.set(own[name], next(reduced(block.weights[own[name]], [rate])))
        for cut, stream in zip(cuts, streams, strict=False):
            if cut in begun and cut.name not in own:
                walk.advance(block, stream, stream)
        for name in own.keys() & set(names):
            weight = block.weights[own[name]]
            for rate, other in zip(rates, reduced(weight, rates), strict=True):
                block.set(own[name], other)
                stream = streams[cuts.index(Cut(name, rate))]
                walk.advance(block, stream if Cut(name, rate) in begun else streams[-1], stream)
            block.set(own[name], weight)
            begun |= {Cut(name, rate) for rate in rates}
        walk.advance(block, streams[-1], streams[-1])
    assert streams is not None
    return dict(zip([*cuts, UNCUT], walk.losses(streams), strict=True))
