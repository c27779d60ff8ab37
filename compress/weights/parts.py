"""Parts of sums, and grids that no standard format knows: outliers, whole rows or columns, grids with a fractional zero."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compress.weights.composed import Composed
from compress.weights.matrix import Masked
from compress.weights.packing import pack_bits


class SparsePart(Composed):
    """A matrix of few entries that are not zero. values: these, floating point."""

    values: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def numel(self) -> int:
        return self.values.numel()

    def parameters(self) -> dict[str, Tensor]:
        return {"values": self.values}

    def rebuild(self, parameters: Mapping[str, Tensor]) -> SparsePart:
        return replace(self, **parameters)  # type: ignore[type-var]


class PackedGrid(Composed):
    """A grid of its own module. codes: (out, in) int8, in the file a stream of bits; bits: per code."""

    codes: Tensor
    bits: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.parameters().values())).dtype

    @property
    def numel(self) -> int:
        return self.codes.numel()

    @property
    def values_nbytes(self) -> float:
        return self.numel * self.bits / 8

    def rebuild(self, parameters: Mapping[str, Tensor]) -> PackedGrid:
        return replace(self, **parameters)  # type: ignore[type-var]


@dataclass(frozen=True)
class Outliers(SparsePart):
    """A sparse matrix, row by row. values: (count,) floating point; columns: (count,) int16, or int32 where a matrix has
    more than 32768 inputs; row_starts: (out + 1,) int32; n_inputs: its width."""

    kind = "outliers"
    tensor_names = ("values", "columns", "row_starts")
    values: Tensor
    columns: Tensor
    row_starts: Tensor
    n_inputs: int

    @classmethod
    def of(cls, matrix: Tensor, where: Tensor) -> Outliers:
        """The entries of a matrix (out, in) at which ``where`` (out, in) is True."""
        columns = where.nonzero()[:, 1].to(index_dtype(matrix.shape[1]))
        row_starts = torch.zeros(len(matrix) + 1, dtype=torch.int32, device=matrix.device)
        row_starts[1:] = where.sum(1).cumsum(0)
        return cls(matrix[where], columns, row_starts, matrix.shape[1])

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.row_starts) - 1, self.n_inputs

    def _rows(self) -> Tensor:
        counts = (self.row_starts[1:] - self.row_starts[:-1]).long()
        return torch.arange(len(counts), device=counts.device).repeat_interleave(counts)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        dense = torch.zeros(self.shape, dtype=dtype or self.dtype, device=self.values.device)
        if dense.is_meta:
            return dense
        return dense.index_put((self._rows(), self.columns.long()), self.values.to(dense.dtype))

    @property
    def mask(self) -> Tensor:
        where = torch.zeros(self.shape, dtype=torch.bool, device=self.values.device)
        if not where.is_meta:
            where[self._rows(), self.columns.long()] = True
        return where

    def sizes(self) -> dict[str, int]:
        return {"count": len(self.values)}

    def tensors(self) -> dict[str, Tensor]:
        return {"values": self.values, "columns": self.columns, "row_starts": self.row_starts}

    @classmethod
    def assemble(cls, shape, sizes, tensors, children) -> Outliers:
        return cls(tensors["values"], tensors["columns"], tensors["row_starts"], shape[1])


@dataclass(frozen=True)
class Columns(SparsePart):
    """Some whole input columns of a matrix, the others zero. values: (out, count) floating point; indices: (count,) int32,
    ascending; n_inputs: the matrix's width."""

    kind = "columns"
    tensor_names = ("values", "indices")
    values: Tensor
    indices: Tensor
    n_inputs: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.n_inputs

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        dense = torch.zeros(self.shape, dtype=dtype or self.dtype, device=self.values.device)
        return dense.index_copy(1, self.indices.long(), self.values.to(dense.dtype))

    @property
    def mask(self) -> Tensor:
        return self.dense() != 0

    def sizes(self) -> dict[str, int]:
        return {"count": self.values.shape[1]}

    def tensors(self) -> dict[str, Tensor]:
        return {"values": self.values, "indices": self.indices}

    @classmethod
    def assemble(cls, shape, sizes, tensors, children) -> Columns:
        return cls(tensors["values"], tensors["indices"], shape[1])


