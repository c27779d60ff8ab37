"""Greenformer: factorise every layer that gets smaller by it, by a rank or a share of the largest that pays, without data
(Cahyawijaya et al., 2109.06762)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from compress.lowrank.factor import Factoriser, leading_directions
from compress.passes import Taxon
from compress.stats import LinearStats


class Greenformer(Factoriser):
    """``auto_fact`` of the published package: a ``rank`` below 1 is a share of the rank at which factors are as large as the
    matrix, which is what ``ratio`` says; from 1 on it is the rank itself.

    Unlike there, both factors get an equal share of each component's norm, which suits training and rounding, and the
    decomposition is exact. Of its solvers "random", its default, is for training from scratch: it would throw the weights away,
    and so is left out; "nmf" cannot represent negative weights. "snmf" is semi-nonnegative (Ding et al., 2010): the first factor,
    ``down``, has no negative entry, by multiplicative updates from the singular vectors.
    """

    taxon: ClassVar[Taxon] = Taxon.LOW_RANK
    paper: ClassVar[str] = "2109.06762"

    solver: Literal["svd", "snmf"] = Field("svd", description="svd: the nearest factors; snmf: with a nonnegative first one")
    iterations: int = Field(100, ge=1, description="updates of snmf's factors")

    @model_validator(mode="before")
    @classmethod
    def _rank_or_share(cls, data: Any) -> Any:
        try:
            share = float(data["rank"])
        except (KeyError, TypeError, ValueError):
            return data
        if not 0 < share < 1:
            return data
        if "ratio" in data:
            raise ValueError(f"rank={share:g}, a share, says what ratio={data['ratio']} says: give one of them")
        return {key: value for key, value in data.items() if key != "rank"} | {"ratio": share}

    def factors(self, weight: Tensor, stats: LinearStats, rank: int) -> tuple[Tensor, Tensor]:
        if self.solver == "svd":
            return super().factors(weight, stats, rank)
        return semi_nonnegative(weight, rank, self.iterations)


def semi_nonnegative(weight: Tensor, rank: int, iterations: int) -> tuple[Tensor, Tensor]:
    """down (rank, in), nowhere negative, and up (out, rank), both float64, whose product is near weight (out, in) float64.

    Of each right singular vector the larger of the parts of either sign begins. No update makes the distance larger; ``up`` is
    always the best for its ``down``. Components come in the order of their norms, of which both factors get an equal share.
    """
    rank = min(rank, *weight.shape)
    down = _one_sign(leading_directions(weight.T, rank).T)
    for _ in range(iterations):
        up = _best_up(weight, down)
        pull, gram = up.T @ weight, up.T @ up  # the distance falls where these gain on each other
        gains = pull.clamp(min=0) + gram.clamp(max=0).neg() @ down
        costs = pull.clamp(max=0).neg() + gram.clamp(min=0) @ down
        down = down * (gains / costs.clamp_min(torch.finfo(down.dtype).tiny)).sqrt()
    up = _best_up(weight, down)
    norms = up.norm(dim=0), down.norm(dim=1)
    share = torch.where((norms[0] > 0) & (norms[1] > 0), norms[0] / norms[1], 1).sqrt()
    order = (norms[0] * norms[1]).argsort(descending=True, stable=True)
    return (down * share.unsqueeze(1))[order], (up / share)[:, order]


def _one_sign(vectors: Tensor) -> Tensor:
    """The part of each row (rank, in) that is of the sign in which it is larger, and a little everywhere, for an update
    multiplies: what is zero stays so."""
    positive, negative = vectors.clamp(min=0), vectors.clamp(max=0).neg()
    parts = torch.where((positive.norm(dim=1) >= negative.norm(dim=1)).unsqueeze(1), positive, negative)
    return parts + 0.1 * vectors.abs().mean(1, keepdim=True)


def _best_up(weight: Tensor, down: Tensor) -> Tensor:
    """The ``up`` of least distance; of those the smallest, where rows of ``down`` depend on each other."""
    gram = down @ down.T
    return weight @ down.T @ torch.linalg.pinv(gram, rtol=1e-12, hermitian=True)
