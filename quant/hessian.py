"""Factors of a layer's Hessian, which tell how the error of one rounded input is best spread over the others."""

from __future__ import annotations

import logging
from typing import NamedTuple

import torch
from torch import Tensor

_N_DAMPINGS = 5
_FLOAT64_INPUTS = 8192

log = logging.getLogger(__name__)


class Plan(NamedTuple):
    """What the layers that share an input share: order, (in,) int64, in which inputs are rounded; factor: U, (in, in)
    upper triangular in that order, each row divided by its diagonal; dead: (in,) bool, inputs that were always zero."""

    order: Tensor
    factor: Tensor
    dead: Tensor


def make_plan(hessian: Tensor, damping: float, act_order: bool) -> Plan:
    """Order the inputs of a Hessian (in, in) and factor its inverse."""
    dead = hessian.diagonal() == 0
    if bool(dead.all()):  # no token came by (an idle expert, say): nothing is known, so round to nearest
        log.warning("an input group saw no calibration tokens; its layers are rounded to nearest")
        hessian, dead = torch.eye(len(dead), device=dead.device), torch.zeros_like(dead)
    order = torch.arange(len(dead), device=dead.device)
    if act_order:
        order = hessian.diagonal().argsort(descending=True, stable=True)
        hessian = hessian[order][:, order]
    factor = inverse_factor(hessian + torch.diag(dead[order].to(hessian.dtype)), damping)
    return Plan(order, (factor / factor.diagonal().unsqueeze(1)).float(), dead)


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """U, upper triangular, with U^T U = (H + damping * mean(diag H) * I)^-1; (in, in), of the Hessian's dtype or
    float64.

    Float64 is used for wide layers and where float32 fails; then the damping is raised tenfold, up to four times.
    Raises torch.linalg.LinAlgError if nothing helps. From H = R R^T with R upper, a Cholesky factorisation of the
    reversed matrix, U is R^-1: half the work of inverting H and factoring the inverse, and more accurate.
    """
    attempts = [(hessian.dtype, damping)] if len(hessian) < _FLOAT64_INPUTS else []
    attempts += [(torch.float64, damping * 10**i) for i in range(_N_DAMPINGS)]
    for dtype, share in attempts:
        flipped = hessian.to(dtype).flip(0, 1)
        flipped.diagonal().add_(share * flipped.diagonal().mean())
        lower, failed = torch.linalg.cholesky_ex(flipped)
        if not failed and bool(lower.isfinite().all()):
            if share > damping:
                log.warning("the Hessian is not positive definite; its damping was raised to %g", share)
            identity = torch.eye(len(lower), dtype=dtype, device=lower.device)
            return torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
    raise torch.linalg.LinAlgError("the Hessian is not positive definite, even with strong damping")