@dataclass(frozen=True)
class Rows(SparsePart):
    """Some whole output rows of a matrix, the others zero. values: (count, in) floating point; indices: (count,) int32,
    ascending; n_outputs: the matrix's height."""

    kind = "rows"
    tensor_names = ("values", "indices")
    values: Tensor
    indices: Tensor
    n_outputs: int

    @classmethod
    def of(cls, matrix: Tensor, where: Tensor) -> Rows:
        """The rows of a matrix (out, in) at which ``where`` (out,) is True."""
        return cls(matrix[where], where.nonzero().flatten().to(torch.int32), len(matrix))

    @property
    def shape(self) -> tuple[int, int]:
        return self.n_outputs, self.values.shape[1]

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        dense = torch.zeros(self.shape, dtype=dtype or self.dtype, device=self.values.device)
        return dense.index_copy(0, self.indices.long(), self.values.to(dense.dtype))

    @property
    def mask(self) -> Tensor:
        where = torch.zeros(self.shape, dtype=torch.bool, device=self.values.device)
        return where.index_fill(0, self.indices.long(), True)

    def sizes(self) -> dict[str, int]:
        return {"count": len(self.values)}

    def tensors(self) -> dict[str, Tensor]:
        return {"values": self.values, "indices": self.indices}

    @classmethod
    def assemble(cls, shape, sizes, tensors, children) -> Rows:
        return cls(tensors["values"], tensors["indices"], shape[0])


@dataclass(frozen=True)
class Affine(PackedGrid):
    """An integer grid whose zero-points are fractions: ``dense = (codes - zero) * scale``.

    codes: (out, in) int8 in [-2**(bits-1), 2**(bits-1) - 1]. scale: (out, groups) floating point. zero: (out, groups) of the
    same dtype, or int8 in the codes' range: zero is not on a fractional grid, so a mask rounds its zero-points, and training
    leaves such as they are. In the file the codes are one stream of bits.
    """

    kind = "affine"
    tensor_names = ("packed", "scale", "zero")
    codes: Tensor
    scale: Tensor
    zero: Tensor
    bits: int

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or self.dtype
        codes = self.codes.unflatten(1, (self.scale.shape[1], -1)).to(dtype)
        return ((codes - self.zero.to(dtype).unsqueeze(-1)) * self.scale.to(dtype).unsqueeze(-1)).flatten(1)

    def sizes(self) -> dict[str, int]:
        whole = {} if self.zero.is_floating_point() else {"whole": 1}
        return {"bits": self.bits, "n_groups": self.scale.shape[1], **whole}

    def tensors(self) -> dict[str, Tensor]:
        return {"packed": pack_bits(self.codes, self.bits), "scale": self.scale, "zero": self.zero}

    @classmethod
    def assemble(cls, shape, sizes, tensors, children) -> Affine:
        from compress.stored_layers import unpack_bits

        codes = unpack_bits(tensors["packed"], sizes["bits"], shape[0] * shape[1]).reshape(shape)
        return cls(codes, tensors["scale"], tensors["zero"], sizes["bits"])

    def parameters(self) -> dict[str, Tensor]:
        return {"scale": self.scale} | ({"zero": self.zero} if self.zero.is_floating_point() else {})

    def shares(self) -> dict[str, float]:
        return {"scale": 2.0 ** (1 - self.bits), "zero": 1.0}

    def masked(self, mask: Tensor) -> Masked:
        low, high = -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1
        zero = self.zero.float().round().clamp(low, high).to(torch.int8)
        codes = torch.where(mask, self.codes, zero.repeat_interleave(self.shape[1] // zero.shape[1], dim=1))
        return Masked(replace(self, codes=codes, zero=zero), mask)


def index_dtype(n_inputs: int) -> torch.dtype:
    """The narrowest signed integer type that numbers the inputs of a matrix."""
    return torch.int16 if n_inputs <= 1 << 15 else torch.int32
