"""LLM.int8(): 8-bit rows times 8-bit tokens, but for the few inputs with outliers, which stay as they are (Dettmers et al.,
2208.07339).

bitsandbytes makes the tensors, in its own format, which transformers opens where that library is installed.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from compress.passes import LinearPass, Taxon
from compress.stats import LinearStats
from compress.weights import Masked, Weight
from compress.weights.blockwise import RowInt8, bitsandbytes


class LLMInt8(LinearPass):
    """Weights to integers with a scale per row, ahead of time; inputs likewise per token, while the model runs.

    An input is an outlier where any token of the batch has it at ``threshold`` or beyond; it is then multiplied unrounded, by
    the weights as they are rounded (the 16-bit originals, which the paper keeps, are not in the file). So what a
    token gives depends a little on the batch it is in. Weights pass through float16, as the library has them. It needs no
    calibration.
    """

    taxon: ClassVar[Taxon] = Taxon.WEIGHT_ONLY
    paper: ClassVar[str] = "2208.07339"

    threshold: float = Field(6.0, ge=0, description="inputs at least this large are multiplied unrounded; 0: none are")

    def linear(self, weight: Tensor, stats: LinearStats, mask: Tensor | None) -> Weight:
        values = (weight if mask is None else weight * mask).to(torch.float16, copy=True)
        codes, absmax, _ = bitsandbytes().int8_vectorwise_quant(values)
        if not bool(absmax.isfinite().all()):
            raise ValueError("cannot quantize: the weight has entries beyond float16 or not finite")
        codes = codes.masked_fill_(absmax.unsqueeze(1) == 0, 0)  # of 0 / 0 the library leaves whatever the machine makes
        quantized = RowInt8(codes, absmax, self.threshold, weight.dtype)
        return quantized if mask is None else quantized.masked(mask)

    def outline(self, weight: Tensor, stats: LinearStats, mask: Tensor | None) -> Weight:
        bitsandbytes()  # its absence is the user's to know before anything is computed
        codes = torch.empty(weight.shape, dtype=torch.int8, device="meta")
        quantized = RowInt8(codes, torch.empty(len(weight), device="meta"), self.threshold, weight.dtype)
        return quantized if mask is None else Masked(quantized, mask.to("meta"))
