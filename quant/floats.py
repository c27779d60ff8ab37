"""Small floats: rounding to 8-bit (e4m3) and 4-bit (e2m1) ones, and the base of the quantizers that store them."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from compress.passes import LinearPass
from compress.stats import LinearStats
from compress.weights import Dense, FloatQuantized, Masked, Weight
from compress.weights.grid import E2M1

E4M3_MAX, E2M1_MAX = 448.0, 6.0
E4M3_LEAST = 2.0**-9  # the smallest positive one

log = logging.getLogger(__name__)


def to_e4m3(values: Tensor) -> Tensor:
    """The nearest 8-bit floats (half to even), clamped to their range: float8_e4m3fn of the same shape."""
    return values.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def to_e2m1(values: Tensor) -> Tensor:
    """Codes of the nearest 4-bit floats (half to the even code), clamped to [-6, 6]: uint8, sign * 8 + index of ``E2M1``."""
    magnitude = values.abs().contiguous()
    middles = (torch.tensor(E2M1[:-1]) + torch.tensor(E2M1[1:])).to(values) / 2
    to_lower, to_upper = middles[0::2].contiguous(), middles[1::2].contiguous()  # by which of their neighbours is even
    index = torch.bucketize(magnitude, to_lower) + torch.bucketize(magnitude, to_upper, right=True)
    return (index + 8 * ((values < 0) & (index > 0))).to(torch.uint8)


def best_scale(groups: Tensor, candidates: Sequence[Tensor]) -> Tensor:
    """Of several scales (rows, groups) per group, the index of the one that rounds it best to e2m1: (rows, groups) int64.

    groups: (rows, groups, group) float32. Best is the least sum of squared errors; the first of equal ones.
    """
    levels = torch.tensor([*E2M1, *(-value for value in E2M1)], device=groups.device)
    errors = []
    for scale in candidates:
        rounded = levels[to_e2m1(groups / scale.unsqueeze(-1)).int()] * scale.unsqueeze(-1)
        errors.append((rounded - groups).square_().sum(2))
    return torch.stack(errors).argmin(0)


class FloatQuantizer(LinearPass):
    """Base of the quantizers to small floats; each weight is rounded to the nearest, and no data is needed.

    A matrix whose inputs are no multiple of the format's group stays as it is: no reader knows a shorter group.
    """

    group: ClassVar[int] = 1

    @abstractmethod
    def encode(self, values: Tensor, dtype: torch.dtype) -> FloatQuantized:
        """Round values (out, in), float32 and finite; dtype: the storage dtype."""

    @abstractmethod
    def empty(self, shape: tuple[int, int], dtype: torch.dtype) -> FloatQuantized:
        """What :meth:`encode` returns for that shape, of meta tensors."""

    def linear(self, weight: Tensor, stats: LinearStats, mask: Tensor | None) -> Weight:
        values = weight.float() if mask is None else weight.float() * mask
        if not bool(values.isfinite().all()):
            raise ValueError("cannot quantize: the weight has entries that are not finite")
        if weight.shape[1] % self.group:
            log.warning("%s: a matrix of %d inputs, no multiple of %d, stays as it is", self.method(), len(values[0]), self.group)
            return Dense(weight) if mask is None else Masked(Dense(weight), mask)
        quantized = self.encode(values, weight.dtype)
        return quantized if mask is None else quantized.masked(mask)

    def outline(self, weight: Tensor, stats: LinearStats, mask: Tensor | None) -> Weight:
        n_outputs, n_inputs = weight.shape
        if n_inputs % self.group:
            return super().outline(weight, stats, mask)
        quantized = self.empty((n_outputs, n_inputs), weight.dtype)
        return quantized if mask is None else Masked(quantized, mask.to("meta"))
