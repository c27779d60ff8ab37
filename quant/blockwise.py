"""What the 4-bit number formats of bitsandbytes share: blocks of the flattened matrix, each with its largest weight as scale."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from compress.passes import LinearPass
from compress.stats import LinearStats
from compress.weights import Masked, Weight
from compress.weights.blockwise import NESTED_BLOCK, Blockwise, bitsandbytes

_TYPICAL_OFFSET = 0.03125762194395065  # a plan cannot know the mean scale: one with as many digits as most


class FourBit(LinearPass):
    """Base of the methods that let bitsandbytes round to one of its 4-bit codebooks; the tensors are that library's own."""

    kind: ClassVar[str]

    block_size: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = Field(64, description="consecutive weights that share a scale")
    double_quant: bool = Field(False, description="round the scales to 8 bits too: 0.37 bits a weight less with blocks of 64")
    compute_dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="what readers multiply in; bfloat16 is faster where the device has it"
    )

    def linear(self, weight: Tensor, stats: LinearStats, mask: Tensor | None) -> Weight:
        values = weight if mask is None else weight * mask
        values = values if values.dtype != torch.float64 else values.float()
        if not bool(values.isfinite().all()):
            raise ValueError("cannot quantize: the weight has entries that are not finite")
        packed, state = bitsandbytes().quantize_4bit(
            values.contiguous(), blocksize=self.block_size, compress_statistics=self.double_quant, quant_type=self.kind,
            quant_storage=torch.uint8,
        )  # fmt: skip
        codes = torch.stack([packed >> 4, packed & 15], -1).flatten()[: weight.numel()].reshape(weight.shape)
        nested = (state.state2.absmax, state.state2.code, float(state.offset)) if state.nested else (None, None, 0.0)
        computes_in = getattr(torch, self.compute_dtype)
        quantized = Blockwise(
            codes, state.absmax, state.code, self.kind, self.block_size, values.dtype, computes_in, *nested
        )  # fmt: skip
        return quantized if mask is None else quantized.masked(mask)

    def outline(self, weight: Tensor, stats: LinearStats, mask: Tensor | None) -> Weight:
        bitsandbytes()  # its absence is the user's to know before anything is computed
        n_blocks = -(-weight.numel() // self.block_size)
        stored = weight.dtype if weight.dtype != torch.float64 else torch.float32
        nested = (_meta(-(-n_blocks // NESTED_BLOCK)), _meta(256), _TYPICAL_OFFSET) if self.double_quant else (None, None, 0.0)
        quantized = Blockwise(
            _meta(*weight.shape, dtype=torch.uint8), _meta(n_blocks, dtype=torch.uint8 if self.double_quant else torch.float32),
            _meta(16), self.kind, self.block_size, stored, getattr(torch, self.compute_dtype), *nested,
        )  # fmt: skip
        return quantized if mask is None else Masked(quantized, mask.to("meta"))


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
