"""Embeddings on a grid: tables that are looked up row by row, and that a tied head multiplies by."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.weights.packing import pack_bits
from compress.weights.parts import PackedGrid


@dataclass(frozen=True)
class Table(PackedGrid):
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
