"""Mask patterns: which weights go, given a score for each, and the base of the pruning methods."""

from __future__ import annotations

import re
from typing import Any

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from compress.passes import LinearPass
from compress.stats import LinearStats
from compress.weights import Dense, Masked, Weight

_KEPT_OF = re.compile(r"([1-9]\d*):([1-9]\d*)")
_FEW = 16  # scores that are ranked by comparing all pairs


def kept_of(pattern: str) -> tuple[int, int] | None:
    """(N, M) of a pattern "N:M", which keeps N of every M consecutive inputs; None for "row" and "tensor".

    Raises ValueError for anything else.
    """
    if pattern in ("row", "tensor"):
        return None
    match = _KEPT_OF.fullmatch(pattern)
    if match is None or int(match[1]) > int(match[2]):
        raise ValueError(f"pattern {pattern!r} is none of 'row', 'tensor' and 'N:M' (N kept of M consecutive inputs)")
    return int(match[1]), int(match[2])


def check_divides(pattern: str, n_outputs: int, n_inputs: int) -> None:
    """Raise ValueError for a pattern "N:M" of which M does not divide the inputs of an (out, in) matrix."""
    kept = kept_of(pattern)
    if kept is not None and n_inputs % kept[1]:
        raise ValueError(
            f"pattern {pattern} needs inputs in multiples of {kept[1]}, but a matrix is {n_outputs} x {n_inputs}; "
            "skip that layer or use the pattern 'row'"
        )


def lowest(scores: Tensor, sparsity: float, pattern: str) -> Tensor:
    """Remove the weights of lowest score: the mask of those kept, (out, in) bool.

    scores: (out, in) floating point, no NaN; -inf marks weights that an earlier mask removed, which go first.
    pattern: "row" removes int(in * sparsity) of every output row, "tensor" int(out * in * sparsity) of the matrix,
    "N:M" all but N of every M consecutive inputs, whatever the sparsity. Counts are exact; of equal scores the earlier
    ones go first. Raises ValueError where M does not divide the inputs.
    """
    n_outputs, n_inputs = scores.shape
    kept = kept_of(pattern)
    if kept is None:
        rows = scores if pattern == "row" else scores.reshape(1, -1)
        return _all_but_lowest(rows, int(rows.shape[1] * sparsity)).reshape(n_outputs, n_inputs)
    n_kept, n_together = kept
    check_divides(pattern, n_outputs, n_inputs)
    groups = scores.unflatten(1, (-1, n_together))
    if n_together <= _FEW:
        return _highest_of_few(groups, n_kept).flatten(1)
    return _all_but_lowest(groups.flatten(0, 1), n_together - n_kept).reshape(n_outputs, n_inputs)


def _all_but_lowest(rows: Tensor, n_removed: int) -> Tensor:
    """Keep all but the n_removed lowest of every row of (rows, length)."""
    if n_removed == 0:
        return torch.ones_like(rows, dtype=torch.bool)
    threshold = rows.kthvalue(n_removed, dim=1, keepdim=True).values
    kept = rows > threshold
    n_tied = (rows.shape[1] - n_removed) - kept.sum(1, keepdim=True)
    # Scores equal to the threshold are common in 16-bit weights; the last ones of each row fill up the count.
    tied = rows == threshold
    n_after = tied.flip(1).cumsum(1, dtype=torch.int32).flip(1)
    return kept | (tied & (n_after <= n_tied))


def _highest_of_few(groups: Tensor, n_kept: int) -> Tensor:
    """Keep the n_kept highest of every group (..., size), by comparing all pairs: several times faster than a sort."""
    planes = groups.movedim(-1, 0).contiguous()
    n_higher = torch.zeros_like(planes, dtype=torch.int8)
    for later in range(len(planes)):
        for earlier in range(later):
            later_wins = planes[later] >= planes[earlier]
            n_higher[earlier] += later_wins
            n_higher[later] += later_wins.logical_not_()
    return (n_higher < n_kept).movedim(0, -1)


class Pruner(LinearPass):
    """Base of the one-shot pruning methods: the weights of lowest score become zero for good."""

    sparsity: float = Field(0.5, ge=0, lt=1, description="share of the weights removed; implied by a pattern N:M")
    pattern: str = Field("row", description="what competes: row, tensor, or N:M (N kept of M consecutive inputs)")

    @field_validator("pattern")
    @classmethod
    def _known_pattern(cls, value: str) -> str:
        kept_of(value)
        return value

    @model_validator(mode="before")
    @classmethod
    def _implied_sparsity(cls, data: Any) -> Any:
        pattern = data.get("pattern") if isinstance(data, dict) else None
        if not isinstance(pattern, str) or not _KEPT_OF.fullmatch(pattern) or not (kept := kept_of(pattern)):
            return data
        implied = 1 - kept[0] / kept[1]
        try:
            differs = abs(float(data.get("sparsity", implied)) - implied) > 1e-6
        except (TypeError, ValueError):  # the field's own validation says what is wrong
            return data
        if differs:
            raise ValueError(f"pattern {pattern} means sparsity {implied:g}; leave sparsity={data['sparsity']} out")
        return {**data, "sparsity": implied}

    def scores(self, weight: Tensor, stats: LinearStats) -> Tensor:
        """How much each weight matters, (out, in) float32, from weight (out, in) float32."""
        raise NotImplementedError(type(self).__name__)

    def linear(self, weight: Tensor, stats: LinearStats, mask: Tensor | None) -> Weight:
        scores = self.scores(weight.float(), stats)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        kept = lowest(scores, self.sparsity, self.pattern)
        if mask is not None:
            kept &= mask
        return Masked(Dense(weight.masked_fill(~kept, 0)), kept)

    def outline(self, weight: Tensor, stats: LinearStats, mask: Tensor | None) -> Weight:
        check_divides(self.pattern, *weight.shape)
        return Masked(Dense(weight.to("meta")), torch.empty(weight.shape, dtype=torch.bool, device="meta"))
