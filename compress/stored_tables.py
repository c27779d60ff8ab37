"""Embeddings whose rows are worked out from tensors of their own, and the head that shares them.

Artifacts that need them carry this file beside ``modeling_compress.py``, so it stands alone: torch only.
"""

from typing import Any

import torch
from torch import Tensor, nn

from .stored_layers import row_trains, unpack_bits


class Lookup(nn.Module):
    """An embedding whose rows are worked out from tensors of its own. factor: what rows are multiplied by when they are looked
    up, in families that do so."""

    factor: float | None = None

    def find(self, ids: Tensor) -> Tensor:
        """The rows (n, d) of ids (n,)."""
        raise NotImplementedError

    def matrix(self) -> Tensor:
        """The (vocabulary, d) matrix."""
        raise NotImplementedError

    def scores(self, x: Tensor) -> Tensor:
        """What a head of that matrix puts out: x (..., d) -> (..., vocabulary)."""
        return nn.functional.linear(x, self.matrix().to(x.dtype))

    def forward(self, ids: Tensor) -> Tensor:
        """ids: (...) -> (..., d)."""
        found = self.find(ids.flatten()).view(*ids.shape, -1)
        return found if self.factor is None else found * torch.tensor(self.factor, device=found.device).to(found.dtype)


class Table(Lookup):
    """An embedding whose rows are codes times scales: packed (vocabulary, d * bits / 8), scale (vocabulary, n_groups)."""

    packed: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool, bits: int, n_groups: int, children: dict):
        super().__init__()
        self.bits = bits
        self.register_buffer("packed", torch.empty(out_features, in_features * bits // 8, dtype=torch.uint8))
        self.scale = nn.Parameter(torch.empty(out_features, n_groups), requires_grad=False)

    def rows(self, packed: Tensor, scale: Tensor) -> Tensor:
        """The rows (n, d) of those codes (n, d * bits / 8) and scales (n, n_groups)."""
        codes = unpack_bits(packed.flatten(), self.bits, packed.numel() * 8 // self.bits).to(scale.dtype)
        return (codes.view(*scale.shape, -1) * scale.unsqueeze(-1)).flatten(1)

    def find(self, ids: Tensor) -> Tensor:
        return self.rows(self.packed[ids], self.scale[ids])

    def matrix(self) -> Tensor:
        return self.rows(self.packed, self.scale)


class TableFactors(Lookup):
    """An embedding of low rank: left (vocabulary, rank) @ right (rank, d)."""

    def __init__(self, in_features: int, out_features: int, bias: bool, rank: int, children: dict):
        super().__init__()
        self.left = nn.Parameter(torch.empty(out_features, rank), requires_grad=False)
        self.right = nn.Parameter(torch.empty(rank, in_features), requires_grad=False)

    def find(self, ids: Tensor) -> Tensor:
        return self.left[ids] @ self.right

    def matrix(self) -> Tensor:
        return self.left @ self.right

    def scores(self, x: Tensor) -> Tensor:
        return nn.functional.linear(nn.functional.linear(x, self.right.to(x.dtype)), self.left.to(x.dtype))


class TableTrains(Lookup):
    """An embedding of rows that are chains of cores: values (vocabulary, numbers of a row)."""

    def __init__(self, in_features: int, out_features: int, bias: bool, digits: list, bonds: list, children: dict):
        super().__init__()
        self.digits, self.bonds = digits, bonds
        n_numbers = sum(n * before * after for n, before, after in zip(digits, [1, *bonds], [*bonds, 1], strict=True))
        self.values = nn.Parameter(torch.empty(out_features, n_numbers), requires_grad=False)

    def find(self, ids: Tensor) -> Tensor:
        return row_trains(self.values[ids], self.digits, self.bonds)

    def matrix(self) -> Tensor:
        return row_trains(self.values, self.digits, self.bonds)


class TiedHead(nn.Module):
    """A head without tensors of its own: it multiplies by the embedding's table."""

    def __init__(self, table: Any):
        super().__init__()
        self.tables = (table,)  # in a tuple it is no child, whose tensors would be saved twice

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., d) -> (..., vocabulary)."""
        return self.tables[0].scores(x)
