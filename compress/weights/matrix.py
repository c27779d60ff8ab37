"""The base of all representations, the plain matrix and the masked one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


class Weight(ABC):
    """A matrix in some representation."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(out, in)."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Storage dtype of the floating-point parts."""

    @abstractmethod
    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The (out, in) matrix that a reader of the artifact computes in ``dtype`` (default: the storage dtype)."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of its tensors in a checkpoint file."""

    @property
    def values_nbytes(self) -> float:
        """Bytes of the entries alone, packed without padding: what zeros could save."""
        return float(self.nbytes)

    @property
    def ideal_nbytes(self) -> float:
        """Bytes with zeros stored as a bitmap and codes packed without padding: what the information needs."""
        return float(self.nbytes)

    @property
    @abstractmethod
    def numel(self) -> int:
        """Stored numbers (kept weights, factors), leaving scales and indices out."""

    @abstractmethod
    def parameters(self) -> dict[str, Tensor]:
        """The floating-point tensors that training may move; masks, codes and ranks are not among them."""

    @abstractmethod
    def rebuild(self, parameters: Mapping[str, Tensor]) -> Weight:
        """The same structure around other values of :meth:`parameters`; ``dense`` stays differentiable in them."""

    def shares(self) -> dict[str, float]:
        """By which share of the learning rate each of :meth:`parameters` is to move, so that no weight moves faster than
        one that is trained directly: 1, or for the scale of a b-bit grid, which codes up to 2**(b-1) multiply, 2**(1-b)."""
        return dict.fromkeys(self.parameters(), 1.0)

    @property
    def mask(self) -> Tensor | None:
        """(out, in) bool, False where a weight has been removed for good; None where nothing has."""
        return None

    def masked(self, mask: Tensor) -> Masked:
        """Remove the weights at which ``mask`` (out, in) is False, keeping the representation."""
        raise TypeError(f"a {type(self).__name__} weight takes masks on its parts, not on the whole")

    def map(self, function: Callable[[Tensor], Tensor]) -> Any:
        """Apply ``function`` to every tensor inside (a device move, say)."""
        return type(self)(**{name: _mapped(value, function) for name, value in vars(self).items()})


def _mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Weight):
        return value.map(function)
    if isinstance(value, tuple):
        return tuple(_mapped(item, function) for item in value)
    return function(value) if isinstance(value, Tensor) else value


@dataclass(frozen=True)
class Provisional(Weight):
    """A matrix in a form that is trained and never stored; it counts as what it ends as."""

    @abstractmethod
    def final(self) -> Weight:
        """What it ends as, from where it is now."""

    @property
    def nbytes(self) -> int:
        return self.final().nbytes

    @property
    def numel(self) -> int:
        return self.final().numel

    def rebuild(self, parameters: Mapping[str, Tensor]) -> Weight:
        return replace(self, **parameters)


@dataclass(frozen=True)
class Dense(Weight):
    """A plain matrix; values: (out, in) floating point."""

    values: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.values.to(dtype or self.dtype)

    @property
    def nbytes(self) -> int:
        return self.values.numel() * self.values.element_size()

    @property
    def numel(self) -> int:
        return self.values.numel()

    def parameters(self) -> dict[str, Tensor]:
        return {"values": self.values}

    def rebuild(self, parameters: Mapping[str, Tensor]) -> Dense:
        return Dense(parameters["values"])

    def masked(self, mask: Tensor) -> Masked:
        return Masked(Dense(self.values * mask), mask)


@dataclass(frozen=True)
class Masked(Weight):
    """A matrix some of whose entries are zero for good. inner: zero wherever kept is False; kept: (out, in) bool.
    n_kept: how many entries a mask on the meta device will keep, None where that is not known."""

    inner: Weight
    kept: Tensor
    n_kept: int | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.inner.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.inner.dtype

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.inner.dense(dtype)

    @property
    def nbytes(self) -> int:
        return self.inner.nbytes

    @property
    def ideal_nbytes(self) -> float:
        elements = self.kept.numel()
        values_bytes = self.inner.values_nbytes
        kept_share = self.numel / elements
        bitmap = elements / 8
        return self.inner.ideal_nbytes - values_bytes + min(values_bytes, values_bytes * kept_share + bitmap)

    @property
    def numel(self) -> int:
        if not self.kept.is_meta:
            return int(self.kept.sum())
        return self.inner.numel if self.n_kept is None else self.n_kept

    @property
    def mask(self) -> Tensor:
        return self.kept

    def parameters(self) -> dict[str, Tensor]:
        return self.inner.parameters()

    def shares(self) -> dict[str, float]:
        return self.inner.shares()

    def rebuild(self, parameters: Mapping[str, Tensor]) -> Masked:
        inner = self.inner.rebuild(parameters)
        # A grid keeps its zeros by its codes; free values must be multiplied by the mask at every step.
        return Masked(Dense(inner.values * self.kept) if isinstance(inner, Dense) else inner, self.kept)

    def masked(self, mask: Tensor) -> Masked:
        both = mask & self.kept
        return Masked(self.inner.masked(both).inner, both)


def counted(weight: Weight, *known: Weight) -> Weight:
    """A weight of meta tensors with what is known of how many entries its mask keeps: as few as the fewest of those ``known``,
    which are what it was or is made of."""
    counts = [part.n_kept for part in known if isinstance(part, Masked) and part.n_kept is not None]
    return replace(weight, n_kept=min(counts)) if counts and isinstance(weight, Masked) else weight
