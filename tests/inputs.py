"""What enters a layer in the tests of methods, and what comes of it."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.stats import LinearStats
from compress.weights import Weight


def stats_of(x: Tensor) -> LinearStats:
    """Of inputs (tokens, in)."""
    stats = LinearStats(x.shape[1], {"hessian", "sqnorm"})
    stats.add(x)
    return stats.finish()


def correlated(n_inputs: int) -> Tensor:
    """(400, in)."""
    draw = torch.Generator().manual_seed(1)
    return torch.randn(400, n_inputs, generator=draw) @ torch.randn(n_inputs, n_inputs, generator=draw)


def relative_error(weight: Weight, original: Tensor, x: Tensor) -> float:
    """Of the outputs, squared."""
    return float(((weight.dense().float() - original) @ x.T).square().sum() / (original @ x.T).square().sum())
