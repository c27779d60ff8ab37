"""FLAP: remove the neurons and groups of heads whose outputs fluctuate least around their means, by Var[x] * |W_:,x|^2, and add
what they put out on average to a bias (An et al., 2312.11983)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from compress.narrow import Kept, attention, cuts
from compress.passes import Taxon
from compress.prune.width import Narrower
from compress.skeleton import Skeleton
from compress.stats import LinearStats
from compress.walk import Walk


class FLAP(Narrower):
    """The scores of each block's layer are standardised, and neurons and groups of heads of all blocks compete, weighed by their
    parameters. The biases and the blocks' own shapes need the artifact's own loader, unless ``uniform`` is on and either
    ``compensate`` is off or the architecture has such biases anyway."""

    taxon: ClassVar[Taxon] = Taxon.STRUCTURED
    paper: ClassVar[str] = "2312.11983"
    ranks: ClassVar[frozenset[str]] = frozenset({"neurons", "heads"})
    rivals: ClassVar[tuple[tuple[str, ...], ...]] = (("neurons", "heads"),)

    uniform: bool = Field(False, description="the same share of every block; false: the least of all blocks go, shapes differ")
    compensate: bool = Field(True, description="add the mean of what is removed to a bias of the layer that read it")

    def measure(self, walk: Walk) -> dict[str, Any]:
        """Scores by block of neurons, heads and groups of heads, and the mean of every channel by reader."""
        arch = walk.skeleton.arch
        found: dict[str, Any] = {"neurons": [], "heads": [], "groups": [], "means": []}
        for block, _, _ in walk.blocks():
            readers = [arch.neurons.reader] + ([arch.heads.reader] if arch.heads else [])
            stats = walk.statistics(block, ("sum", "sqnorm"), readers)
            scores = {local: standardised(fluctuation(block.weights[local].dense(), stats[local])) for local in readers}
            found["neurons"].append(scores[arch.neurons.reader].tolist())
            if arch.heads:
                shape = attention(walk.skeleton, block.index)
                for kind, count in (("heads", shape.n_heads), ("groups", shape.n_groups)):
                    found[kind].append(scores[arch.heads.reader].unflatten(0, (count, -1)).mean(1).tolist())
            found["means"].append({local: (stats[local].sum / stats[local].n).tolist() for local in readers})
        return found

    def keep(self, model: Skeleton, found: dict[str, Any]) -> list[Kept]:
        kept = super().keep(model, found)
        if self.compensate:
            means = found.get("means") or [{}] * len(kept)
            kept = [replace(each, offsets=offsets(model, index, each, means[index])) for index, each in enumerate(kept)]
        return kept


def fluctuation(weight: Tensor, stats: LinearStats) -> Tensor:
    """Variance of every input times the square of its column's norm, (in,) float64. weight: (out, in)."""
    variance = stats.sqnorm.double() / stats.n - (stats.sum.double() / stats.n).square()
    return variance.clamp_(min=0).cpu() * weight.cpu().double().square().sum(0)


def standardised(scores: Tensor) -> Tensor:
    """The scores (n,) less their mean, in units of their deviation."""
    return (scores - scores.mean()) / scores.std(correction=0).clamp_(min=torch.finfo(scores.dtype).tiny)


def offsets(model: Skeleton, index: int, kept: Kept, means: dict[str, list[float]]) -> dict[str, Tensor]:
    """By layer, what its removed inputs add to its outputs on average, (out,) float32. means: of all inputs, by layer; a plan,
    which knows none, gets offsets on the meta device."""
    found = {}
    for local, (_, columns) in cuts(model, index, kept).items():
        if columns is not None and means:
            gone = torch.tensor(means[local]).index_fill(0, columns, 0)
            found[local] = model.read_weight(index, local).dense().float() @ gone
        elif columns is not None:
            found[local] = torch.empty(model.shape(index, local)[0], device="meta")
    return found
