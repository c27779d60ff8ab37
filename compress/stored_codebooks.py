"""Linear layers whose matrices are vectors looked up in codebooks.

Artifacts that need them carry this file beside ``modeling_compress.py``, so it stands alone: torch only.
"""

import torch
from torch import Tensor

from .stored_layers import OpenedLinear, bits_of


def unpack_indices(packed: Tensor, bits: int, count: int) -> Tensor:
    """Indices (count,) int32 in [0, 2**bits) from a stream of bits, (bytes,) uint8, least first."""
    if packed.is_meta:
        return torch.empty(count, dtype=torch.int32, device="meta")
    stream = bits_of(packed, count * bits).view(count, bits)
    indices = torch.zeros(count, dtype=torch.int32, device=packed.device)
    for place in range(bits):
        indices += stream[:, place].to(torch.int32) << place
    return indices


def looked_up(indices: Tensor, books: Tensor, axis: int) -> Tensor:
    """The matrix (out, in) of which each vector is the sum of one entry of every book.

    indices: (n_books, rows, columns) integers. books: (n_books, n_entries, length). axis: along which the vectors lie: 1: columns
    are in / length; 0: rows are out / length.
    """
    total = books[0][indices[0].long()]
    for book, chosen in zip(books[1:], indices[1:], strict=True):
        total = total + book[chosen.long()]
    return total.flatten(1) if axis else total.transpose(1, 2).flatten(0, 1)


class CodebookLinear(OpenedLinear):
    """Sums of vectors from codebooks, times a scale: (out, 1) for vectors along the inputs (axis 1), (1, in) for those along
    the outputs (axis 0)."""

    packed: Tensor
    books: Tensor
    scale: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool, length: int, n_books: int, n_entries: int, axis: int,
                 children: dict):  # fmt: skip
        super().__init__(in_features, out_features, bias)
        self.axis, self.bits = axis, (n_entries - 1).bit_length()
        rows, columns = (out_features, in_features // length) if axis else (out_features // length, in_features)
        self.grid = (n_books, rows, columns)
        self.hold("packed", torch.empty(-(-n_books * rows * columns * self.bits // 8), dtype=torch.uint8))
        self.hold("books", torch.empty(n_books, n_entries, length))
        self.hold("scale", torch.empty((out_features, 1) if axis else (1, in_features)))

    def matrix(self) -> Tensor:
        n_books, rows, columns = self.grid
        indices = unpack_indices(self.packed, self.bits, n_books * rows * columns).view(self.grid)
        return looked_up(indices, self.books, self.axis) * self.scale
