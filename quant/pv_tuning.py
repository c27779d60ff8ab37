"""PV-Tuning: distil into a quantized model by turns: what is continuous by gradients, and few codes at a time, those from which
straight-through gradients have pulled the weights farthest (Malinovskii et al., 2405.14852)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field

from compress.distill.logit_kd import LogitKD
from compress.passes import Taxon
from compress.quant.buffered import Buffered
from compress.weights import Codebook, LowRank, Quantized, Weight
from compress.weights.composed import unmasked


class PVTuning(LogitKD):
    """The loss is that of ``logit_kd``, and so is what is trained (P): codebooks, scales, and with ``trains=blocks`` norms and
    biases.

    Between steps (V) codes move, of vectors from codebooks and of weights on integer grids: a buffer, which begins as what the
    codes stand for, moves by the gradient that these get, and of the vectors whose codes are farthest from it the
    ``max_code_change`` farthest are coded anew, by beam search, to be near it. A step that changed all codes would be either
    none, since rounding undoes it, or a jump; few codes may jump. Factors of low-rank layers are handled one by one; grids that
    round their inputs too, and other forms, keep their codes. Rates are of AdamW, for the buffer without momentum, in
    place of the paper's LAMB: a buffer's is relative to the matrix's root mean square.
    """

    taxon: ClassVar[Taxon] = Taxon.QAT
    paper: ClassVar[str] = "2405.14852"
    efforts: ClassVar[dict[str, dict[str, Any]]] = {"fast": {"steps": 100}, "best": {"steps": 1000}}

    learning_rate: float = Field(1e-3, gt=0, description="peak, followed by the schedule's fall; of what is not codes")
    code_learning_rate: float = Field(0.03, ge=0, description="of the buffer, as a share of the weights' root mean square")
    max_code_change: float = Field(0.01, ge=0, le=1, description="share of a matrix's vectors whose codes may change in a step")
    trust_ratio: float = Field(1.0, ge=0, description="largest change of a matrix by codes in a step, as a share of its norm")
    delta_decay: float = Field(0.0, ge=0, le=1, description="share of the buffer's way from the codes that each step takes back")
    beam: int = Field(5, ge=1, description="sums of entries that are followed up from book to book")

    def remarks(self, weights: Sequence[Weight]) -> list[str]:
        parts = (part for weight in weights for part in ((weight.down, weight.up) if isinstance(weight, LowRank) else (weight,)))
        if any(map(_has_codes_to_move, parts)):
            return []
        return [f"{self.label()}: no layer has codes to move, so that this is logit_kd; put a quantizer before it"]

    def adapt(self, weight: Weight, generator: torch.Generator) -> Weight:
        ratio = self.code_learning_rate / self.learning_rate
        return Buffered.start(weight, ratio) if _has_codes_to_move(weight) else weight

    def choose(self, index: int, weight: Weight) -> Weight | None:
        if not isinstance(weight, Buffered) or index == 0:
            return None
        return weight.recoded(self.max_code_change, self.trust_ratio, self.beam).pulled(self.delta_decay)

    def betas(self, parameter: str) -> tuple[float, float]:
        return (0.0, 0.95) if parameter == "buffer" else (0.9, 0.95)


def _has_codes_to_move(weight: Weight) -> bool:
    inner = unmasked(weight)
    return isinstance(inner, Codebook) or (isinstance(inner, Quantized) and inner.inputs is None)
