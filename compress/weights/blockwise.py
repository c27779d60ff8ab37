"""The grids of bitsandbytes: 4-bit codes of a codebook in blocks of the flattened matrix, and 8-bit rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from compress.errors import BadInput
from compress.weights.grid import Coded
from compress.weights.matrix import Masked

NESTED_BLOCK = 256
"""Blocks whose doubly quantized scales share a scale."""
_STEP = 7.874015718698502e-3  # 1 / 127, as bitsandbytes writes it


def bitsandbytes() -> Any:
    """The library's functions. Raises :class:`BadInput` where it is not installed."""
    try:
        return import_module("bitsandbytes.functional")
    except ImportError:
        raise BadInput("bitsandbytes is not installed: pip install 'compress-lm[bitsandbytes]'") from None


def is_misread(shape: tuple[int, int], block_size: int) -> bool:
    """Whether the library cannot be trusted with a 4-bit matrix (out, in) on this machine's processor: where it uses AVX-512,
    0.50 decodes rows that do not end with a block to other values, and, with bfloat16 instructions, refuses them, and numbers of
    rows that 32 does not divide."""
    refuses = getattr(bitsandbytes(), "has_avx512bf16", lambda: False)()
    return bool((shape[1] % block_size and (refuses or _misdecodes())) or (shape[0] % 32 and refuses))


@cache
def _misdecodes() -> bool:
    functions, matrix = bitsandbytes(), torch.linspace(-1, 1, 4 * 96).view(4, 96)
    by_rows, in_one = (
        functions.dequantize_4bit(*functions.quantize_4bit(form, blocksize=64)) for form in (matrix, matrix.view(1, -1))
    )
    return not by_rows.flatten().equal(in_one.flatten())


