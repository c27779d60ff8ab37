"""Codes that training moves a few at a time: beside them lies a buffer of what the weights would be without them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compress.quant.additive import beam_search
from compress.weights import Codebook, Masked, Provisional, Quantized, Weight
from compress.weights.composed import unmasked


@dataclass(frozen=True)
class Buffered(Provisional):
    """A matrix in codes, which is what is computed with, and a buffer, which takes its gradients as if it were computed with (the
    straight-through estimator): where the codes are to go.

    base: a :class:`Codebook`, or a :class:`Quantized` grid, masked or not. buffer: (out, in) float32. share: of the learning
    rate, by which the buffer moves.
    """

    base: Weight
    buffer: Tensor
    share: float

    @classmethod
    def start(cls, base: Weight, pace: float) -> Buffered:
        """A buffer that equals the base. pace: share of the learning rate for a matrix whose root mean square is one."""
        buffer = base.dense(torch.float32)
        return cls(base, buffer, pace * float(buffer.square().mean().sqrt()))

    def recoded(self, most: float, trust: float, beam: int) -> Buffered:
        """Codes that are nearer to the buffer, where these are farthest from it: of a share ``most`` of the vectors at most,
        those that are changed first being as many as change the matrix by no more than ``trust`` of its norm."""
        current = self.base.dense(torch.float32)
        inner = unmasked(self.base)
        if isinstance(inner, Codebook):
            changed: Weight = _recoded_vectors(inner, self.buffer, current, most, trust, beam)
        else:
            assert isinstance(inner, Quantized)
            changed = _recoded_weights(inner, self.buffer, current, most, trust, self.base.mask)
        return replace(self, base=Masked(changed, self.base.kept) if isinstance(self.base, Masked) else changed)

    def pulled(self, share: float) -> Buffered:
        """The buffer that much of the way back to the codes."""
        return replace(self, buffer=torch.lerp(self.buffer, self.base.dense(torch.float32), share)) if share else self

    def final(self) -> Weight:
        return self.base

    @property
    def shape(self) -> tuple[int, int]:
        return self.base.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        dense = self.base.dense(dtype)
        through = (self.buffer - self.buffer.detach()).to(dense)
        return dense + (through if self.mask is None else through * self.mask)

    @property
    def mask(self) -> Tensor | None:
        return self.base.mask

    def parameters(self) -> dict[str, Tensor]:
        return self.base.parameters() | {"buffer": self.buffer}

    def shares(self) -> dict[str, float]:
        return self.base.shares() | {"buffer": self.share}

    def rebuild(self, parameters: Mapping[str, Tensor]) -> Buffered:
        own = {name: value for name, value in parameters.items() if name != "buffer"}
        return replace(self, base=self.base.rebuild(own), buffer=parameters["buffer"])


def _recoded_vectors(base: Codebook, buffer: Tensor, current: Tensor, most: float, trust: float, beam: int) -> Codebook:
    gaps = base.split(buffer - current).square().sum(2).flatten()
    chosen = _farthest(gaps, most)
    scale = base.vector_scale.flatten()[chosen].unsqueeze(1)
    wanted = base.split(buffer).flatten(0, 1)[chosen]
    linear = -2 * wanted / torch.where(scale == 0, 1, scale)
    books = base.books
    indices, sums = beam_search(books, linear, torch.eye(base.length, dtype=books.dtype, device=books.device), beam)
    old, new = base.split(current).flatten(0, 1)[chosen], sums * scale
    better = (new - wanted).square().sum(1) < (old - wanted).square().sum(1)
    moves = torch.where(better, (new - old).square().sum(1), 0)
    better &= _within(moves, trust, current)
    found = base.indices.flatten(1).clone()
    found[:, chosen[better]] = indices[:, better]
    return replace(base, indices=found.view_as(base.indices))


def _recoded_weights(
    base: Quantized, buffer: Tensor, current: Tensor, most: float, trust: float, mask: Tensor | None
) -> Quantized:
    gaps = (buffer - current).abs().flatten()
    chosen = _farthest(gaps if mask is None else gaps * mask.flatten(), most)
    scale = base.scale.float().repeat_interleave(base.group_size, 1).flatten()[chosen]
    zero = 0 if base.zero_point is None else base.zero_point.repeat_interleave(base.group_size, 1).flatten()[chosen]
    steps = (buffer.flatten()[chosen] / torch.where(scale == 0, 1, scale)).round() + zero
    old, new = base.codes.flatten()[chosen], steps.clamp(-(2 ** (base.bits - 1)), 2 ** (base.bits - 1) - 1).to(torch.int8)
    if mask is not None:
        new = torch.where(mask.flatten()[chosen], new, old)
    within = _within(((new.float() - old) * scale).square(), trust, current)  # a difference of codes may be no code
    codes = base.codes.flatten().clone()
    codes[chosen[within]] = new[within]
    return replace(base, codes=codes.view_as(base.codes))


def _farthest(gaps: Tensor, most: float) -> Tensor:
    """The places of the largest, (n,), from the largest on; n is a share ``most`` of all, rounded up."""
    return gaps.topk(math.ceil(most * len(gaps))).indices


def _within(moves: Tensor, trust: float, current: Tensor) -> Tensor:
    """The first of these squared moves that together are no longer than ``trust`` of the matrix, (n,) bool."""
    return moves.cumsum(0) <= trust**2 * current.square().sum()
