"""Matrices that can be opened at several sizes: parts in a fixed order, of which the first few are a coarser matrix."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from compress.weights.composed import Composed, leaves, unmasked
from compress.weights.grid import Quantized
from compress.weights.matrix import Masked, Weight
from compress.weights.packing import pack_indices
from compress.weights.parts import PackedGrid

NO_ZEROS = "signs have no zero to keep the zeros of a pruned layer by; prune neurons or blocks instead"


class Stack(Composed):
    """A matrix in parts, each of which brings it nearer to what it was.

    priorities: of each part but the first, which is opened in any case; falling. Over all layers, parts are to be taken in the
    order of falling priority. The artifact keeps them with the layer, in ``config.json`` under ``compress_modules``.
    """

    joint: ClassVar[bool] = False
    """Whether layers that share an input are to be opened alike, as fused runtimes need it."""
    priorities: tuple[float, ...]

    @property
    @abstractmethod
    def n_parts(self) -> int:
        """How many parts there are, at least one."""

    @property
    def widths(self) -> range | None:
        """The bits of a code with the first part, with the first two, ...; None where parts are no bits of codes."""
        return None

    @abstractmethod
    def prefix(self, count: int) -> Weight:
        """The matrix of the first ``count`` parts, 1 to :attr:`n_parts`. It may have meta tensors."""


def stacks(weight: Weight) -> list[Stack]:
    """The stacks in a weight: itself, its factors or parts."""
    found = (unmasked(leaf) for _, leaf in leaves("", weight))
    return [leaf for leaf in found if isinstance(leaf, Stack)]


def prefix(weight: Weight, count: int) -> Weight:
    """The same weight with the first ``count`` parts of every stack in it, or all where it has fewer."""
    if isinstance(weight, Masked):
        return replace(weight, inner=prefix(weight.inner, count))
    if isinstance(weight, Stack):
        return weight.prefix(min(count, weight.n_parts))
    if isinstance(weight, Composed) and weight.children():
        children = {name: prefix(part, count) for name, part in weight.children().items()}
        return type(weight).assemble(weight.shape, weight.sizes(), weight.tensors(), children)
    return weight


@dataclass(frozen=True)
class SignedLowRank(Stack):
    """A sum of blocks, each the signs of a matrix times a low-rank matrix: ``dense = sum of signs * (left @ right)``.

    packed: (blocks, ceil(out * in / 8)) uint8, the signs row by row, least bit first, a set bit is +1. left: (blocks, out, rank),
    right: (blocks, rank, in), floating point. A prefix is of the same kind.
    """

    kind = "signed_low_rank"
    tensor_names = ("packed", "left", "right")
    packed: Tensor
    left: Tensor
    right: Tensor
    priorities: tuple[float, ...] = ()

    @property
    def shape(self) -> tuple[int, int]:
        return self.left.shape[1], self.right.shape[2]

    @property
    def dtype(self) -> torch.dtype:
        return self.left.dtype

    @property
    def rank(self) -> int:
        """Of a block's magnitudes; the matrix itself has any."""
        return self.left.shape[2]

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def n_parts(self) -> int:
        return len(self.packed)

    def prefix(self, count: int) -> SignedLowRank:
        packed, left, right = (tensor[:count].contiguous() for tensor in (self.packed, self.left, self.right))
        return SignedLowRank(packed, left, right, self.priorities[: count - 1])

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        from compress.stored_stacks import signed_sum

        dtype = dtype or self.dtype
        return signed_sum(self.packed, self.left.to(dtype), self.right.to(dtype))

    def sizes(self) -> dict[str, object]:
        return {"n_blocks": self.n_parts, "rank": self.rank, "priorities": list(self.priorities)}

    def tensors(self) -> dict[str, Tensor]:
        return {"packed": self.packed, "left": self.left, "right": self.right}

    @classmethod
    def assemble(cls, shape, sizes, tensors, children) -> SignedLowRank:
        return cls(tensors["packed"], tensors["left"], tensors["right"], tuple(sizes["priorities"]))

    def parameters(self) -> dict[str, Tensor]:
        return {"left": self.left, "right": self.right}

    def rebuild(self, parameters: Mapping[str, Tensor]) -> SignedLowRank:
        return replace(self, **parameters)

    def masked(self, mask: Tensor) -> Masked:
        raise ValueError(NO_ZEROS)


@dataclass(frozen=True)
class BitPlanes(PackedGrid, Stack):
    """Integer grids of several widths whose codes are the leading bits of one another's: with all ``bits`` planes ``dense =
    (codes - zero) * scale[-1]``, and each plane less halves codes and zeros, rounding down.

    codes: (out, in) int8 in [-2**(bits-1), 2**(bits-1) - 1]. scale: (widths, out, groups) floating point, those of the
    narrowest codes first. zero: (out, groups) int8 in the codes' range. In the file the codes lie plane by plane, the leading
    bits first, so that less of it is a smaller file. The first part is the narrowest codes, each other one a plane; a prefix is a
    plain grid, that of the codes as they are.
    """

    kind = "bit_planes"
    tensor_names = ("planes", "scale", "zero")
    joint = True
    codes: Tensor
    scale: Tensor
    zero: Tensor
    bits: int
    priorities: tuple[float, ...] = ()

    @property
    def n_parts(self) -> int:
        return len(self.scale)

    @property
    def widths(self) -> range:
        return range(self.bits - self.n_parts + 1, self.bits + 1)

    def prefix(self, count: int) -> Quantized:
        width = self.widths[count - 1]
        codes, zero = (tensor >> (self.bits - width) for tensor in (self.codes, self.zero))
        return Quantized(codes, self.scale[count - 1].contiguous(), zero, width)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        dtype, scale = dtype or self.dtype, self.scale[-1]
        codes = self.codes.unflatten(1, (scale.shape[1], -1)).to(dtype) - self.zero.to(dtype).unsqueeze(-1)
        return (codes * scale.to(dtype).unsqueeze(-1)).flatten(1)

    def sizes(self) -> dict[str, object]:
        n_widths, _, n_groups = self.scale.shape
        return {"bits": self.bits, "n_widths": n_widths, "n_groups": n_groups, "priorities": list(self.priorities)}

    def tensors(self) -> dict[str, Tensor]:
        places = range(self.bits - 1, -1, -1)
        if self.codes.is_meta:
            planes = torch.empty(self.bits, -(-self.codes.numel() // 8), dtype=torch.uint8, device="meta")
        else:
            unsigned = self.codes.int() + 2 ** (self.bits - 1)
            planes = torch.stack([pack_indices((unsigned >> place) & 1, 1) for place in places])
        return {"planes": planes, "scale": self.scale, "zero": self.zero}

    @classmethod
    def assemble(cls, shape, sizes, tensors, children) -> BitPlanes:
        from compress.stored_stacks import from_planes

        codes = from_planes(tensors["planes"], shape[0] * shape[1]).view(shape)
        return cls(codes, tensors["scale"], tensors["zero"], sizes["bits"], tuple(sizes["priorities"]))

    def parameters(self) -> dict[str, Tensor]:
        return {"scale": self.scale}

    def shares(self) -> dict[str, float]:
        return {"scale": 2.0 ** (1 - self.bits)}

    def masked(self, mask: Tensor) -> Masked:
        zero = self.zero.repeat_interleave(self.shape[1] // self.zero.shape[1], dim=1)
        return Masked(replace(self, codes=torch.where(mask, self.codes, zero)), mask)
