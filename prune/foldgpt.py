"""FoldGPT: consecutive blocks share one set of linear layers, each with its own norms (Liu et al., 2407.00928)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from compress.block import Block
from compress.errors import BadInput
from compress.passes import Taxon
from compress.prune.depth import Shortener, check_addable, mixed
from compress.skeleton import Skeleton
from compress.surgery import Surgery
from compress.walk import Walk
from compress.weights import Weight


class FoldGPT(Shortener):
    """Which blocks share is chosen by what it costs them: how much a block's outputs change, for the inputs that it has now,
    if it computes with the layers of the first of its group. The file holds a group's layers once, and every later pass
    works on them once; the model computes as much as before, and caches as much.

    Share first and train afterwards (``logit_kd``, say): blocks that were not trained to share lose more by it than by the
    removal of one of them. Biases of linear layers are shared with them.
    """

    taxon: ClassVar[Taxon] = Taxon.SHARING
    paper: ClassVar[str] = "2407.00928"

    sparsity: float = Field(0.25, ge=0, lt=1, description="share of the blocks that get another one's layers, one at least")
    blocks: int | None = Field(None, ge=0, description="number of those blocks, instead of a share")
    size: int = Field(2, ge=2, description="blocks in a group, at most")
    weights: Literal["first", "mean"] = Field("first", description="what a group shares: its first block's layers, or their mean")

    def outline(self, weight: Weight) -> Weight:
        if self.weights == "mean":
            check_addable(weight)
        return weight

    def n_removed(self, model: Skeleton) -> int:
        n_units = len(_units(model))
        count, most = self.count_of(n_units), n_units - -(-n_units // self.size)
        if count > most:
            raise BadInput(f"{self.label()}: in groups of {self.size}, {most} of {n_units} blocks can use another one's layers")
        return count

    def measure(self, walk: Walk) -> list[list[float]]:
        """For every block that has layers of its own, what it costs to compute with those of the one, two, ... before it."""
        model, costs = walk.skeleton, []
        owners = [members[0] for members in _units(model)]
        for block, inputs, outputs in walk.blocks():
            if block.index not in owners:
                continue
            place, found = owners.index(block.index), []
            changed = walk.room(1, inputs, "changed")[0]
            for parent in reversed(owners[max(0, place - self.size + 1) : place]):
                biases = {n: tensor for n, tensor in model.read_others(parent).items() if n in model.bias_names(parent)}
                others = block.others | biases
                walk.advance(Block(model, block.index, model.read_weights(parent), others), inputs, changed)
                found.append(change(outputs, changed))
            costs.append(found)
        return costs

    def surgery(self, model: Skeleton, found: list[list[float]] | None = None) -> Surgery:
        units, count = _units(model), self.n_removed(model)
        if model.checkpoint.cache_scheme:
            raise BadInput(
                f"{self.method()}: compressed-tensors cannot round the KV cache of blocks that share their layers: leave "
                "kv_cache out"
            )
        costs = [[0.0] * (self.size - 1) for _ in units] if found is None else found
        prefix, structure, mixtures = model.arch.blocks, dict(model.checkpoint.structure), {}
        for members in grouped(costs, count, self.size):
            owner, *rest = (index for unit in members for index in units[unit])
            structure |= {f"{prefix}.{index}": {"kind": "shared", "of": f"{prefix}.{owner}"} for index in rest}
            if self.weights == "mean" and found is not None:
                mixtures[owner] = {units[unit][0]: 1 / len(members) for unit in members}

        def block(index: int, weights: dict[str, Weight], others: dict[str, Tensor]):
            return mixed(model, mixtures[index]) if index in mixtures else (weights, others)

        return Surgery(block=block, structure=structure)


def _units(model: Skeleton) -> list[list[int]]:
    """The blocks that compute with the same layers already, the one that holds them first."""
    units: dict[int, list[int]] = {}
    for index in range(len(model.blocks)):
        units.setdefault(model.owner(index), []).append(index)
    return list(units.values())


def change(before: Tensor, after: Tensor) -> float:
    """Mean over the tokens of |after - before|^2 / |before|^2, both (n, length, d)."""
    total = torch.zeros((), dtype=torch.float64)
    for x, y in zip(before, after, strict=True):
        total += ((y - x).double().square().sum(-1) / x.double().square().sum(-1).clamp_min(1e-30)).sum()
    return float(total / before[..., 0].numel())


def grouped(costs: Sequence[Sequence[float]], count: int, size: int) -> list[list[int]]:
    """Consecutive units in groups of at most ``size``, so that ``count`` of them are not the first of theirs, at the least total
    cost. costs: for every unit, of being in a group that begins one, two, ... units before it."""
    best: dict[tuple[int, int], tuple[float, list[list[int]]]] = {(0, 0): (0.0, [])}  # by units and groups so far
    n_units = len(costs)
    for end in range(1, n_units + 1):
        for start in range(max(0, end - size), end):
            own = sum(costs[start + step][step - 1] for step in range(1, end - start))
            for n_groups in range(start + 1):
                if (start, n_groups) not in best:
                    continue
                cost, groups = best[start, n_groups]
                if (end, n_groups + 1) not in best or cost + own < best[end, n_groups + 1][0]:
                    best[end, n_groups + 1] = cost + own, [*groups, list(range(start, end))]
    return best[n_units, n_units - count][1]
