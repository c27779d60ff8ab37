"""Matrices of signs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.weights.matrix import Masked
from compress.weights.packing import pack_bits
from compress.weights.parts import PackedGrid

NO_ZEROS = "a sign is never zero, so that binary weights cannot keep the zeros of a pruned layer; prune neurons or blocks instead"


@dataclass(frozen=True)
class Binary(PackedGrid):
    """Signs times scales, in blocks of consecutive columns: of a row's weights in a block, those near their mean share a scale,
    those in the tails another one, and those in the block's salient columns are a sum of two signs with a scale each.

    codes: (out, in) int8, 0 to 3. The low bit is the sign, 1 for plus; the high bit says that a weight is in the tails, or in a
    salient column, is the second sign. So every weight takes two bits. salient: (in,) bool, in the file a bit each. scale: (out,
    blocks, 4) floating point: near, in the tails, first and second of the salient ones. mean: (out, blocks, 3), what these
    three kinds are counted from, or None: zero. block_size: columns of a block; the last may be narrower.
    """

    kind = "binary"
    tensor_names = ("packed", "salient", "scale", "mean")
    bits = 2
    codes: Tensor
    salient: Tensor
    scale: Tensor
    mean: Tensor | None
    block_size: int

    def levels(self, dtype: torch.dtype) -> Tensor:
        """What codes stand for, as a reader computes it in ``dtype``: (out, blocks, 8), those of salient columns last."""
        from compress.stored_binary import levels

        return levels(self.scale.to(dtype), None if self.mean is None else self.mean.to(dtype))

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        from compress.stored_binary import looked_up

        return looked_up(self.codes, self.salient, self.levels(dtype or self.dtype), self.block_size)

    def sizes(self) -> dict[str, int]:
        return {"block_size": self.block_size, "centred": int(self.mean is not None)}

    def tensors(self) -> dict[str, Tensor]:
        return {
            "packed": pack_bits(self.codes - 2, 2),
            "salient": pack_bits(self.salient.to(torch.int8) - 1, 1),
            "scale": self.scale,
            "mean": self.scale[..., :0] if self.mean is None else self.mean,
        }

    @classmethod
    def assemble(cls, shape, sizes, tensors, children) -> Binary:
        from compress.stored_layers import bits_of, unpack_bits

        codes = unpack_bits(tensors["packed"], 2, shape[0] * shape[1]).view(shape) + 2
        salient = bits_of(tensors["salient"], shape[1]).bool()
        return cls(codes, salient, tensors["scale"], tensors["mean"] if sizes["centred"] else None, sizes["block_size"])

    def parameters(self) -> dict[str, Tensor]:
        return {"scale": self.scale} | ({} if self.mean is None else {"mean": self.mean})

    def masked(self, mask: Tensor) -> Masked:
        raise ValueError(NO_ZEROS)
