"""BitStack: decompose a matrix into blocks of a bit per weight, each the signs of what is left times a low-rank matrix of its
magnitudes, of which as many are opened as there is room for (Wang et al., 2410.23918)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from compress.lowrank.factor import project
from compress.passes import Needs, Taxon
from compress.stacking import StackPass
from compress.stats import LinearStats
from compress.weights import SignedLowRank, Weight
from compress.weights.packing import pack_bits
from compress.weights.stack import NO_ZEROS

_FACTOR_BITS = 0.15  # per weight, that factors take at most unless a rank is given
_MOST_RANK = 16  # the paper's
_LEAST_SCALE = 1e-3  # of an input, as a share of the root mean square of all
_OVERSAMPLING, _ROUNDS = 8, 4  # of the search for a matrix's leading directions


class BitStack(StackPass):
    """A sum of ``blocks``: each approximates what those before it leave of the matrix, with its inputs scaled by their root mean
    square on the calibration tokens, by sign(R) times the best rank-k approximation of |R|.

    The scales go back into each block's right factor, which is exact, since they are positive: sign(R) * (U V) diag(1/s) =
    sign(R) * (U (V diag(1/s))). So no other layer is touched, while the published code folds them into the layer before, where
    there is one that takes them. A block approximates what the stored factors before it, rounded to the model's dtype, have left.
    By default k is 16, or as much less as keeps a block of a small matrix near 1.15 bits per weight. All 16 blocks take more than
    a 16-bit matrix: the artifact is a store, to be opened (`compress open`) at any size below.
    """

    taxon: ClassVar[Taxon] = Taxon.LOW_RANK
    paper: ClassVar[str] = "2410.23918"
    needs: ClassVar[Needs] = Needs(frozenset({"sqnorm"}))

    blocks: int = Field(16, ge=1, le=64, description="of every layer, about 1.15 bits per weight each")
    rank: int | None = Field(None, ge=1, description="of a block's magnitudes; none: 16, or what costs 0.15 bits per weight")

    def rank_of(self, weight: Tensor) -> int:
        """The rank of the blocks of a matrix (out, in), by its shape and dtype."""
        (n_outputs, n_inputs), itemsize = weight.shape, weight.element_size()
        affordable = int(_FACTOR_BITS * n_outputs * n_inputs / (8 * itemsize * (n_outputs + n_inputs)))
        return min(self.rank or max(1, min(affordable, _MOST_RANK)), n_outputs, n_inputs)

    def linear(self, weight: Tensor, stats: LinearStats, mask: Tensor | None) -> Weight:
        if mask is not None:
            raise ValueError(NO_ZEROS)
        rank, scale = self.rank_of(weight), input_scale(stats)
        rest, blocks = weight.float() * scale, []
        for _ in range(self.blocks):
            signs = torch.where(rest < 0, -1, 1).to(torch.int8)
            down, up = leading_factors(rest.abs(), rank)
            left, right = up.to(weight.dtype), (down / scale).to(weight.dtype)
            blocks.append((pack_bits((signs - 1) // 2, 1), left, right))
            rest = rest - signs * (left.float() @ right.float()) * scale
        packed, left, right = (torch.stack(parts) for parts in zip(*blocks, strict=True))
        return SignedLowRank(packed, left, right, self.priorities(self.blocks))

    def outline(self, weight: Tensor, stats: LinearStats, mask: Tensor | None) -> Weight:
        if mask is not None:
            raise ValueError(NO_ZEROS)
        (n_outputs, n_inputs), rank = weight.shape, self.rank_of(weight)
        meta: dict[str, Any] = {"dtype": weight.dtype, "device": "meta"}
        return SignedLowRank(
            torch.empty(self.blocks, -(-n_outputs * n_inputs // 8), dtype=torch.uint8, device="meta"),
            torch.empty(self.blocks, n_outputs, rank, **meta),
            torch.empty(self.blocks, rank, n_inputs, **meta),
            self.priorities(self.blocks),
        )


def input_scale(stats: LinearStats) -> Tensor:
    """What each input counts for, (in,) float32, positive: its root mean square, never far below that of all; ones without any
    tokens."""
    scale = (stats.sqnorm / max(1, stats.n)).sqrt()
    least = _LEAST_SCALE * scale.square().mean().sqrt()
    return (scale + least) if least > 0 else torch.ones_like(scale)


def leading_factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """down (rank, in) and up (out, rank) whose product is the best approximation of that rank of a float32 matrix (out, in).

    The leading directions come from subspace iteration (Halko et al., 0909.4061), which sixteen blocks of every layer want fast;
    a subspace of the matrix's full rank makes it exact.
    """
    size = min(rank + _OVERSAMPLING, *matrix.shape)
    generator = torch.Generator(matrix.device).manual_seed(0)
    basis = torch.randn(matrix.shape[1], size, generator=generator, device=matrix.device)
    for _ in range(_ROUNDS):
        basis = matrix.T @ torch.linalg.qr(matrix @ basis).Q
    basis = torch.linalg.qr(matrix @ basis).Q
    directions = torch.linalg.svd(basis.T @ matrix, full_matrices=False).U
    return project(matrix, basis @ directions[:, :rank])
