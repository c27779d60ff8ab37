"""SVD-LLM: truncate the singular values of the whitened weight: they are the output error (Wang et al., 2403.07378)."""

from __future__ import annotations

import logging
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from compress.lowrank.factor import Factoriser, principal_axes
from compress.passes import Needs, Taxon
from compress.stats import LinearStats, symmetric

log = logging.getLogger(__name__)


class SVDLLM(Factoriser):
    """The matrix of its rank whose outputs on the calibration inputs are closest.

    With at least as many tokens as inputs the covariance is used as it is. With fewer it says nothing about most
    directions, and fitting it alone ruins the layer; then a multiple of the identity is added, the larger the fewer the
    tokens, which leads over to plain SVD.

    As published, layers are fitted to the inputs that they have in the dense model (``inputs=dense``); with ``compressed``, or
    where a later pass shares the statistics, to those that the blocks compressed so far leave them.

    ``update`` makes good, layer after layer, for what those before it lost: inputs are measured again after q/k/v, o and
    gate/up, and the least squares that fit today's inputs to the layer's former outputs are truncated in place of the weight.
    The paper fits the factor U alone again, which leaves the directions that down keeps as they were and gains far less.

    The ranks are alike, as published. ``ranks=loss`` shares the same bytes out by what each layer's loss does to its block, and
    is mostly far better (perplexity of the bundled model at ``ratio=0.6``: 26.0 against 29.3). Alone, where little is kept, it
    can starve layers (a model of characters at 0.4: 22 against 10); beside ``update``, as in ``--effort best``, it did not (5.2).
    """

    taxon: ClassVar[Taxon] = Taxon.LOW_RANK
    paper: ClassVar[str] = "2403.07378"
    efforts: ClassVar[dict[str, dict[str, Any]]] = {"best": {"update": True, "ranks": "loss"}}

    inputs: Literal["dense", "compressed"] = Field("dense", description="of which model the inputs are that layers are fitted to")
    ridge: float = Field(0.0, ge=0, description="added to the covariance's diagonal, as a share of its mean")
    update: bool = Field(
        False, description="fit the outputs that each layer had before any was compressed: slower, better the more is removed"
    )

    @property
    def needs(self) -> Needs:  # type: ignore[override]  # depends on a setting
        return Needs(frozenset({"covariance", "cross"} if self.update else {"covariance"}))

    @property
    def sequential(self) -> bool:
        return self.update

    @property
    def undisturbed(self) -> bool:
        return self.inputs == "dense" and not self.update

    def factors(self, weight: Tensor, stats: LinearStats, rank: int) -> tuple[Tensor, Tensor]:
        moved = "cross" in stats.allowed  # not in a survey, before which nothing has been compressed
        return super().factors(self.refitted(weight, stats) if moved else weight, stats, rank)

    def refitted(self, weight: Tensor, stats: LinearStats) -> Tensor:
        """The matrix (out, in) that, of today's inputs x, makes what weight made of r, the inputs when the stage began, as nearly
        as least squares can: W + W (R - C) C^-1 with R = sum r x^T. Where C says nothing, it is W."""
        root = self.root(stats)
        moved = weight @ (stats.cross - stats.covariance)
        inverse = stats.cached(("svd_llm", self.ridge, "inverse"), lambda: torch.linalg.pinv(root @ root.T, hermitian=True))
        return weight + moved @ inverse

    def moment(self, stats: LinearStats) -> Tensor:
        """The inputs' covariance, with what is added to it, (in, in)."""
        return stats.cached(("svd_llm", self.ridge, "moment"), lambda: damped(stats.covariance, stats.n, self.ridge))

    def root(self, stats: LinearStats) -> Tensor:
        """A root of it, (in, in)."""
        return stats.cached(("svd_llm", self.ridge), lambda: root_of(self.moment(stats)))

    def directions(self, weight: Tensor, stats: LinearStats, rank: int) -> Tensor:
        """Of a wide matrix they are the principal axes of its outputs, whose covariance needs no root."""
        if weight.shape[0] > weight.shape[1]:
            return super().directions(weight, stats, rank)
        return principal_axes(symmetric(weight @ self.moment(stats), weight.T), rank)

    def metric(self, weight: Tensor, stats: LinearStats) -> Tensor:
        return weight @ self.root(stats)


def covariance_root(covariance: Tensor, n_tokens: int, ridge: float = 0.0) -> Tensor:
    """A root S (in, in) of a covariance, S S^T = :func:`damped` of it."""
    return root_of(damped(covariance, n_tokens, ridge))


def damped(covariance: Tensor, n_tokens: int, ridge: float = 0.0) -> Tensor:
    """C + ridge * mean(diag C) * I, of a covariance C (in, in) float64, a sum over n_tokens; C itself where nothing is added.

    With fewer tokens than inputs the ridge is raised to inputs / tokens; with none, it is the identity.
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
    if not ridge:
        return covariance
    raised = covariance.clone()
    raised.diagonal().add_(ridge * scale)
    return raised


def root_of(moment: Tensor) -> Tensor:
    """A root S, S S^T = M, of a symmetric M (in, in) float64: the lower Cholesky factor, or, where rounding has left M
    indefinite, from its eigenvalues, the negative ones set to zero."""
    lower, failed = torch.linalg.cholesky_ex(moment)
    if not failed:
        return lower
    values, vectors = torch.linalg.eigh(moment)
    return vectors * values.clamp_(min=0).sqrt()
