"""Factors of a layer's Hessian, which tell how the error of one rounded input is best spread over the others."""

from __future__ import annotations

import logging
from typing import NamedTuple

import torch
from torch import Tensor

_N_DAMPINGS = 5
_FLOAT64_INPUTS = 8192
_SMALL = 256  # inputs of a triangle that is inverted at once

log = logging.getLogger(__name__)


class Plan(NamedTuple):
    """What the layers that share an input share: order, (in,) int64, in which inputs are rounded; factor: U, (in, in)
    upper triangular in that order, each row divided by its diagonal; dead: (in,) bool, inputs that were always zero;
    diagonal: (in,), that of U, in that order."""

    order: Tensor
    factor: Tensor
    dead: Tensor
    diagonal: Tensor | None = None


def make_plan(hessian: Tensor, damping: float, act_order: bool, last: Tensor | None = None, run: int = 1) -> Plan:
    """Order the inputs of a Hessian (in, in) and factor its inverse. last: (in,) bool, inputs to come after all others. run: so
    many consecutive inputs stay together."""
    dead = hessian.diagonal() == 0
    if bool(dead.all()):  # no token came by (an idle expert, say): nothing is known, so round to nearest
        log.warning("an input group saw no calibration tokens; its layers are rounded to nearest")
        hessian, dead = torch.eye(len(dead), device=dead.device), torch.zeros_like(dead)
    order = torch.arange(len(dead), device=dead.device)
    if act_order:
        order = order.view(-1, run)[hessian.diagonal().view(-1, run).sum(1).argsort(descending=True, stable=True)].flatten()
    if last is not None:
        order = torch.cat([order[~last[order]], order[last[order]]])
    factor = inverse_factor(hessian, damping, order)
    diagonal = factor.diagonal().clone()
    factor /= diagonal.unsqueeze(1)
    return Plan(order, factor.float(), dead, diagonal.float())


def inverse_factor(hessian: Tensor, damping: float, order: Tensor | None = None) -> Tensor:
    """U, upper triangular, with U^T U = (H + damping * mean(diag H) * I)^-1; (in, in), of the Hessian's dtype or
    float64. order: (in,) int64, in which the inputs of H are taken first. A zero on the diagonal of H counts as one.

    Float64 is used for wide layers and where float32 fails; then the damping is raised tenfold, up to four times.
    Raises torch.linalg.LinAlgError if nothing helps. From H = R R^T with R upper, a Cholesky factorisation of the
    reversed matrix, U is R^-1: half the work of inverting H and factoring the inverse, and more accurate. All of it is
    done in one copy of H: beside a wide layer's Hessian, any further copy is what the peak of memory is made of.
    """
    backwards = (torch.arange(len(hessian), device=hessian.device) if order is None else order).flip(0)
    attempts = [(hessian.dtype, damping)] if len(hessian) < _FLOAT64_INPUTS else []
    attempts += [(torch.float64, damping * 10**i) for i in range(_N_DAMPINGS)]
    for dtype, share in attempts:
        lower = hessian[backwards.unsqueeze(1), backwards].to(dtype)
        diagonal = lower.diagonal()
        diagonal.masked_fill_(diagonal == 0, 1).add_(share * diagonal.mean())
        failed = torch.empty((), dtype=torch.int32, device=lower.device)
        torch.linalg.cholesky_ex(lower.mT, upper=True, out=(lower.mT, failed))  # LAPACK's layout is the transpose
        if not failed and bool(diagonal.isfinite().all()):  # which everything to its left is a part of
            if share > damping:
                log.warning("the Hessian is not positive definite; its damping was raised to %g", share)
            _invert(lower)
            return lower.flip(0, 1)
    raise torch.linalg.LinAlgError("the Hessian is not positive definite, even with strong damping")


def _invert(lower: Tensor) -> None:
    """Invert a lower triangular matrix in place, by halves: a third of the work of solving for the identity."""
    length = len(lower)
    if length <= _SMALL:
        identity = torch.eye(length, dtype=lower.dtype, device=lower.device)
        lower.copy_(torch.linalg.solve_triangular(lower, identity, upper=False))
        return
    half = length // 2
    first, corner, last = lower[:half, :half], lower[half:, :half], lower[half:, half:]
    across = torch.linalg.solve_triangular(first, corner, upper=False, left=False)
    corner.copy_(torch.linalg.solve_triangular(last, across, upper=False)).neg_()
    _invert(first)
    _invert(last)
