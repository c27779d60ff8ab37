"""Rank arithmetic, the optimal projection that all low-rank methods here end in, and their base.

The best rank-k approximation of W for inputs of second moment C = S S^T projects outputs onto the k leading left
singular vectors U of W S, so it is ``U (U^T W)``: the whitening S need not be inverted, nor even be invertible.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from compress.passes import LinearPass
from compress.stats import LinearStats
from compress.weights import Dense, LowRank, Masked, Weight


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
        return torch.linalg.eigh(matrix @ matrix.T).eigenvectors[:, -rank:].flip(1)
    right = torch.linalg.eigh(matrix.T @ matrix).eigenvectors[:, -rank:].flip(1)
    return torch.linalg.qr(matrix @ right).Q


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
    """Base of the low-rank methods: a matrix becomes ``up @ down`` where that saves parameters, else stays as it is."""

    factorises = True

    ratio: float = Field(0.8, gt=0, le=1, description="share of each matrix's parameters that is kept")
    rank: int | None = Field(None, ge=1, description="rank of every matrix, instead of the ratio's")
    round_to: int = Field(1, ge=1, description="the ratio's rank is rounded down to a multiple of this")

    def rank_of(self, n_outputs: int, n_inputs: int) -> int | None:
        """The rank that an (out, in) matrix is given; None where its factors would not be smaller."""
        if self.rank is None:
            return rank_for(self.ratio, n_outputs, n_inputs, self.round_to)
        return self.rank if self.rank * (n_outputs + n_inputs) < n_outputs * n_inputs else None

    def directions(self, weight: Tensor, stats: LinearStats, rank: int) -> Tensor:
        """Orthonormal output directions (out, rank) to keep, from weight (out, in) float64."""
        raise NotImplementedError(type(self).__name__)

    def linear(self, weight: Tensor, stats: LinearStats, mask: Tensor | None) -> Weight:
        rank = self.rank_of(*weight.shape)
        if rank is None:
            return Dense(weight) if mask is None else Masked(Dense(weight), mask)
        values = weight.double()
        down, up = project(values, self.directions(values, stats, rank))
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
