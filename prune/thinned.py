"""A matrix under a mask that is chosen anew while it trains."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compress.weights import Dense, Masked, Provisional


@dataclass(frozen=True)
class Thinned(Provisional):
    """``values * kept``. What is left out takes no gradient but keeps its value, and may come back.

    values: (out, in) floating point. kept: (out, in) bool, nowhere True where ``earlier`` is False: the mask that it came with,
    (out, in) bool, or None.
    """

    values: Tensor
    kept: Tensor
    earlier: Tensor | None

    @classmethod
    def start(cls, values: Tensor, mask: Tensor | None) -> Thinned:
        """Nothing more is left out than before."""
        return cls(values, torch.ones_like(values, dtype=torch.bool) if mask is None else mask.clone(), mask)

    def under(self, mask: Tensor) -> Thinned:
        """The same values under another mask."""
        return replace(self, kept=mask if self.earlier is None else mask & self.earlier)

    def final(self) -> Masked:
        """What is left, for good."""
        return Masked(Dense(self.dense()), self.kept)

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        return (self.values * self.kept).to(dtype or self.dtype)

    @property
    def mask(self) -> Tensor:
        return self.kept

    def parameters(self) -> dict[str, Tensor]:
        return {"values": self.values}
