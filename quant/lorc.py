"""LoRC: add to a quantized layer a low-rank approximation of what quantization took from it (Yao et al., ZeroQuant-V2,
2303.08302)."""

from __future__ import annotations

import logging
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from compress.lowrank.factor import leading_directions, project, rank_for
from compress.lowrank.svd_llm import covariance_root
from compress.passes import CorrectionPass, Needs, Taxon
from compress.quant.grids import fit_grid, quantize
from compress.stats import LinearStats
from compress.weights import Dense, LowRank, Quantized, Sum, Weight
from compress.weights.composed import unmasked

log = logging.getLogger(__name__)


class LoRC(CorrectionPass):
    """The two thin matrices whose product is closest to the error, in a sum with what the layer has become.

    Plain, as published, it needs no data; ``weighted`` makes the outputs on the calibration inputs closest instead. A layer
    with removed weights is left as it is, for a low-rank matrix would fill its zeros; so is one that is dense, to which
    the correction could be added without any factors.
    """

    taxon: ClassVar[Taxon] = Taxon.WEIGHT_ONLY
    paper: ClassVar[str] = "2303.08302"

    rank: int = Field(8, ge=1, description="rank of the correction")
    ratio: float | None = Field(None, gt=0, lt=1, description="its parameters as a share of the matrix's, instead of a rank")
    weighted: bool = Field(False, description="minimise the output error on the calibration inputs, not the weight error")
    factor_bits: int | None = Field(None, ge=2, le=8, description="bits of the correction's factors; none: not quantized")

    @property
    def needs(self) -> Needs:  # type: ignore[override]  # a constant of other methods, here it depends on a setting
        return Needs(frozenset({"covariance"})) if self.weighted else Needs()

    def rank_of(self, n_outputs: int, n_inputs: int) -> int:
        """The correction's rank for an (out, in) matrix."""
        wanted = self.rank if self.ratio is None else rank_for(self.ratio, n_outputs, n_inputs) or self.rank
        return min(wanted, n_outputs, n_inputs)

    def correct(self, original: Tensor, weight: Weight, stats: LinearStats) -> Weight:
        if weight.mask is not None:
            log.warning("a layer with removed weights was left uncorrected: a low-rank correction would fill its zeros")
            return weight
        if isinstance(weight, Dense):
            return weight
        rank = self.rank_of(*weight.shape)
        if original.is_meta:
            down, up = (torch.empty(shape, device="meta") for shape in ((rank, weight.shape[1]), (weight.shape[0], rank)))
        else:
            error = original.double() - weight.dense(torch.float64)
            root = covariance_root(stats.covariance, stats.n) if self.weighted else None
            down, up = project(error, leading_directions(error if root is None else error @ root, rank))
        correction = LowRank(*(self._stored(factor, weight.dtype) for factor in (down, up)))
        inner = unmasked(weight)
        return Sum((*inner.parts, correction) if isinstance(inner, Sum) else (weight, correction))

    def _stored(self, factor: Tensor, dtype: torch.dtype) -> Weight:
        """A factor as it goes to the file."""
        if self.factor_bits is None:
            return Dense(factor.to(dtype))
        if factor.is_meta:
            codes, scale = torch.empty_like(factor, dtype=torch.int8), torch.empty(len(factor), 1, dtype=dtype, device="meta")
        else:
            grid = fit_grid(factor.float(), self.factor_bits, None, True, False, dtype)
            codes, scale = quantize(factor.float(), grid), grid.scale
        return Quantized(codes, scale, None, self.factor_bits)
