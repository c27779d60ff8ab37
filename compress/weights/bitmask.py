"""Sparse matrices that take less room in a file: a bit for every entry, and only those that are kept.

A bit per entry is what an index of two bits for each kept value of a 2:4 mask takes as well, so N:M masks have no container of
their own. (Numbering the six patterns of 2:4 would take 3 bits for 4 entries. It saves a quarter of a bit per weight, 3 % of a
16-bit file and 8 % of a 4-bit one, for a second format.)

In memory such a weight is a mask and what it keeps. Passes know nothing of it: the engine gives them :func:`opened` weights,
which are plain masked matrices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compress.weights.composed import Composed
from compress.weights.grid import Quantized
from compress.weights.matrix import Dense, Masked, Weight
from compress.weights.packing import pack_bits
from compress.weights.parts import Affine


class Bitmasked(Composed):
    """A masked matrix of which the file holds the kept entries, row by row. kept: (out, in) bool."""

    kept: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.kept.shape[0], self.kept.shape[1]

    @property
    def mask(self) -> Tensor:
        return self.kept

    @property
    def bitmap(self) -> Tensor:
        """The mask as the file holds it: (ceil(out * in / 8),) uint8, least significant bit first."""
        return pack_bits(self.kept.to(torch.int8) - 1, 1)

    def masked(self, mask: Tensor) -> Masked:
        return self.opened().masked(mask)

    def opened(self) -> Masked:
        """The same matrix with every entry in its place."""
        raise NotImplementedError(type(self).__name__)


@dataclass(frozen=True)
class Bitmask(Bitmasked):
    """Kept entries as floating-point numbers, ``values`` (count,)."""

    kind = "bitmask"
    tensor_names = ("values", "bitmap")
    values: Tensor
    kept: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        values = self.values.to(dtype or self.dtype)
        return torch.zeros(self.shape, dtype=values.dtype, device=values.device).masked_scatter(self.kept, values)

    @property
    def numel(self) -> int:
        return self.values.numel()

    def opened(self) -> Masked:
        return Masked(Dense(self.dense()), self.kept, self.numel)

    def sizes(self) -> dict[str, int]:
        return {"count": self.numel}

    def tensors(self) -> dict[str, Tensor]:
        return {"values": self.values, "bitmap": self.bitmap}

    @classmethod
    def assemble(cls, shape, sizes, tensors, children) -> Bitmask:
        return cls(tensors["values"], _mask(tensors["bitmap"], shape))

    def parameters(self) -> dict[str, Tensor]:
        return {"values": self.values}

    def rebuild(self, parameters: Mapping[str, Tensor]) -> Bitmask:
        return replace(self, **parameters)


@dataclass(frozen=True)
class BitmaskGrid(Bitmasked):
    """Kept entries on an integer grid: ``dense = (codes - zero_point) * scale``, computed in the dtype that is asked for.

    codes: (count,) int8 in [-2**(bits-1), 2**(bits-1) - 1]. scale: (out, groups) floating point. zero_point: (out, groups)
    int8 in the codes' range, or None for a symmetric grid. In the file codes and zero-points are streams of bits.
    """

    kind = "bitmask_grid"
    tensor_names = ("packed", "bitmap", "scale", "packed_zero")
    codes: Tensor
    kept: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bits: int

    @property
    def dtype(self) -> torch.dtype:
        return self.scale.dtype

    def _grid(self) -> Quantized:
        """All codes in their places, those of zero too. Mixed: so that readers compute in the dtype that they are asked for."""
        zero = (
            torch.zeros(self.scale.shape, dtype=torch.int8, device=self.codes.device)
            if self.zero_point is None
            else self.zero_point
        )
        codes = zero.repeat_interleave(self.shape[1] // zero.shape[1], dim=1).masked_scatter(self.kept, self.codes)
        return Quantized(codes, self.scale, self.zero_point, self.bits, mixed=True)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        return self._grid().dense(dtype)

    @property
    def numel(self) -> int:
        return self.codes.numel()

    def opened(self) -> Masked:
        return Masked(self._grid(), self.kept, self.numel)

    def sizes(self) -> dict[str, int]:
        asymmetric = {} if self.zero_point is None else {"asymmetric": 1}
        return {"count": self.numel, "bits": self.bits, "n_groups": self.scale.shape[1], **asymmetric}

    def tensors(self) -> dict[str, Tensor]:
        zero = self.codes[:0] if self.zero_point is None else self.zero_point
        return {
            "packed": pack_bits(self.codes, self.bits), "bitmap": self.bitmap, "scale": self.scale,
            "packed_zero": pack_bits(zero, self.bits),
        }  # fmt: skip

    @classmethod
    def assemble(cls, shape, sizes, tensors, children) -> BitmaskGrid:
        from compress.stored_layers import unpack_bits

        bits, scale = sizes["bits"], tensors["scale"]
        zero = unpack_bits(tensors["packed_zero"], bits, scale.numel()).view(scale.shape) if "asymmetric" in sizes else None
        codes = unpack_bits(tensors["packed"], bits, sizes["count"])
        return cls(codes, _mask(tensors["bitmap"], shape), scale, zero, bits)

    def parameters(self) -> dict[str, Tensor]:
        return {"scale": self.scale}

    def shares(self) -> dict[str, float]:
        return {"scale": 2.0 ** (1 - self.bits)}

    def rebuild(self, parameters: Mapping[str, Tensor]) -> BitmaskGrid:
        return replace(self, **parameters)


def bitmasked(weight: Weight) -> Weight:
    """A masked matrix of floating-point numbers, or on an integer grid, by a bitmap and what it keeps; the weight itself where
    it is something else, where readers round the layer's inputs, and where that would not be smaller."""
    if not isinstance(weight, Masked) or (weight.kept.is_meta and weight.n_kept is None):
        return weight
    inner, kept, packed = weight.inner, weight.kept, None
    if isinstance(inner, Dense):
        packed = Bitmask(_kept(inner.values, weight), kept)
    elif isinstance(inner, Quantized) and inner.inputs is None:
        packed = BitmaskGrid(_kept(inner.codes, weight), kept, inner.scale, inner.zero_point, inner.bits)
    elif isinstance(inner, Affine) and not inner.zero.is_floating_point():
        packed = BitmaskGrid(_kept(inner.codes, weight), kept, inner.scale, inner.zero, inner.bits)
    return packed if packed is not None and packed.nbytes < weight.nbytes else weight


def opened(weight: Weight) -> Weight:
    """The same weight with masked matrices in the place of bitmasks, also in its factors and parts."""
    if isinstance(weight, Bitmasked):
        return weight.opened()
    if not isinstance(weight, Composed):
        return weight
    children = weight.children()
    loose = {name: opened(part) for name, part in children.items()}
    if all(part is children[name] for name, part in loose.items()):
        return weight
    return type(weight).assemble(weight.shape, weight.sizes(), weight.tensors(), loose)


def _kept(entries: Tensor, weight: Masked) -> Tensor:
    return entries.new_empty(weight.numel) if weight.kept.is_meta else entries[weight.kept]


def _mask(bitmap: Tensor, shape: tuple[int, int]) -> Tensor:
    from compress.stored_layers import bits_of

    return bits_of(bitmap, shape[0] * shape[1]).bool().view(shape)
