"""SVD-LLM: truncate the singular values of the whitened weight: they are the output error (Wang et al., 2403.07378)."""

from __future__ import annotations

import logging
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from compress.lowrank.factor import Factoriser, leading_directions
from compress.passes import Needs, Taxon
from compress.stats import LinearStats

log = logging.getLogger(__name__)


class SVDLLM(Factoriser):
    """The matrix of its rank whose outputs on the calibration inputs are closest.

    With at least as many tokens as inputs the covariance is used as it is. With fewer it says nothing about most
    directions, and fitting it alone ruins the layer; then a multiple of the identity is added, the larger the fewer the
    tokens, which leads over to plain SVD.
    """

    taxon: ClassVar[Taxon] = Taxon.LOW_RANK
    paper: ClassVar[str] = "2403.07378"
    needs: ClassVar[Needs] = Needs(frozenset({"covariance"}))

    ridge: float = Field(0.0, ge=0, description="added to the covariance's diagonal, as a share of its mean")

    def directions(self, weight: Tensor, stats: LinearStats, rank: int) -> Tensor:
        root = stats.cached(("svd_llm", self.ridge), lambda: covariance_root(stats.covariance, stats.n, self.ridge))
        return leading_directions(weight @ root, rank)


def covariance_root(covariance: Tensor, n_tokens: int, ridge: float = 0.0) -> Tensor:
    """A root S, S S^T = C + ridge * mean(diag C) * I, of a covariance C (in, in) float64, a sum over n_tokens.

    With fewer tokens than inputs the ridge is raised to inputs / tokens; with none, S is the identity. S is the lower
    Cholesky factor, or, where rounding has left C indefinite, comes from its eigenvalues, the negative ones set to
    zero.
    """
    n_inputs = len(covariance)
    if n_tokens < n_inputs:
        log.warning(
            "SVD-LLM: %d calibration tokens for %d inputs; blending the covariance with the identity. Use more tokens, "
            "at best several times the inputs",
            n_tokens,
            n_inputs,
        )
        ridge = max(ridge, n_inputs / max(n_tokens, 1))
    scale = covariance.diagonal().mean()
    if not scale > 0:
        return torch.eye(n_inputs, dtype=covariance.dtype, device=covariance.device)
    damped = covariance.clone()
    damped.diagonal().add_(ridge * scale)
    lower, failed = torch.linalg.cholesky_ex(damped)
    if not failed:
        return lower
    values, vectors = torch.linalg.eigh(damped)
    return vectors * values.clamp_(min=0).sqrt()
