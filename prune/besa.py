"""BESA: learn by gradient descent how much of each layer of a block is pruned, from the error of the block's outputs (Xu et
al., 2402.16880)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from compress.block import Block
from compress.descent import descend, linear
from compress.passes import BlockPass, Needs, Taxon
from compress.prune.masks import wanda_scores
from compress.prune.ratios import in_whole_parts
from compress.stats import LinearStats
from compress.weights import Weight

_N_HALVINGS = 60  # of the interval in which the tilt lies
_STEEPEST = 1000.0  # tilt, which puts a layer at one end of the candidates


class BESA(BlockPass):
    """Which weights of a row go is Wanda's choice; how many is learned, for each layer, or for each row with ``by_row``.

    A unit (layer or row) holds probabilities over the candidate sparsities 0, 1 / candidates, ... 1, and its sparsity is
    their expectation. The weight of rank r in its row, of lowest scores first, is removed by all candidates above r: its
    mask is 0 or 1 by the expectation, and passes its gradient on to the probability that it is kept. The paper holds the
    block's sparsity by a penalty. Here all units are tilted towards more or less by one number, such that the mean over the
    block's weights is ``sparsity`` at every step, through which gradients flow too. The block runs on what the compressed
    blocks before it put out, and is to give what it gave before the stage. It starts as Wanda's, and is never left with a
    larger error on all calibration inputs than it had then. The number of removed weights is exact in each block.
    """

    taxon: ClassVar[Taxon] = Taxon.UNSTRUCTURED
    paper: ClassVar[str] = "2402.16880"
    needs: ClassVar[Needs] = Needs(inputs=True, reference=True)
    efforts: ClassVar[dict[str, dict[str, Any]]] = {"fast": {"iterations": 15}, "best": {"iterations": 100}}

    sparsity: float = Field(0.5, ge=0, lt=1, description="share of each block's weights that is removed")
    by_row: bool = Field(False, description="learn a sparsity for each row, not for each layer")
    candidates: int = Field(100, ge=2, description="steps between the candidate sparsities 0 and 1")
    iterations: int = Field(30, ge=0, description="steps of Adam per block")
    batch_size: int = Field(8, ge=1, description="calibration sequences per step")
    learning_rate: float = Field(0.02, gt=0, description="of the first step; it falls linearly to zero")

    def learning_tokens(self, samples: int, length: int) -> int:
        return self.iterations * min(self.batch_size, samples) * length

    def block(self, block: Block) -> None:
        device = block.skeleton.device
        weights = {name: weight.map(lambda tensor: tensor.to(device)) for name, weight in block.matrices().items()}
        if not weights:
            return
        stats = input_stats(block, weights, self.batch_size)
        parts = {name: Ranked(weight, stats[name], self.candidates) for name, weight in weights.items()}
        sizes = [len(part.rank) if self.by_row else 1 for part in parts.values()]
        n_weights = torch.cat([
            torch.full((size,), part.rank.numel() / size, device=device) for size, part in zip(sizes, parts.values(), strict=True)
        ])  # fmt: skip
        logits = torch.zeros(len(n_weights), self.candidates + 1, device=device, requires_grad=True)

        def probabilities() -> dict[str, Tensor]:
            return dict(zip(parts, tilted(logits, n_weights, self.sparsity).split(sizes), strict=True))

        def masked() -> dict[str, Tensor]:
            return {name: parts[name].values * parts[name].mask(chance) for name, chance in probabilities().items()}

        if self.iterations and self.sparsity > 0:
            optimizer = torch.optim.Adam([logits], lr=self.learning_rate)
            descend(block, masked, optimizer, self.iterations, self.batch_size, rate=linear)
        with torch.no_grad():
            shares = {name: expected(chance) for name, chance in probabilities().items()}
        kept = exact_masks([part.rank for part in parts.values()], list(shares.values()))
        for (name, weight), mask in zip(weights.items(), kept, strict=True):
            block.replace(name, weight.masked(mask))


class Ranked:
    """A matrix, and the order in which the weights of each row go.

    values: (out, in) float32. rank: (out, in) int32, 0 for the first to go; weights that are gone already come before all
    others. last: (out, in) int32, the last candidate that keeps the weight.
    """

    def __init__(self, weight: Weight, stats: LinearStats, n_candidates: int):
        self.values = weight.dense(torch.float32)
        scores = wanda_scores(self.values, stats)
        scores = scores if weight.mask is None else scores.masked_fill(~weight.mask, -1)
        self.rank = scores.argsort(dim=1, stable=True).argsort(dim=1).int()
        self.last = self.rank * n_candidates // self.rank.shape[1]

    def mask(self, chance: Tensor) -> Tensor:
        """(out, in) of zeros and ones, with the gradient of the probability to be kept. chance: (1 or out, candidates)."""
        within = chance.cumsum(1)
        soft = within[0][self.last] if len(within) == 1 else within.gather(1, self.last.long())
        hard = self.rank >= (expected(chance.detach()) * self.rank.shape[1]).floor().unsqueeze(1)
        return hard + (soft - soft.detach())


def expected(chance: Tensor) -> Tensor:
    """The sparsity of each unit, (units,), from its probabilities (units, candidates)."""
    return chance @ torch.linspace(0, 1, chance.shape[1], device=chance.device)


def tilted(logits: Tensor, n_weights: Tensor, sparsity: float) -> Tensor:
    """Probabilities proportional to ``exp(logits + tilt * candidate)``, with the one tilt for which the mean of expected
    sparsities, weighted by n_weights (units,), is ``sparsity``. logits: (units, candidates). Differentiable, tilt and all.
    """
    candidates = torch.linspace(0, 1, logits.shape[1], device=logits.device)
    share = n_weights / n_weights.sum()
    with torch.no_grad():
        low, high = -_STEEPEST, _STEEPEST
        for _ in range(_N_HALVINGS):
            tilt = (low + high) / 2
            mean = float(share @ expected((logits + tilt * candidates).softmax(1)))
            low, high = (tilt, high) if mean < sparsity else (low, tilt)
    chance = (logits + low * candidates).softmax(1)
    mean = expected(chance)
    slope = share @ (chance @ candidates.square() - mean.square())
    # A step of Newton's method, which moves nothing at the solution, but has the gradient of the solution.
    tilt = low + (sparsity - share @ mean) / slope.detach().clamp_min(1e-9)
    return (logits + (tilt - tilt.detach() + low) * candidates).softmax(1)


@torch.no_grad()
def input_stats(block: Block, names: Collection[str], batch_size: int) -> dict[str, LinearStats]:
    """The sums of squares of what enters each matrix, factors of low-rank layers included, which have no others."""
    stats: dict[str, LinearStats] = {}
    for rows in block.batches(batch_size):
        for name, entering in block.layer_inputs(names, rows).items():
            stats.setdefault(name, LinearStats(entering.shape[-1], {"sqnorm"}, entering.device)).add(entering)
    return stats


def exact_masks(ranks: Sequence[Tensor], sparsities: Sequence[Tensor]) -> list[Tensor]:
    """Remove from each row of ranks (out, in) the share in sparsities (1 or out,), and as many in all as that makes."""
    wanted = [share.expand(len(rank)) for rank, share in zip(ranks, sparsities, strict=True)]
    widths = [rank.shape[1] for rank in ranks for _ in range(len(rank))]
    numbers = in_whole_parts(torch.cat(wanted).double().tolist(), widths, [1] * len(widths))
    split = torch.tensor(numbers, device=ranks[0].device).split([len(rank) for rank in ranks])
    return [rank >= number.unsqueeze(1) for rank, number in zip(ranks, split, strict=True)]
