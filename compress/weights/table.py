"""Compressed embeddings: tables that are looked up row by row, and that a tied head multiplies by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from compress.weights.composed import Composed
from compress.weights.packing import pack_bits
from compress.weights.parts import PackedGrid


class Lookup(Composed):
    """A (vocabulary, d) matrix in the place of an embedding's, with tensors of its own."""


@dataclass(frozen=True)
class Table(PackedGrid, Lookup):
    """A symmetric integer grid of a token embedding: ``dense = codes * scale``.

    codes: (vocabulary, d) int8 in [-2**(bits-1), 2**(bits-1) - 1], d a multiple of 8. scale: (vocabulary, groups) floating
    point. In the file the codes of each row are a stream of bits.
    """

    kind = "table"
    tensor_names = ("packed", "scale")
    codes: Tensor
    scale: Tensor
    bits: int

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or self.dtype
        codes = self.codes.unflatten(1, (self.scale.shape[1], -1)).to(dtype)
        return (codes * self.scale.to(dtype).unsqueeze(-1)).flatten(1)

    def sizes(self) -> dict[str, int]:
        return {"bits": self.bits, "n_groups": self.scale.shape[1]}

    def tensors(self) -> dict[str, Tensor]:
        return {"packed": pack_bits(self.codes, self.bits).view(len(self.codes), -1), "scale": self.scale}

    @classmethod
    def assemble(cls, shape, sizes, tensors, children) -> Table:
        from compress.stored_layers import unpack_bits

        packed, bits = tensors["packed"], sizes["bits"]
        codes = unpack_bits(packed.flatten(), bits, packed.numel() * 8 // bits).view(len(packed), -1)
        return cls(codes, tensors["scale"], bits)

    def parameters(self) -> dict[str, Tensor]:
        return {"scale": self.scale}


class FactoredLookup(Lookup):
    """An embedding of which products of floating-point tensors are left, all of them trainable."""

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.tensors().values())).dtype

    @property
    def numel(self) -> int:
        return sum(tensor.numel() for tensor in self.tensors().values())

    def parameters(self) -> dict[str, Tensor]:
        return self.tensors()

    def rebuild(self, parameters: Mapping[str, Tensor]) -> FactoredLookup:
        return replace(self, **parameters)  # type: ignore[type-var]


@dataclass(frozen=True)
class TableFactors(FactoredLookup):
    """An embedding of low rank: ``dense = left @ right``; left: (vocabulary, rank), right: (rank, d)."""

    kind = "table_factors"
    tensor_names = ("left", "right")
    left: Tensor
    right: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.left.shape[0], self.right.shape[1]

    @property
    def rank(self) -> int:
        return self.left.shape[1]

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or self.dtype
        return self.left.to(dtype) @ self.right.to(dtype)

    def sizes(self) -> dict[str, Any]:
        return {"rank": self.rank}

    def tensors(self) -> dict[str, Tensor]:
        return {"left": self.left, "right": self.right}

    @classmethod
    def assemble(cls, shape, sizes, tensors, children) -> TableFactors:
        return cls(tensors["left"], tensors["right"])


@dataclass(frozen=True)
class TableTrains(FactoredLookup):
    """An embedding each of whose rows is a tensor train of its own: entry (n_1 ... n_c) of a row is the product of its cores'
    matrices at these digits. values: (vocabulary, numbers of a row's cores one after the other, each as (bond before, digit,
    bond after)). digits: (n_1 ... n_c); bonds: (c - 1,)."""

    kind = "table_trains"
    tensor_names = ("values",)
    values: Tensor
    digits: tuple[int, ...]
    bonds: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], prod(self.digits)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        from compress.stored_layers import row_trains

        return row_trains(self.values.to(dtype or self.dtype), self.digits, self.bonds)

    def sizes(self) -> dict[str, Any]:
        return {"digits": list(self.digits), "bonds": list(self.bonds)}

    def tensors(self) -> dict[str, Tensor]:
        return {"values": self.values}

    @classmethod
    def assemble(cls, shape, sizes, tensors, children) -> TableTrains:
        return cls(tensors["values"], tuple(sizes["digits"]), tuple(sizes["bonds"]))
