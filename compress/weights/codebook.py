"""Vectors looked up in codebooks: what vector and additive quantization make of a matrix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compress.weights.composed import Composed
from compress.weights.matrix import Masked
from compress.weights.packing import pack_indices

NO_ZEROS = "vectors from a codebook cannot keep the zeros of a pruned layer; prune neurons or blocks instead"


@dataclass(frozen=True)
class Codebook(Composed):
    """``dense = scale * sum over books of the entries that the indices name``.

    indices: (n_books, rows, columns) int32 below n_entries: for vectors along the inputs (axis 1) columns are in / length, for
    those along the outputs (axis 0) rows are out / length. books: (n_books, n_entries, length) floating point. scale: (out, 1)
    for axis 1, (1, in) for axis 0. In the file the indices are one stream of bits.
    """

    kind = "codebook"
    tensor_names = ("packed", "books", "scale")
    indices: Tensor
    books: Tensor
    scale: Tensor
    axis: int

    @property
    def length(self) -> int:
        """Entries of a vector."""
        return self.books.shape[2]

    @property
    def shape(self) -> tuple[int, int]:
        _, rows, columns = self.indices.shape
        return (rows, columns * self.length) if self.axis else (rows * self.length, columns)

    @property
    def dtype(self) -> torch.dtype:
        return self.books.dtype

    @property
    def numel(self) -> int:
        return self.indices.numel()

    @property
    def index_bits(self) -> int:
        """Of one index."""
        return (self.books.shape[1] - 1).bit_length()

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        from compress.stored_codebooks import looked_up

        dtype = dtype or self.dtype
        return looked_up(self.indices, self.books.to(dtype), self.axis) * self.scale.to(dtype)

    def split(self, matrix: Tensor) -> Tensor:
        """The vectors of an (out, in) matrix as the indices name them: (rows, columns, length)."""
        if self.axis:
            return matrix.unflatten(1, (-1, self.length))
        return matrix.unflatten(0, (-1, self.length)).transpose(1, 2)

    @property
    def vector_scale(self) -> Tensor:
        """What each vector's entries are multiplied by: (rows, columns)."""
        return self.scale.expand(self.indices.shape[1:])

    def sizes(self) -> dict[str, int]:
        n_books, n_entries, length = self.books.shape
        return {"length": length, "n_books": n_books, "n_entries": n_entries, "axis": self.axis}

    def tensors(self) -> dict[str, Tensor]:
        packed = pack_indices(self.indices, self.index_bits)
        return {"packed": packed, "books": self.books, "scale": self.scale}

    @classmethod
    def assemble(cls, shape, sizes, tensors, children) -> Codebook:
        from compress.stored_codebooks import unpack_indices

        (n_outputs, n_inputs), length, n_books = shape, sizes["length"], sizes["n_books"]
        grid = (n_outputs, n_inputs // length) if sizes["axis"] else (n_outputs // length, n_inputs)
        bits = (sizes["n_entries"] - 1).bit_length()
        indices = unpack_indices(tensors["packed"], bits, n_books * grid[0] * grid[1]).view(n_books, *grid)
        return cls(indices, tensors["books"], tensors["scale"], sizes["axis"])

    def parameters(self) -> dict[str, Tensor]:
        return {"books": self.books, "scale": self.scale}

    def shares(self) -> dict[str, float]:
        """An entry's move is multiplied by the scale, a scale's by the entries: root mean squares stand for both."""
        n_books = len(self.books)
        by_scale = n_books * float(self.scale.float().square().mean().sqrt())
        by_entries = float(self.books.float().square().mean(1).sum(0).mean().sqrt())
        return {"books": 1 / by_scale if by_scale > 0 else 1.0, "scale": 1 / by_entries if by_entries > 0 else 1.0}

    def rebuild(self, parameters: Mapping[str, Tensor]) -> Codebook:
        return replace(self, **parameters)  # type: ignore[type-var]

    def masked(self, mask: Tensor) -> Masked:
        raise ValueError(NO_ZEROS)
