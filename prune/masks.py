"""Mask patterns: which weights go, given a score for each, and the base of the pruning methods."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import AfterValidator, Field, model_validator
from torch import Tensor

from compress.apply import apply
from compress.passes import LinearPass, Needs
from compress.prune.ratios import Sketch, by_outliers, by_threshold, in_whole_parts, outlier_share
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


def _known(pattern: str) -> str:
    kept_of(pattern)
    return pattern


Pattern = Annotated[str, AfterValidator(_known)]
"""What :func:`kept_of` knows."""


def groups_of(kept: Tensor) -> int | None:
    """M of a mask (out, in) that keeps the same number, but not all, of every M consecutive inputs, M below ``in``; the
    smallest such M, None where there is none."""
    n_inputs = kept.shape[1]
    for size in (size for size in range(2, n_inputs // 2 + 1) if n_inputs % size == 0):
        counts = kept.unflatten(1, (-1, size)).sum(2)
        if 0 < int(counts[0, 0]) < size and bool((counts == counts[0, 0]).all()):
            return size
    return None


def check_divides(pattern: str, n_outputs: int, n_inputs: int) -> None:
    """Raise ValueError for a pattern "N:M" of which M does not divide the inputs of an (out, in) matrix."""
    kept = kept_of(pattern)
    if kept is not None and n_inputs % kept[1]:
        raise ValueError(
            f"pattern {pattern} needs inputs in multiples of {kept[1]}, but a matrix is {n_outputs} x {n_inputs}; "
            "skip that layer or use the pattern 'row'"
        )


def with_implied_sparsity(data: Any) -> Any:
    """The fields of a pass, with the sparsity that a pattern N:M among them means. Raises ValueError where another is given."""
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


def count_kept(shape: Sequence[int], sparsity: float, pattern: str) -> int:
    """How many entries of an (out, in) matrix :func:`lowest` keeps. Raises ValueError where M does not divide the inputs."""
    n_outputs, n_inputs = shape
    check_divides(pattern, n_outputs, n_inputs)
    if (kept := kept_of(pattern)) is not None:
        return n_outputs * n_inputs * kept[0] // kept[1]
    n_rows, length = (n_outputs, n_inputs) if pattern == "row" else (1, n_outputs * n_inputs)
    return n_rows * (length - int(length * sparsity))


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
    threshold = _lowest_but(rows, n_removed - 1)
    kept = rows > threshold
    n_tied = (rows.shape[1] - n_removed) - kept.sum(1, keepdim=True)
    # Scores equal to the threshold are common in 16-bit weights; the last ones of each row fill up the count.
    tied = rows == threshold
    n_after = tied.flip(1).cumsum(1, dtype=torch.int32).flip(1)
    return kept | (tied & (n_after <= n_tied))


def _lowest_but(rows: Tensor, n_lower: int) -> Tensor:
    """The value of every row, (rows, 1), that n_lower others do not exceed."""
    if rows.is_cpu and rows.dtype in (torch.float32, torch.float64):  # where numpy selects ten times faster
        return torch.from_numpy(np.partition(rows.numpy(), n_lower, axis=1)[:, n_lower : n_lower + 1])
    return rows.kthvalue(n_lower + 1, dim=1, keepdim=True).values


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


def wanda_scores(weight: Tensor, stats: LinearStats) -> Tensor:
    """|w| times the root mean square of the input that w multiplies, (out, in) float32, from weight (out, in) float32 and
    "sqnorm"."""
    if stats.n == 0:  # no token came by (an idle expert, say): magnitude is all that is known
        return weight.abs()
    return weight.abs() * (stats.sqnorm / stats.n).sqrt()


class _Seer(LinearPass):
    """Changes nothing, and shows ``see`` every matrix (float32) that a pass with ``statistics`` would be given."""

    statistics: frozenset[str]
    see: Callable[[Tensor, LinearStats, Tensor | None], None]

    @property
    def needs(self) -> Needs:  # type: ignore[override]
        return Needs(self.statistics)

    def linear(self, weight: Tensor, stats: LinearStats, mask: Tensor | None) -> Weight:
        self.see(weight.float(), stats, mask)
        return Dense(weight) if mask is None else Masked(Dense(weight), mask)


class Pruner(LinearPass):
    """Base of the one-shot pruning methods: the weights of lowest score become zero for good.

    ``ratios`` says how the sparsity is shared out. "owl" (Yin et al., 2310.05175): blocks with more outliers, weights whose
    Wanda score is above ``owl_threshold`` times the block's mean, keep more; the mean over blocks is the sparsity asked.
    "global": every layer loses the share of its weights that scores below one threshold for all layers together. Either
    needs a pass over the model beforehand. A pattern N:M then gets an N of each layer's own (mixed N:M). What is removed in
    all is met to the weight with the pattern "tensor", else to less than one part: a weight of every row of a layer, or of
    every M. Layers of several matrices (low-rank factors) get one sparsity for all of them, and are met approximately.
    """

    sparsity: float = Field(0.5, ge=0, lt=1, description="share of the weights removed; implied by a pattern N:M")
    pattern: Pattern = Field("row", description="what competes: row, tensor, or N:M (N kept of M consecutive inputs)")
    ratios: Literal["uniform", "owl", "global"] = Field(
        "uniform", description="each layer's sparsity: all alike, by its block's outliers, or by one threshold for all"
    )
    owl_spread: float = Field(0.08, ge=0, lt=0.5, description="owl: half of what the sparsest and the densest block differ by")
    owl_threshold: float = Field(5.0, gt=0, description="owl: an outlier's score, in mean scores of its block")

    @model_validator(mode="before")
    @classmethod
    def _implied_sparsity(cls, data: Any) -> Any:
        return with_implied_sparsity(data)

    @model_validator(mode="after")
    def _scores_to_compare(self) -> Pruner:
        if self.ratios == "global" and type(self).scores is Pruner.scores:
            raise ValueError(f"ratios=global compares scores, which {self.method()} has none of beforehand: use ratios=owl")
        return self

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

    @property
    def surveys(self) -> Needs | None:
        return {"uniform": None, "owl": Needs(frozenset({"sqnorm"})), "global": Needs(self.needs.stats)}[self.ratios]

    def survey(self, weight: Weight, stats: LinearStats, effect: Callable[[Weight], float]) -> Any:
        assert self.surveys is not None
        score, sketches = wanda_scores if self.ratios == "owl" else self.scores, []

        def see(matrix: Tensor, stats: LinearStats, mask: Tensor | None) -> None:
            sketches.append(Sketch.of(score(matrix, stats), mask))

        apply(_Seer(statistics=self.surveys.stats, see=see), weight, stats)
        return {"shape": weight.shape, "sketches": sketches}

    def allocate(self, found: dict[str, Any], groups: Sequence[tuple[str, ...]]) -> dict[str, LinearPass]:
        layers = {name: [Sketch(*sketch) for sketch in layer["sketches"]] for name, layer in found.items()}
        sparsities = self._by_outliers(layers) if self.ratios == "owl" else self._by_threshold(layers)
        kept, shapes = kept_of(self.pattern), [layer["shape"] for layer in found.values()]
        n_parts = [kept[1] if kept else n * m if self.pattern == "tensor" else n for m, n in shapes]
        sizes = [m * n // parts for (m, n), parts in zip(shapes, n_parts, strict=True)]
        numbers = in_whole_parts(sparsities, n_parts, sizes)
        return {name: self._removing(*share) for name, *share in zip(layers, numbers, n_parts, strict=True)}

    def _by_outliers(self, layers: Mapping[str, Sequence[Sketch]]) -> list[float]:
        blocks: dict[str, list[Sketch]] = {}
        for name, sketches in layers.items():
            blocks.setdefault(_block_of(name), []).extend(sketches)
        shares = [outlier_share(sketches, self.owl_threshold) for sketches in blocks.values()]
        sparsities = dict(zip(blocks, by_outliers(shares, self.sparsity, self.owl_spread), strict=True))
        return [sparsities[_block_of(name)] for name in layers]

    def _by_threshold(self, layers: Mapping[str, Sequence[Sketch]]) -> list[float]:
        sketches = [sketch for members in layers.values() for sketch in members]
        shares = iter(by_threshold(sketches, self.sparsity))
        return [sum(s.n * next(shares) for s in members) / sum(s.n for s in members) for members in layers.values()]

    def _removing(self, number: int, n_parts: int) -> Pruner:
        """This pass, for one layer: to remove ``number`` of every ``n_parts``."""
        changes: dict[str, Any] = {"ratios": "uniform", "sparsity": (number + 0.5) / n_parts}  # which is rounded down again
        if kept_of(self.pattern):
            changes |= {"sparsity": number / n_parts, "pattern": f"{n_parts - number}:{n_parts}"}
        return self.model_copy(update=changes)

    def outline(self, weight: Tensor, stats: LinearStats, mask: Tensor | None) -> Weight:
        n_kept = count_kept(weight.shape, self.sparsity, self.pattern)
        return Masked(Dense(weight.to("meta")), torch.empty(weight.shape, dtype=torch.bool, device="meta"), n_kept)


def _block_of(name: str) -> str:
    """A layer's name up to its block's index, the first number in it."""
    parts = name.split(".")
    return ".".join(parts[: next(index for index, part in enumerate(parts) if part.isdigit()) + 1])
