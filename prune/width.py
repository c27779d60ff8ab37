"""Width: how many neurons, heads and hidden channels go, and the base of the methods that rank them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from compress.errors import BadInput
from compress.narrow import Attention, Kept, attention, n_neurons, narrowed
from compress.passes import ModelPass
from compress.skeleton import Skeleton
from compress.surgery import Surgery

Unit = Literal["neurons", "heads", "hidden"]
_NUMBERS = {
    "intermediate_size": "neurons",
    "num_attention_heads": "heads",
    "num_key_value_heads": "heads",
    "hidden_size": "hidden",
}


class Narrower(ModelPass):
    """Base of the methods that remove channels: a subclass scores them, and those of the highest scores stay.

    What goes is a share of each kind of unit, or all that a target shape leaves out: numbers as ``config.json`` names them, the
    same in every block, where a kind without a number stays as it is. Heads go in whole groups of those that share a key and
    value head, or the same number of query heads from every group. A share is rounded: to ``round_to`` channels, of which
    groups of quantization are then multiples or divisors, and to whole heads. Something of every kind stays.
    """

    ranks: ClassVar[frozenset[str]] = frozenset({"neurons", "heads", "hidden"})
    """The kinds of unit that the method can score."""
    trims_queries: ClassVar[bool] = False
    """Whether query heads may go from groups that stay, where their number meets the share better than whole groups."""
    rivals: ClassVar[tuple[tuple[str, ...], ...]] = (("neurons",), ("heads",))
    """Kinds of unit whose scores are compared with each other where ``uniform`` is off."""

    sparsity: float = Field(0.25, ge=0, lt=1, description="share of each chosen kind of unit that is removed")
    units: tuple[Unit, ...] = Field(("neurons", "heads"), min_length=1, description="neurons, heads, hidden: joined with +")
    uniform: bool = Field(True, description="the same share of every block; false: the least of all blocks go, shapes differ")
    round_to: int = Field(32, ge=1, description="neurons and hidden channels stay in multiples of this, as groups need")
    intermediate_size: int | None = Field(None, ge=1, description="neurons that stay, instead of a share")
    num_attention_heads: int | None = Field(None, ge=1, description="query heads that stay, instead of a share")
    num_key_value_heads: int | None = Field(None, ge=1, description="key and value heads that stay, instead of a share")
    hidden_size: int | None = Field(None, ge=1, description="hidden channels that stay, instead of a share")

    @field_validator("units", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        return tuple(value.split("+")) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _share_or_numbers(self) -> Narrower:
        if self._numbers() and (clash := {"sparsity", "units"} & self.settings().keys()):
            raise ValueError(
                f"{' and '.join(sorted(self._numbers()))} already say what stays: leave {' and '.join(sorted(clash))} out"
            )
        if missing := self.chosen() - self.ranks:
            raise ValueError(f"it does not rank {' and '.join(sorted(missing))}, only {' and '.join(sorted(self.ranks))}")
        return self

    def _numbers(self) -> dict[str, int]:
        return {name: number for name in _NUMBERS if (number := getattr(self, name)) is not None}

    def chosen(self) -> set[str]:
        """The kinds of unit that are cut."""
        return {_NUMBERS[name] for name in self._numbers()} or set(self.units)

    @property
    def measures(self) -> bool:
        return True

    def span(self, model: Skeleton) -> list[int]:
        """The blocks that lose neurons and heads; those that share another one's layers follow it."""
        return [index for index in range(len(model.blocks)) if index not in model.owners]

    def surgery(self, model: Skeleton, found: Any = None) -> Surgery:
        found = found or _guess(model, heads="heads" in self.chosen())
        hidden = None
        if "hidden" in self.chosen():
            size = len(found["hidden"])
            multiple = math.lcm(self.round_to, model.checkpoint.config.num_attention_heads)  # which transformers asks for
            count = rounded((1 - self.sparsity) * size, size, multiple)
            if self.hidden_size:
                count = self._exact("hidden_size", self.hidden_size, size)
            hidden = best(torch.tensor(found["hidden"]), count) if count < size else None
        return narrowed(model, self.keep(model, found), hidden)

    def keep(self, model: Skeleton, found: dict[str, list]) -> list[Kept]:
        """What stays of every block. found: by block, scores of "neurons", of query "heads" and of their "groups"."""
        counts, kept = self._counts(model, found), [Kept()] * len(model.blocks)
        for index in self.span(model):
            neurons = groups = queries = None
            if "neurons" in counts and (count := counts["neurons"][index]) < n_neurons(model, index):
                neurons = best(torch.tensor(found["neurons"][index]), count)
            if "heads" in counts:
                count, (_, n_groups, _) = counts["heads"][index], attention(model, index)
                chosen = best(torch.tensor(found["groups"][index]), count)
                groups = chosen if count < n_groups else None
                heads = torch.tensor(found["heads"][index]).unflatten(0, (n_groups, -1))
                if (each := counts["queries"][index]) < heads.shape[1]:
                    queries = torch.cat([best(heads[group], each) + group * heads.shape[1] for group in chosen])
            kept[index] = Kept(neurons, groups, queries)
        return kept

    def _counts(self, model: Skeleton, found: dict[str, list]) -> dict[str, dict[int, int]]:
        """By kind and block, how many "neurons", "heads" (groups of them) and "queries" of each group stay."""
        span, units = self.span(model), self.chosen()
        counts: dict[str, dict[int, int]] = {}
        if "heads" in units:
            heads = {index: self._heads(attention(model, index)) for index in span}
            counts["heads"] = {index: n_groups for index, (n_groups, _) in heads.items()}
            counts["queries"] = {index: queries for index, (_, queries) in heads.items()}
        if "neurons" in units:
            counts["neurons"] = {index: self._neurons(n_neurons(model, index)) for index in span}
        if self.uniform or self._numbers():
            return counts
        for kinds in self.rivals:
            units = [(kind, index) for kind in kinds if kind in counts for index in span]
            scores = [torch.tensor(found["groups" if kind == "heads" else kind][index]) for kind, index in units]
            stay = survivors(scores, [cost(model, *unit) for unit in units], self.sparsity) if units else []
            for (kind, index), count, own in zip(units, stay, scores, strict=True):
                counts[kind][index] = rounded(count, len(own), self.round_to if kind == "neurons" else 1)
        if "heads" in counts:
            counts["queries"] = {index: shape.n_heads // shape.n_groups for index in span if (shape := attention(model, index))}
        return counts

    def _neurons(self, size: int) -> int:
        if self.intermediate_size:
            return self._exact("intermediate_size", self.intermediate_size, size)
        return rounded((1 - self.sparsity) * size, size, self.round_to)

    def _heads(self, shape: Attention) -> tuple[int, int]:
        """How many groups stay of a block's heads, and how many query heads of each."""
        size = shape.n_heads // shape.n_groups
        if self._numbers():
            n_groups = self._exact("num_key_value_heads", self.num_key_value_heads or shape.n_groups, shape.n_groups)
            n_heads = self.num_attention_heads or n_groups * size
            if n_heads % n_groups or n_heads > n_groups * size:
                raise BadInput(
                    f"{self.label()}: {n_heads} query heads cannot be left in {n_groups} groups, which need an equal number and "
                    f"have {size} each; give num_attention_heads as a multiple of {n_groups}, up to {n_groups * size}"
                )
            return n_groups, n_heads // n_groups
        stay = 1 - self.sparsity
        groups, queries = rounded(stay * shape.n_groups, shape.n_groups, 1), rounded(stay * size, size, 1)
        if self.trims_queries and abs(queries / size - stay) <= abs(groups / shape.n_groups - stay):
            return shape.n_groups, queries
        return groups, size

    def _exact(self, name: str, wanted: int, size: int) -> int:
        if wanted > size:
            raise BadInput(f"{self.label()}: {name}={wanted}, but the model has only {size}; give a number up to that")
        return wanted


def rounded(count: float, size: int, multiple: int) -> int:
    """The nearest multiple to a count out of ``size``, at least one and at most ``size``, which need not be a multiple."""
    return size if count >= size else min(size, max(multiple, int(count / multiple + 0.5) * multiple))


def best(scores: Tensor, count: int) -> Tensor:
    """Sorted indices of the ``count`` highest scores (n,), of equal ones the first."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def survivors(scores: Sequence[Tensor], costs: Sequence[float], share: float) -> list[int]:
    """How many units of each list stay when those of the lowest scores of all go, until the share of all costs is reached.

    costs: of a unit of each list, in any measure.
    """
    sizes = torch.tensor([len(own) for own in scores])
    weights = torch.tensor(costs, dtype=torch.float64).repeat_interleave(sizes)
    order = torch.cat(list(scores)).argsort(stable=True)
    stays = torch.empty(len(order), dtype=torch.bool)
    stays[order] = weights[order].cumsum(0) > share * weights.sum() * (1 + 1e-9)
    return [int(part.sum()) for part in stays.split(sizes.tolist())]


def cost(model: Skeleton, kind: str, index: int) -> int:
    """Parameters of a block's neuron ("neurons") or of a group of heads ("heads"), without biases."""
    if kind == "neurons":
        neurons = model.arch.neurons
        return model.shape(index, neurons.reader)[0] * (len(neurons.sources) * neurons.stacked + 1)
    assert model.arch.heads is not None
    n_heads, n_groups, head_dim = attention(model, index)
    return model.shape(index, model.arch.heads.reader)[0] * head_dim * 2 * (n_heads // n_groups + 1)


def _guess(model: Skeleton, heads: bool) -> dict[str, list]:
    """Scores for a plan, which knows none: later blocks lose less, so that shapes differ where they may."""

    def scores(size: int, index: int) -> list[float]:
        return [(position + 0.5) / size + 0.5 * index / len(model.blocks) for position in range(size)]

    count = range(len(model.blocks))
    found: dict[str, list] = {
        "neurons": [scores(n_neurons(model, index), index) for index in count],
        "hidden": scores(model.checkpoint.config.hidden_size, 0),
    }
    if heads:
        shapes = [attention(model, index) for index in count]
        found["heads"] = [scores(shape.n_heads, index) for index, shape in enumerate(shapes)]
        found["groups"] = [scores(shape.n_groups, index) for index, shape in enumerate(shapes)]
    return found
