"""Take in what peft has trained: merge an adapter's low-rank changes into the layers that it was trained beside (Hu et al.,
2106.09685), under their masks (LoRAPrune, 2305.18403), into their factors, and beside their grids (INT2.1, 2306.08162).

Adapters are trained on a model as it is, with data and losses of one's own. Merged before compression they make the model that is
compressed; merged after it, into the artifact that they were trained on, they heal it. But beside a mask peft trains what no mask
holds: the part of a change that falls on removed weights is lost. ``lora`` trains under the mask.
"""

from __future__ import annotations

import logging
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from compress.adapted import Corrected
from compress.adapter_files import AdapterFiles, Change
from compress.errors import BadInput
from compress.methods import did_you_mean
from compress.passes import ModelPass, Taxon
from compress.skeleton import Skeleton
from compress.surgery import Surgery
from compress.weights import Dense, LowRank, Weight
from compress.weights.composed import unmasked

log = logging.getLogger(__name__)

_MUCH = 0.1  # of a change's energy


class Adapter(ModelPass):
    """W becomes W + up @ down, in the form that it has: kept weights take the change up and removed ones stay removed, factors of
    low-rank layers (modules ``down`` and ``up``) take up their own, and a matrix on a grid, or of codes, keeps it beside.
    """

    taxon: ClassVar[Taxon] = Taxon.WHITE_BOX
    paper: ClassVar[str] = "2106.09685"

    path: str | None = Field(None, description="directory or hub id of peft's adapter; must be given")

    def contents(self) -> str:
        return AdapterFiles(self.path).digest if self.path else ""

    def surgery(self, model: Skeleton, found: Any = None) -> Surgery:
        if not self.path:
            raise BadInput("adapter: which one? Give adapter:path=DIR, a directory that peft has written")
        adapter = AdapterFiles(self.path)
        owners = [index for index in range(len(model.blocks)) if index not in model.owners]
        layers = {model.module_name(index, local) for index in owners for local in model.arch.linears}
        known = layers | {f"{layer}.{part}" for layer in layers for part in ("down", "up")}
        for name in adapter.names:
            if name not in known:
                raise BadInput(f"{adapter.path}: {name} is no linear layer of this model's blocks{did_you_mean(name, layers)}")

        def block(index: int, weights: dict[str, Weight], others: dict[str, Tensor]):
            names = {local: model.module_name(model.owner(index), local) for local in weights}
            for local, weight in weights.items():
                if (lost := _lost(weight, names[local], adapter)) > _MUCH:
                    log.warning("%s: %.0f %% of the change falls on removed weights and is lost", names[local], 100 * lost)
            return {local: _changed(weight, names[local], adapter) for local, weight in weights.items()}, others

        return Surgery(block=block, selects=True)


def _changed(weight: Weight, name: str, adapter: AdapterFiles) -> Weight:
    """A layer, or a factor of one, with what the adapter has for it and its factors. Raises ValueError for what does not fit."""
    if not {f"{name}.down", f"{name}.up"}.isdisjoint(adapter.names):
        if not isinstance(weight, LowRank):
            raise ValueError(f"{name} has no factors here, and {adapter.path} was trained on some")
        weight = LowRank(_changed(weight.down, f"{name}.down", adapter), _changed(weight.up, f"{name}.up", adapter))
    if name not in adapter.names:
        return weight
    try:
        return merged(weight, adapter.change(name))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def merged(weight: Weight, change: Change) -> Weight:
    """A matrix (out, in) of any form with a change of it. Raises ValueError where shapes differ, and for a masked grid."""
    shape = change.up.shape[0], change.down.shape[1]
    if shape != weight.shape:
        raise ValueError(
            f"the adapter changes a matrix of {shape[0]} x {shape[1]}, this is one of {' x '.join(map(str, weight.shape))}"
        )
    takes_up = isinstance(unmasked(weight), Dense)
    if weight.mask is not None and not takes_up:
        raise ValueError("a masked grid can neither take a change up nor keep its zeros beside one; merge before quantizing")
    where = next((tensor.device for tensor in weight.parameters().values()), "cpu")
    dtype = torch.float32 if takes_up else weight.dtype
    return Corrected(weight, change.down.to(where, dtype), change.up.to(where, dtype)).final()


def _lost(weight: Weight, name: str, adapter: AdapterFiles) -> float:
    """The share of the change's energy that a mask removes."""
    if weight.mask is None or weight.mask.is_meta or name not in adapter.names:
        return 0.0
    change = adapter.change(name)
    energy = (change.up @ change.down).square()
    return float((energy * ~weight.mask).sum() / energy.sum().clamp(min=1e-38))
