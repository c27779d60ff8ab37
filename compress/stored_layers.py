"""Linear layers whose matrices are worked out from tensors of their own: packed codes, sparse values, bitmaps.

Artifacts that need them carry this file beside ``modeling_compress.py``, so it stands alone: torch only.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """Signed codes (count,) int8 in [-2**(bits-1), 2**(bits-1) - 1] from a stream of bits, (bytes,) uint8, least first."""
    if packed.is_meta:
        return torch.empty(count, dtype=torch.int8, device="meta")
    stream = bits_of(packed, count * bits)
    weights = 1 << torch.arange(bits, dtype=torch.int16, device=packed.device)
    return ((stream.view(count, bits) * weights).sum(1) - 2 ** (bits - 1)).to(torch.int8)


def bits_of(packed: Tensor, count: int) -> Tensor:
    """The first bits of a stream, (count,) uint8, 0 or 1."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(-1) >> shifts) & 1).flatten()[:count]


def signs(packed: Tensor, count: int) -> Tensor:
    """Signs (count,) int8, -1 or 1, from a stream of bits, (bytes,) uint8, least first: a set bit is 1."""
    return unpack_bits(packed, 1, count) * 2 + 1


def spread(x: Tensor) -> Tensor:
    """x Q along the last dimension, for the orthonormal, symmetric Q (so its own inverse) that spreads every entry over all.

    Q is the Kronecker product of a Hartley matrix, of the length's odd part, and a Walsh-Hadamard matrix: it exists for
    every length and needs no table. Computed in at least float32, in O(n (odd + log n)) for each row.
    """
    n = x.shape[-1]
    odd = n // (n & -n)
    y = (x if x.dtype == torch.float64 else x.float()).unflatten(-1, (odd, n // odd))
    if odd > 1:
        steps = torch.arange(odd, device=x.device)
        angles = (torch.outer(steps, steps) % odd).to(y.dtype) * (2 * torch.pi / odd)
        y = (angles.cos() + angles.sin()) @ y
    for _ in range((n // odd).bit_length() - 1):  # each round turns the digits of the index once, so all of them come home
        first, second = y.unflatten(-1, (2, -1)).unbind(-2)
        y = torch.stack((first + second, first - second), -1).flatten(-2)
    return (y.flatten(-2) * n**-0.5).to(x.dtype)


def tensor_train(cores: list[Tensor], rows: Sequence[int], columns: Sequence[int]) -> Tensor:
    """The matrix (product of rows, product of columns) of a chain of cores, (m_i * bond after, bond before * n_i) each."""
    total = cores[0].new_ones(1, 1, 1)  # outputs, bond, inputs
    for core, m, n in zip(cores, rows, columns, strict=True):
        core = core.view(m, len(core) // m, total.shape[1], n)
        total = torch.einsum("obi,mabn->omain", total, core).flatten(3).flatten(0, 1)
    return total.squeeze(1)


def row_trains(values: Tensor, digits: Sequence[int], bonds: Sequence[int]) -> Tensor:
    """The rows (n, product of digits) of chains of cores, (bond before, digit, bond after) each, that lie one after the other in
    a row of values (n, numbers)."""
    total, start = values[:, :0], 0
    for size, before, after in zip(digits, [1, *bonds], [*bonds, 1], strict=True):
        core = values[:, start : start + before * size * after].reshape(-1, before, size * after)
        total = (total @ core if start else core).reshape(len(values), -1, after)
        start += before * size * after
    return total.squeeze(2)


class StoredLinear(nn.Module):
    """A linear layer whose matrix is worked out from its own tensors whenever it is used."""

    bias: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, bias: bool):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def hold(self, name: str, tensor: Tensor) -> None:
        """Keep a tensor of the file: a parameter where it is of floats, which libraries look for to tell a module's dtype."""
        if tensor.is_floating_point():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        else:
            self.register_buffer(name, tensor)

    def matrix(self) -> Tensor:
        """The (out, in) matrix."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in) -> (..., out)."""
        return nn.functional.linear(x, self.matrix(), self.bias)


class OutlierLinear(StoredLinear):
    """A sparse matrix: values (count,) at columns (count,), those of row i from row_starts[i] to row_starts[i + 1]."""

    values: Tensor
    columns: Tensor
    row_starts: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool, count: int, children: dict):
        super().__init__(in_features, out_features, bias)
        self.hold("values", torch.empty(count))
        self.hold("columns", torch.empty(count, dtype=torch.int16 if in_features <= 1 << 15 else torch.int32))
        self.hold("row_starts", torch.empty(out_features + 1, dtype=torch.int32))

    def matrix(self) -> Tensor:
        counts = (self.row_starts[1:] - self.row_starts[:-1]).long()
        rows = torch.arange(self.out_features, device=counts.device).repeat_interleave(counts)
        dense = self.values.new_zeros(self.out_features, self.in_features)
        return dense.index_put_((rows, self.columns.long()), self.values)


class ColumnLinear(StoredLinear):
    """A matrix of few columns that are not zero: values (out, count) at the inputs ``indices`` (count,)."""

    values: Tensor
    indices: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool, count: int, children: dict):
        super().__init__(in_features, out_features, bias)
        self.hold("values", torch.empty(out_features, count))
        self.hold("indices", torch.empty(count, dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x.index_select(-1, self.indices), self.values, self.bias)


class RowLinear(StoredLinear):
    """A matrix of few rows that are not zero: values (count, in) of the outputs ``indices`` (count,)."""

    values: Tensor
    indices: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool, count: int, children: dict):
        super().__init__(in_features, out_features, bias)
        self.hold("values", torch.empty(count, in_features))
        self.hold("indices", torch.empty(count, dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.linear(x, self.values)
        y = y.new_zeros(*x.shape[:-1], self.out_features).index_copy(-1, self.indices.long(), y)
        return y if self.bias is None else y + self.bias


class AffineLinear(StoredLinear):
    """A grid with fractional zeros: (codes - zero) * scale, with a scale and a zero per group of inputs of a row; whole: the
    zeros are integers."""

    packed: Tensor
    scale: Tensor
    zero: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool, bits: int, n_groups: int, children: dict, whole: int = 0):
        super().__init__(in_features, out_features, bias)
        self.bits = bits
        self.hold("packed", torch.empty(-(-out_features * in_features * bits // 8), dtype=torch.uint8))
        self.hold("scale", torch.empty(out_features, n_groups))
        self.hold("zero", torch.empty(out_features, n_groups, dtype=torch.int8 if whole else None))

    def matrix(self) -> Tensor:
        codes = unpack_bits(self.packed, self.bits, self.out_features * self.in_features)
        codes = codes.view(*self.scale.shape, -1).to(self.scale.dtype)
        zero, scale = self.zero.to(codes.dtype).unsqueeze(-1), self.scale.unsqueeze(-1)
        return ((codes - zero) * scale).view(self.out_features, self.in_features)


class BilevelLinear(StoredLinear):
    """A grid with integer zeros per group of inputs of a row, whose scales are base + code * step for every 16 rows."""

    packed: Tensor
    packed_zero: Tensor
    packed_scale: Tensor
    base: Tensor
    step: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool, bits: int, n_groups: int, children: dict):
        super().__init__(in_features, out_features, bias)
        self.bits, self.n_grids = bits, out_features * n_groups
        self.hold("packed", torch.empty(-(-out_features * in_features * bits // 8), dtype=torch.uint8))
        self.hold("packed_zero", torch.empty(-(-self.n_grids * bits // 8), dtype=torch.uint8))
        self.hold("packed_scale", torch.empty(-(-self.n_grids * 3 // 8), dtype=torch.uint8))
        self.hold("base", torch.empty(-(-out_features // 16), n_groups))
        self.hold("step", torch.empty(-(-out_features // 16), n_groups))

    def matrix(self) -> Tensor:
        codes = unpack_bits(self.packed, self.bits, self.out_features * self.in_features)
        zero = unpack_bits(self.packed_zero, self.bits, self.n_grids)
        scale_codes = (unpack_bits(self.packed_scale, 3, self.n_grids) + 4).view(self.out_features, -1)
        rows = torch.arange(self.out_features, device=codes.device) // 16
        scale = self.base[rows] + scale_codes.to(self.base.dtype) * self.step[rows]
        codes, zero = (part.view(*scale.shape, -1).to(scale.dtype) for part in (codes, zero))
        return ((codes - zero) * scale.unsqueeze(-1)).view(self.out_features, self.in_features)


class OpenedLinear(StoredLinear):
    """A layer whose matrix is worked out once, when it is first used: from then on it computes as fast as a dense layer, and
    takes that much more memory; what is saved stays as it is."""

    opened: Any = None

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self.opened = None  # moving and casting give the same parameters other contents
        return super()._apply(*args, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        held = [tensor for tensor in (*self.parameters(), *self.buffers()) if tensor is not self.bias]
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in held):
            return super().forward(x)
        state = [(id(tensor), 0 if tensor.is_inference() else tensor._version) for tensor in held]
        if self.opened is None or self.opened[1] != state:
            with torch.inference_mode(False), torch.no_grad():
                self.opened = held, state, self.matrix()  # holding the tensors, so that no other gets their ids
        return nn.functional.linear(x, self.opened[2], self.bias)


class BitmaskLinear(OpenedLinear):
    """A sparse matrix: a bitmap, and the kept entries (count,) row by row."""

    values: Tensor
    bitmap: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool, count: int, children: dict):
        super().__init__(in_features, out_features, bias)
        self.hold("bitmap", torch.empty(-(-out_features * in_features // 8), dtype=torch.uint8))
        self.hold_entries(count)

    def hold_entries(self, count: int) -> None:
        self.hold("values", torch.empty(count))

    def placed(self, entries: Tensor, elsewhere: Tensor) -> Tensor:
        """The matrix (out, in) of these entries where the bitmap is set."""
        kept = bits_of(self.bitmap, self.out_features * self.in_features).bool()
        return elsewhere.masked_scatter(kept.view(self.out_features, self.in_features), entries)

    def matrix(self) -> Tensor:
        return self.placed(self.values, self.values.new_zeros(self.out_features, self.in_features))


class BitmaskGridLinear(BitmaskLinear):
    """A sparse matrix on a grid: (codes - zero) * scale, with a scale and a zero, which is 0 unless asymmetric, per group of
    inputs of a row."""

    packed: Tensor
    scale: Tensor
    packed_zero: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool, count: int, bits: int, n_groups: int, children: dict,
                 asymmetric: int = 0):  # fmt: skip
        self.count, self.bits, self.n_groups, self.asymmetric = count, bits, n_groups, asymmetric
        super().__init__(in_features, out_features, bias, count, children)

    def hold_entries(self, count: int) -> None:
        self.hold("packed", torch.empty(-(-count * self.bits // 8), dtype=torch.uint8))
        self.hold("scale", torch.empty(self.out_features, self.n_groups))
        n_zeros = self.out_features * self.n_groups * self.asymmetric
        self.hold("packed_zero", torch.empty(-(-n_zeros * self.bits // 8), dtype=torch.uint8))

    def matrix(self) -> Tensor:
        zero = torch.zeros(self.scale.shape, dtype=torch.int8, device=self.scale.device)
        if self.asymmetric:
            zero = unpack_bits(self.packed_zero, self.bits, self.scale.numel()).view(self.scale.shape)
        codes = unpack_bits(self.packed, self.bits, self.count)
        codes = self.placed(codes, zero.repeat_interleave(self.in_features // self.n_groups, dim=1))
        dtype, scale = self.scale.dtype, self.scale.unsqueeze(-1)
        codes = codes.view(*self.scale.shape, -1).to(dtype) - zero.to(dtype).unsqueeze(-1)
        return (codes * scale).view(self.out_features, self.in_features)
