"""Permute: reorder the channels between layers so that a pattern N:M, which is to follow, keeps more of what matters
("channel permutation" of RIA, Zhang et al., ICLR 2024)."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from compress import methods
from compress.block import Block
from compress.narrow import narrow
from compress.passes import BlockPass, Needs, Taxon
from compress.prune.assignment import assign
from compress.prune.masks import Pruner, kept_of
from compress.weights import Dense, LowRank, Sum, Weight

_ROWS = 1024  # of a matrix, that assignments are made by
_LEAST_GAIN = 1e-4  # of the retained score, for another round


class Permute(BlockPass):
    """Moves neurons of the MLP, and channels inside the heads of the attention's values, with everything that makes and
    reads them: the model's function stays. Best just before the pruner, as in ``permute wanda:pattern=2:4``.

    Channels are sorted by their scores and dealt out to the groups of M; then, for each place of a group in turn, the
    channels at that place are assigned to the groups anew so that the score of all kept weights is the largest. Query heads
    that share values share an order. Channels of a layer that is on a grid, masked or not targeted stay where they are.
    """

    taxon: ClassVar[Taxon] = Taxon.UNSTRUCTURED
    paper: ClassVar[str] = "Zhang et al., 2024"
    needs: ClassVar[Needs] = Needs(frozenset({"sqnorm"}))

    pattern: str = Field("2:4", description="what is to be pruned to: N:M (N kept of M consecutive inputs)")
    scores: Literal["wanda", "ria", "magnitude"] = Field("wanda", description="the pruner whose retained score is to be largest")
    heads: bool = Field(True, description="reorder values within each head too")
    rounds: int = Field(2, ge=0, description="of reassignments, at most; 0: only deal the sorted channels out")

    @field_validator("pattern")
    @classmethod
    def _groups(cls, value: str) -> str:
        if kept_of(value) is None:
            raise ValueError(f"pattern {value!r} has no groups that channels could move between; give N:M")
        return value

    @torch.no_grad()
    def block(self, block: Block) -> None:
        arch, config = block.skeleton.arch, block.skeleton.checkpoint.config
        neurons = arch.neurons
        self._reorder(block, neurons.sources, neurons.reader, block.weights[neurons.reader].shape[1])
        for edge in arch.products if self.heads else ():
            if edge.source not in neurons.sources:  # attention mixes tokens, never the channels of a head
                head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
                self._reorder(block, (edge.source,), edge.readers[0], head_dim)

    def _reorder(self, block: Block, sources: tuple[str, ...], reader: str, size: int) -> None:
        """Reorder channels within each ``size`` outputs of the sources. Of a source that puts all channels out several times
        over every stack moves alike, and of a reader with several inputs for each channel (heads that share values) all."""
        layers, kept = {*sources, reader}, kept_of(self.pattern)
        movable = layers <= block.selected and all(_is_plain(block.weights[local]) for local in layers)
        if not movable or kept is None or size % kept[1]:
            return
        scores = self._scores(block, reader).unflatten(1, (-1, size))  # (rows, heads, size)
        n_sets = min(scores.shape[1], block.weights[sources[0]].shape[0] // size)
        sets = scores.unflatten(1, (n_sets, -1)).movedim(1, 0).flatten(1, 2)  # (sets, rows of all their heads, size)
        orders = torch.stack([better_order(each, self.pattern, self.rounds) for each in sets]).cpu()
        inputs = _at(orders.repeat_interleave(scores.shape[1] // n_sets, dim=0))
        for source in sources:
            n_stacks = block.weights[source].shape[0] // (n_sets * size)
            _narrow(block, source, rows=_at(orders.repeat(n_stacks, 1)))
        _narrow(block, reader, columns=inputs)
        if reader in block.stats:
            block.stats[reader] = block.stats[reader].permuted(inputs)

    def _scores(self, block: Block, reader: str) -> Tensor:
        """The scores of a layer's weights, (rows, in): of all matrices that read its input."""
        pruner = methods.build(self.scores, {"pattern": self.pattern})
        assert isinstance(pruner, Pruner)
        stats = block.stats[reader].only(pruner.needs.stats)
        return torch.cat([pruner.scores(weight.dense(torch.float32), stats) for weight in block.entries(reader).values()])


def better_order(scores: Tensor, pattern: str, rounds: int) -> Tensor:
    """An order of the inputs, (in,) int64, in which N:M retains at least as much of the scores (rows, in) as it does now."""
    n_kept, n_together = kept_of(pattern) or (1, 1)
    order = torch.arange(scores.shape[1], device=scores.device)
    best = retained(scores, pattern)
    if n_kept == n_together or len(order) == n_together:
        return order
    dealt = scores.sum(0).argsort(descending=True).view(n_together, -1)
    dealt[1::2] = dealt[1::2].flip(1)  # back and forth, so that no group gets the best of every round
    groups = dealt.T.contiguous()
    sample = scores[:: -(-len(scores) // _ROWS)]
    for number in range(rounds + 1):
        if number:
            for place in range(n_together):
                _reassign(sample, groups, place, n_kept)
        found = retained(scores[:, groups.flatten()], pattern)
        gain, enough = found - best, _LEAST_GAIN * best
        if gain > 0:
            order, best = groups.flatten().clone(), found
        if number and gain <= enough:
            break
    return order


def retained(scores: Tensor, pattern: str) -> float:
    """The sum of the scores (rows, in) that a pattern N:M keeps."""
    n_kept, n_together = kept_of(pattern) or (1, 1)
    return float(scores.unflatten(1, (-1, n_together)).topk(n_kept, dim=2).values.sum(dtype=torch.float64))


def _reassign(scores: Tensor, groups: Tensor, place: int, n_kept: int) -> None:
    """Exchange the channels at one place of the groups (n, M) for the best, given those at all other places.

    In a row, a channel of score s adds max(s - t, 0) to a group whose n_kept-th best other score is t: half of |s - t| + s - t,
    of which only the first differs between one assignment and another.
    """
    others = torch.cat([groups[:, :place], groups[:, place + 1 :]], dim=1)
    thresholds = scores[:, others].topk(n_kept, dim=2).values[:, :, -1]
    groups[:, place] = _given(groups[:, place], assign(torch.cdist(scores[:, groups[:, place]].T, thresholds.T, p=1)))


def _given(channels: Tensor, group_of: Tensor) -> Tensor:
    """Channels (n,) in the order of the groups (n,) that they were given to."""
    return torch.empty_like(channels).scatter_(0, group_of, channels)


def _is_plain(weight: Weight) -> bool:
    if isinstance(weight, LowRank | Sum):
        return all(map(_is_plain, weight.children().values()))
    return isinstance(weight, Dense)


def _at(orders: Tensor) -> Tensor:
    """Orders (sets, size) within consecutive sets as one order of all their channels."""
    return (orders + torch.arange(len(orders)).unsqueeze(1) * orders.shape[1]).flatten()


def _narrow(block: Block, local: str, rows: Tensor | None = None, columns: Tensor | None = None) -> None:
    """Reorder a layer's outputs or inputs, in what it is, was when the stage began, and adds."""
    before = block.before[local]
    block.set(local, narrow(block.weights[local], rows, columns))
    block.before[local] = narrow(before if _is_plain(before) else Dense(before.dense()), rows, columns)
    if rows is not None and f"{local}.bias" in block.others:
        block.set_other(f"{local}.bias", block.others[f"{local}.bias"][rows])
