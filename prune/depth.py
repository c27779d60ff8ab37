"""Depth: which blocks go, and the base of the methods that choose them."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from compress.errors import BadInput
from compress.passes import ModelPass
from compress.skeleton import Skeleton
from compress.surgery import Surgery
from compress.weights import Dense, Masked, Weight, opened

_ROWS = 32  # windows whose cosines are taken at a time


class Shortener(ModelPass):
    """Base of the methods that remove whole blocks.

    sparsity: share of the blocks, rounded down to a whole number, but one at least unless it is 0; blocks: that number itself.
    """

    sparsity: float = Field(0.25, ge=0, lt=1, description="share of the blocks removed, rounded down to whole ones, one at least")
    blocks: int | None = Field(None, ge=0, description="number of blocks removed, instead of a share")

    @property
    def measures(self) -> bool:
        return True

    def n_removed(self, model: Skeleton) -> int:
        """How many blocks go. Raises :class:`BadInput` where none would stay."""
        n_blocks = len(model.blocks)
        count = self.count_of(n_blocks)
        if count >= n_blocks:
            raise BadInput(f"{self.label()}: of the model's {n_blocks} blocks one must stay")
        return count

    def count_of(self, total: int) -> int:
        """How many of so many the settings ask for."""
        if self.blocks is not None:
            return self.blocks
        return max(1, int(self.sparsity * total + 1e-9)) if self.sparsity else 0

    def removed(self, found: Any, count: int) -> list[int]:
        """The indices of the blocks that go, from what :meth:`measure` found."""
        raise NotImplementedError(type(self).__name__)

    def surgery(self, model: Skeleton, found: Any = None) -> Surgery:
        count, n_blocks = self.n_removed(model), len(model.blocks)
        gone = range(n_blocks - 1 - count, n_blocks - 1) if found is None else self.removed(found, count)
        return Surgery(blocks=[index for index in range(n_blocks) if index not in set(gone)], selects=True)


def cosine(x: Tensor, y: Tensor) -> float:
    """Mean over the tokens of the cosine between x and y, (n, length, d), in float64."""
    total = torch.zeros((), dtype=torch.float64)
    for a, b in zip(x.split(_ROWS), y.split(_ROWS), strict=True):
        total += torch.cosine_similarity(a.double(), b.double(), dim=-1).sum()
    return float(total / x[..., 0].numel())


Mixture = dict[int, float]
"""A new block of an old model's: how many times over it counts each old one. The first is the one whose norms it has."""


def check_addable(weight: Weight) -> None:
    """Raise ValueError unless :func:`mixed` takes the weight."""
    if not isinstance(weight.inner if isinstance(weight, Masked) else weight, Dense):
        raise ValueError("only plain matrices can be added up, not grids or factors; do it before quantizing or factorising")


@torch.no_grad()
def mixed(model: Skeleton, mixture: Mixture) -> tuple[dict[str, Weight], dict[str, Tensor]]:
    """The linear weights and other tensors of a new block. Biases of linear layers are mixed as their matrices are; a matrix is
    masked where all of its parts are, so that what one of them kept is kept."""
    index = next(iter(mixture))
    weights, others = model.read_weights(index), model.read_others(index)
    if len(mixture) == 1:
        return weights, others
    for local in model.arch.linears:
        members = [opened(model.read_weight(other, local)) for other in mixture]
        total = torch.zeros(members[0].shape)
        for member, times in zip(members, mixture.values(), strict=True):
            total += member.dense(torch.float32) * times
        values, masks = Dense(total.to(members[0].dtype)), [member.mask for member in members if member.mask is not None]
        weights[local] = Masked(values, torch.stack(masks).any(0)) if len(masks) == len(members) else values
    biases = {f"{local}.bias" for local in model.arch.linears} & others.keys()
    found = {other: model.read_others(other) for other in mixture} if biases else {}
    for name in biases:
        parts = [found[other][name].float() * times for other, times in mixture.items()]
        others[name] = torch.stack(parts).sum(0).to(others[name].dtype)
    return weights, others
