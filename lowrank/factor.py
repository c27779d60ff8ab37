"""Rank arithmetic, the optimal projection that all low-rank methods here end in, and their base.

The best rank-k approximation of W for inputs of second moment C = S S^T projects outputs onto the k leading left
singular vectors U of W S, so it is ``U (U^T W)``: the whitening S need not be inverted, nor even be invertible.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from compress.lowrank.allocation import RULES, Layer, least_size, probed_ranks
from compress.passes import LinearPass, Needs
from compress.stats import LinearStats, symmetric
from compress.weights import Dense, LowRank, Masked, Weight

_ORTHOGONAL = 0.9  # of a unit vector, what is orthogonal to all before it, for those to count as orthogonal


def rank_for(ratio: float, n_outputs: int, n_inputs: int, round_to: int = 1) -> int | None:
    """The largest rank whose factors hold at most ``ratio`` of an (out, in) matrix's parameters; None: leave it whole.

    The rank is rounded down to a multiple of ``round_to``, or up to ``round_to`` itself if that still saves parameters.
    A ratio of 1 asks for nothing to be given up, so the matrix is left whole.
    """
    if ratio >= 1:
        return None
    elements, per_rank = n_outputs * n_inputs, n_outputs + n_inputs
    rank = int(ratio * elements / per_rank + 1e-9)
    if rank >= round_to:
        rank -= rank % round_to
    elif round_to * per_rank < elements:
        rank = round_to
    rank = max(rank, 1)
    return rank if rank * per_rank < elements else None


def leading_directions(matrix: Tensor, rank: int) -> Tensor:
    """The ``rank`` leading left singular vectors of a float64 matrix (out, in), orthonormal: (out, rank).

    They come from the smaller Gram matrix, several times faster than from a singular value decomposition. In float64
    the truncation error is still the least possible to some 1e-15 of the squared norm.
    """
    n_outputs, n_inputs = matrix.shape
    if n_outputs <= n_inputs:
        return principal_axes(symmetric(matrix, matrix.T), rank)
    return orthonormalised(matrix @ principal_axes(symmetric(matrix.T, matrix), rank))


def principal_axes(gram: Tensor, rank: int) -> Tensor:
    """The eigenvectors of the ``rank`` largest eigenvalues of a symmetric float64 matrix (n, n), the largest first: (n, rank)."""
    return torch.linalg.eigh(gram).eigenvectors[:, -rank:].flip(1)


def orthonormalised(columns: Tensor) -> Tensor:
    """An orthonormal basis of the span of each number of the first columns (n, rank) float64, which are all but orthogonal to
    each other: (n, rank). By a Cholesky factor, unless some columns are too small for that."""
    scaled = columns / columns.norm(dim=0)
    gram = scaled.T @ scaled
    upper, failed = torch.linalg.cholesky_ex(gram, upper=True)
    if failed or not bool(upper.diagonal().amin() > _ORTHOGONAL):
        return torch.linalg.qr(columns).Q
    return torch.linalg.solve_triangular(upper, scaled, upper=True, left=False)


def spectrum(matrix: Tensor) -> Tensor:
    """The squares of the singular values of a float64 matrix (out, in), falling: (min(out, in),)."""
    gram = symmetric(matrix, matrix.T) if matrix.shape[0] <= matrix.shape[1] else symmetric(matrix.T, matrix)
    return torch.linalg.eigvalsh(gram).clamp_(min=0).flip(0)


def project(weight: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """Factor the projection of weight (out, in) onto orthonormal directions (out, rank): down (rank, in), up (out,
    rank).

    Each component's norm is shared equally between its two factors, which suits later rounding: for plain SVD these are
    sqrt(S) V^T and U sqrt(S).
    """
    components = directions.T @ weight
    share = components.norm(dim=1).sqrt()
    share = torch.where(share > 0, share, 1)
    return components / share.unsqueeze(1), directions * share


class Factoriser(LinearPass):
    """Base of the low-rank methods: a matrix becomes ``up @ down`` where that saves parameters, else stays as it is.

    ``ranks`` says how the parameters that are kept, ``ratio`` of all matching matrices', are shared out among these: "uniform",
    alike; else after a survey of all of them (see :mod:`compress.lowrank.allocation`), within one rank of the budget and never
    above it. "energy": every layer keeps the same share of its energy, which is that of :meth:`metric`'s matrix. "type":
    SVD-LLM v2's, more for those of a type (q_proj, ...) that would lose more. "threshold": WeLore's, by normalised singular
    values. "sensitivity": after ASVD, the least sum of what truncating each layer changes of its block's outputs, measured at
    eleven ranks. "loss": the same sum measured at one rank, from which the energy lost tells that of all others; about as good.
    """

    factorises = True

    ratio: float = Field(0.8, gt=0, le=1, description="share of the matrices' parameters that is kept")
    rank: int | None = Field(None, ge=1, description="rank of every matrix, instead of the ratio's")
    round_to: int = Field(1, ge=1, description="the ratio's ranks are rounded down to multiples of this")
    ranks: Literal["uniform", "energy", "loss", "type", "threshold", "sensitivity"] = Field(
        "uniform", description="how the ratio is shared out among layers: alike, or by a rule after a survey of all of them"
    )

    @model_validator(mode="after")
    def _one_rank_or_a_rule(self) -> Factoriser:
        if self.rank is not None and self.ranks != "uniform":
            raise ValueError(f"rank={self.rank} is that of every layer: leave ranks={self.ranks} out, or give a ratio")
        return self

    def rank_of(self, n_outputs: int, n_inputs: int) -> int | None:
        """The rank that an (out, in) matrix is given; None where its factors would not be smaller."""
        if self.rank is None:
            return rank_for(self.ratio, n_outputs, n_inputs, self.round_to)
        return self.rank if self.rank * (n_outputs + n_inputs) < n_outputs * n_inputs else None

    def metric(self, weight: Tensor, stats: LinearStats) -> Tensor:
        """Weight (out, in) float64 with its inputs in coordinates in which all of them matter alike: (out, any). What it loses
        beyond its leading directions is what the method minimises."""
        return weight

    def directions(self, weight: Tensor, stats: LinearStats, rank: int) -> Tensor:
        """Orthonormal output directions (out, rank) to keep, most important first, from weight (out, in) float64."""
        return leading_directions(self.metric(weight, stats), rank)

    def factors(self, weight: Tensor, stats: LinearStats, rank: int) -> tuple[Tensor, Tensor]:
        """down (rank, in) and up (out, rank) float64, from weight (out, in) float64; the most important components first."""
        return project(weight, self.directions(weight, stats, rank))

    def linear(self, weight: Tensor, stats: LinearStats, mask: Tensor | None) -> Weight:
        rank = self.rank_of(*weight.shape)
        if rank is None:
            return Dense(weight) if mask is None else Masked(Dense(weight), mask)
        down, up = self.factors(weight.double(), stats, rank)
        return LowRank(Dense(down.to(weight.dtype)), Dense(up.to(weight.dtype)))

    def outline(self, weight: Tensor, stats: LinearStats, mask: Tensor | None) -> Weight:
        n_outputs, n_inputs = weight.shape
        rank = self.rank_of(n_outputs, n_inputs)
        if rank is None:
            whole = Dense(weight.to("meta"))
            return whole if mask is None else Masked(whole, mask.to("meta"))
        down = torch.empty(rank, n_inputs, dtype=weight.dtype, device="meta")
        up = torch.empty(n_outputs, rank, dtype=weight.dtype, device="meta")
        return LowRank(Dense(down), Dense(up))

    # sharing out a budget

    @property
    def surveys(self) -> Needs | None:
        if self.ranks == "uniform" or self.ratio == 1 or self.rank is not None:  # an effort's rule gives way to a chosen rank
            return None
        return Needs(self.needs.stats - {"cross"}, inputs=self.ranks in ("loss", "sensitivity"))

    def check_budget(self, weights: Sequence[Weight]) -> None:
        least = sum(least_size(weight.shape, self.round_to) for weight in weights)
        total = sum(weight.shape[0] * weight.shape[1] for weight in weights)
        if least > int(self.ratio * total):
            raise ValueError(f"the least ranks hold {least / total:.4f} of the parameters here, above ratio={self.ratio:g}")

    def survey(self, weight: Weight, stats: LinearStats, effect: Callable[[Weight], float]) -> Any:
        values, dtype = weight.dense().double(), weight.dtype
        ranks = []
        if self.ranks in ("loss", "sensitivity"):
            ranks = probed_ranks(*weight.shape, self.round_to, *([(self.ratio,)] if self.ranks == "loss" else []))
        found: dict[str, Any] = {"shape": weight.shape, "ranks": ranks, "effects": []}
        if self.ranks != "sensitivity":
            found["spectrum"] = spectrum(self.metric(values, stats)).tolist()
        if ranks:
            down, up = self.factors(values, stats, ranks[-1])
            tried = (LowRank(Dense(down[:rank].to(dtype)), Dense(up[:, :rank].to(dtype))) for rank in ranks)
            found["effects"] = [effect(candidate) for candidate in tried]
        return found

    def allocate(self, found: dict[str, Any], groups: Sequence[tuple[str, ...]]) -> dict[str, Factoriser]:
        layers = [
            Layer(
                tuple(own["shape"]),
                np.array(own.get("spectrum", ())),
                name.rpartition(".")[2],
                own.get("ranks", ()),
                own.get("effects", ()),
            )
            for name, own in found.items()
        ]
        budget = int(self.ratio * sum(layer.size for layer in layers) + 1e-6)
        ranks = RULES[self.ranks](layers, budget, self.round_to)
        return {name: self._with(rank) for name, rank in zip(found, ranks, strict=True)}

    def _with(self, rank: int | None) -> Factoriser:
        """This pass with one rank, None: leaving matrices whole."""
        return self.model_copy(update={"ranks": "uniform", "rank": rank, "ratio": 1.0 if rank is None else self.ratio})
