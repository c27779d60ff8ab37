"""Linear layers whose matrices are stacks of parts: signs times low-rank matrices, and bit planes of codes.

Artifacts that need them carry this file beside ``modeling_compress.py``, so it stands alone: torch only.
"""

import torch
from torch import Tensor

from .stored_layers import StoredLinear, bits_of, signs


def signed_sum(packed: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """The matrix (out, in) that is the sum over blocks of signs * (left @ right).

    packed: (blocks, bytes) uint8, a bit for each sign, row by row. left: (blocks, out, rank). right: (blocks, rank, in).
    """
    total = left.new_zeros(left.shape[1], right.shape[2])
    if total.is_meta:
        return total
    for stream, rows, columns in zip(packed, left, right, strict=True):
        total = total + signs(stream, total.numel()).view(total.shape) * (rows @ columns)
    return total


def from_planes(planes: Tensor, count: int) -> Tensor:
    """Signed codes (count,) int8 from their bits, (bits, bytes) uint8, the leading ones first."""
    if planes.is_meta:
        return torch.empty(count, dtype=torch.int8, device="meta")
    codes = torch.full((count,), -(2 ** (len(planes) - 1)), dtype=torch.int16, device=planes.device)
    for place, plane in enumerate(planes.flip(0)):
        codes += bits_of(plane, count).to(torch.int16) << place
    return codes.to(torch.int8)


class SignedLowRankLinear(StoredLinear):
    """Signs times low-rank matrices, added up. priorities: of the blocks but the first, for whoever opens some of them."""

    packed: Tensor
    left: Tensor
    right: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool, n_blocks: int, rank: int, priorities: list,
                 children: dict):  # fmt: skip
        super().__init__(in_features, out_features, bias)
        self.hold("packed", torch.empty(n_blocks, -(-out_features * in_features // 8), dtype=torch.uint8))
        self.hold("left", torch.empty(n_blocks, out_features, rank))
        self.hold("right", torch.empty(n_blocks, rank, in_features))

    def matrix(self) -> Tensor:
        return signed_sum(self.packed, self.left, self.right)


class BitPlanesLinear(StoredLinear):
    """A grid whose codes lie plane by plane: (codes - zero) * scale, with the scale of the widest codes, which are all bits.
    priorities: of the planes behind the narrowest codes, for whoever opens some of them."""

    planes: Tensor
    scale: Tensor
    zero: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool, bits: int, n_widths: int, n_groups: int,
                 priorities: list, children: dict):  # fmt: skip
        super().__init__(in_features, out_features, bias)
        self.hold("planes", torch.empty(bits, -(-out_features * in_features // 8), dtype=torch.uint8))
        self.hold("scale", torch.empty(n_widths, out_features, n_groups))
        self.hold("zero", torch.empty(out_features, n_groups, dtype=torch.int8))

    def matrix(self) -> Tensor:
        scale = self.scale[-1]
        codes = from_planes(self.planes, self.out_features * self.in_features).view(*scale.shape, -1).to(scale.dtype)
        return ((codes - self.zero.to(scale.dtype).unsqueeze(-1)) * scale.unsqueeze(-1)).view(self.out_features, -1)