@dataclass(frozen=True)
class Blockwise(Coded):
    """4-bit codes in blocks of the matrix read row by row: ``dense = levels[codes] * scale of the block``.

    codes: (out, in) uint8. absmax: (blocks,) float32, the blocks' scales; or, doubly quantized, uint8 codes of these: then
    ``scale = nested_levels[absmax] * nested_absmax + nested_offset`` with a nested_absmax, float32, for every 256 blocks.
    levels: (16,) float32; nested_levels: (256,) float32. kind: "nf4" or "fp4". block_size: entries that share a scale; blocks
    run on from row to row. stored: dtype of the matrix that it was made of. computes_in: dtype of the product in readers.
    """

    library: ClassVar[str] = "bitsandbytes"
    bits: ClassVar[int] = 4
    inputs: ClassVar[None] = None

    codes: Tensor
    absmax: Tensor
    levels: Tensor
    kind: str
    block_size: int
    stored: torch.dtype
    computes_in: torch.dtype
    nested_absmax: Tensor | None = None
    nested_levels: Tensor | None = None
    nested_offset: float = 0.0

    @property
    def dtype(self) -> torch.dtype:
        return self.stored

    @property
    def group_size(self) -> int:
        return self.block_size

    @property
    def scale(self) -> Tensor:
        """(1, blocks) float32."""
        if self.nested_absmax is None or self.nested_levels is None:
            return self.absmax.unsqueeze(0)
        device = self.codes.device  # in training, floating-point parts that stay as they are may lie elsewhere
        nested = self.nested_absmax.to(device).repeat_interleave(NESTED_BLOCK)[: len(self.absmax)]
        offset = torch.tensor(self.nested_offset, dtype=torch.float32, device=device)
        return (self.nested_levels.to(device)[self.absmax.int()] * nested + offset).unsqueeze(0)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        scale = self.scale[0].repeat_interleave(self.block_size)[: self.codes.numel()]
        values = self.levels.to(self.codes.device)[self.codes.int()].flatten()
        return (values * scale).reshape(self.shape).to(dtype or self.stored)

    def layer(self, dtype: torch.dtype) -> Callable[[Tensor, Tensor | None], Tensor]:
        matrix = self.dense(self.computes_in)

        def product(x: Tensor, bias: Tensor | None) -> Tensor:
            bias = None if bias is None else bias.to(matrix.dtype)
            return F.linear(x.to(matrix.dtype), matrix, bias).to(x.dtype)

        return product

    @property
    def state(self) -> bytes:
        """What the file says of the matrix beside its tensors, as JSON."""
        described: dict[str, Any] = {
            "quant_type": self.kind, "blocksize": self.block_size, "dtype": str(self.stored).removeprefix("torch."),
            "shape": self.shape,
        }  # fmt: skip
        if self.nested_absmax is not None:
            described |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": self.nested_offset}
        return json.dumps(described).encode()

    @property
    def values_nbytes(self) -> float:
        return self.codes.numel() / 2

    @property
    def nbytes(self) -> int:
        tables = 4 * self.levels.numel() + (4 * self.nested_levels.numel() if self.nested_levels is not None else 0)
        return -(-self.codes.numel() // 2) + self._scale_nbytes + tables + len(self.state)

    @property
    def ideal_nbytes(self) -> float:
        return self.values_nbytes + self._scale_nbytes

    @property
    def _scale_nbytes(self) -> int:
        nested = 0 if self.nested_absmax is None else 4 * self.nested_absmax.numel()
        return self.absmax.numel() * self.absmax.element_size() + nested

    def parameters(self) -> dict[str, Tensor]:
        """The scales, unless they are quantized themselves."""
        return {"absmax": self.absmax} if self.nested_absmax is None else {}

    def rebuild(self, parameters: Mapping[str, Tensor]) -> Blockwise:
        return replace(self, **parameters)

    def masked(self, mask: Tensor) -> Masked:
        zero = (self.levels == 0).int().argmax().to(torch.uint8)
        return Masked(replace(self, codes=torch.where(mask, self.codes, zero)), mask)


@dataclass(frozen=True)
class RowInt8(Coded):
    """8-bit integers with a scale per row: ``dense = codes * absmax / 127``. Readers round the inputs too, token by token,
    but for inputs at least one token of the batch has beyond ``threshold``: those they multiply unrounded.

    codes: (out, in) int8. absmax: (out,) float32. stored: dtype of the matrix that it was made of.
    """

    library: ClassVar[str] = "bitsandbytes"
    bits: ClassVar[int] = 8
    inputs: ClassVar[None] = None

    codes: Tensor
    absmax: Tensor
    threshold: float
    stored: torch.dtype

    @property
    def dtype(self) -> torch.dtype:
        return self.stored

    @property
    def scale(self) -> Tensor:
        """(out, 1) float32."""
        return self.absmax.unsqueeze(1) * _STEP

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        return (self.codes.float() * self.absmax.unsqueeze(1) * _STEP).to(dtype or self.stored)

    def layer(self, dtype: torch.dtype) -> Callable[[Tensor, Tensor | None], Tensor]:
        return lambda x, bias: _MixedProduct.apply(x, bias, self)  # type: ignore[no-any-return]

    @property
    def values_nbytes(self) -> float:
        return float(self.codes.numel())

    @property
    def nbytes(self) -> int:
        return self.codes.numel() + 4 * self.absmax.numel() + 1  # and weight_format, one byte

    @property
    def ideal_nbytes(self) -> float:
        return float(self.codes.numel() + 4 * self.absmax.numel())

    def parameters(self) -> dict[str, Tensor]:
        return {"absmax": self.absmax}

    def rebuild(self, parameters: Mapping[str, Tensor]) -> RowInt8:
        return replace(self, **parameters)

    def masked(self, mask: Tensor) -> Masked:
        return Masked(replace(self, codes=self.codes.masked_fill(~mask, 0)), mask)


class _MixedProduct(torch.autograd.Function):
    """The library's product, inputs rounded but for outlier columns. Gradients pass as if nothing were rounded."""

    @staticmethod
    def forward(context: Any, x: Tensor, bias: Tensor | None, weight: RowInt8) -> Tensor:
        context.weight = weight
        functions, rows = bitsandbytes(), x.reshape(-1, x.shape[-1])
        half = rows.to(torch.float16, copy=True)  # the library zeroes outliers in place while it works
        codes, absmax, outliers = functions.int8_vectorwise_quant(half, threshold=weight.threshold)
        bias = None if bias is None else bias.to(x.dtype)
        mixed = torch.ops.bitsandbytes.int8_mixed_scaled_mm
        product, _ = mixed(rows, codes, weight.codes, absmax, weight.absmax, outliers, bias)
        return product.reshape(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(context: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        wants_input, wants_bias, _ = context.needs_input_grad
        to_input = gradient @ context.weight.dense(gradient.dtype) if wants_input else None
        return to_input, gradient.flatten(0, -2).sum(0) if wants_bias else None, None
