"""What a matrix has become: dense, masked, quantized or factored, closed under composition.

Every weight knows its shape, its dense value, the bytes that its tensors take in a file, and its trainable parameters.
``Masked(Quantized(...))`` is a sparse matrix on an integer grid; ``LowRank(Quantized(...), Quantized(...))`` two quantized
factors. Matrices are (out, in), as in ``nn.Linear``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

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

    @property
    def mask(self) -> Tensor | None:
        """(out, in) bool, False where a weight has been removed for good; None where nothing has."""
        return None

    def masked(self, mask: Tensor) -> Masked:
        """Remove the weights at which ``mask`` (out, in) is False, keeping the representation."""
        raise TypeError(f"a {type(self).__name__} weight takes masks on its factors, not on the product")

    def map(self, function: Callable[[Tensor], Tensor]) -> Any:
        """Apply ``function`` to every tensor inside (a device move, say)."""
        return type(self)(**{name: _mapped(value, function) for name, value in vars(self).items()})


def _mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Weight):
        return value.map(function)
    return function(value) if isinstance(value, Tensor) else value


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
    """A matrix some of whose entries are zero for good. inner: zero wherever kept is False; kept: (out, in) bool."""

    inner: Weight
    kept: Tensor

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
        values_bytes = self.inner.values_nbytes if isinstance(self.inner, Quantized) else float(self.inner.nbytes)
        kept_share = self.numel / elements
        bitmap = elements / 8
        return self.inner.ideal_nbytes - values_bytes + min(values_bytes, values_bytes * kept_share + bitmap)

    @property
    def numel(self) -> int:
        return self.inner.numel if self.kept.is_meta else int(self.kept.sum())

    @property
    def mask(self) -> Tensor:
        return self.kept

    def parameters(self) -> dict[str, Tensor]:
        return self.inner.parameters()

    def rebuild(self, parameters: Mapping[str, Tensor]) -> Masked:
        inner = self.inner.rebuild(parameters)
        # A grid keeps its zeros by its codes; free values must be multiplied by the mask at every step.
        return Masked(Dense(inner.values * self.kept) if isinstance(inner, Dense) else inner, self.kept)

    def masked(self, mask: Tensor) -> Masked:
        both = mask & self.kept
        return Masked(self.inner.masked(both).inner, both)


@dataclass(frozen=True)
class Quantized(Weight):
    """An integer grid per group of consecutive inputs: ``dense = (codes - zero_point) * scale``.

    codes: (out, in) int8 in [-2**(bits-1), 2**(bits-1) - 1]. scale: (out, groups) floating point.
    zero_point: (out, groups) int8 in the codes' range, or None for a symmetric grid.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bits: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.scale.dtype

    @property
    def group_size(self) -> int:
        """Inputs that share a scale; the whole row where there is one group."""
        return self.shape[1] // self.scale.shape[1]

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        out_features, in_features = self.shape
        dtype = dtype or self.dtype
        # transformers opens a symmetric grid in the dtype it computes in, an asymmetric one in the dtype of its scales.
        reader = dtype if self.zero_point is None else self.dtype
        codes = self.codes.reshape(out_features, -1, self.group_size).to(reader)
        if self.zero_point is not None:
            codes = codes - self.zero_point.to(reader).unsqueeze(-1)
        return (codes * self.scale.to(reader).unsqueeze(-1)).reshape(out_features, in_features).to(dtype)

    @property
    def values_nbytes(self) -> float:
        """Bytes of the codes alone, packed without padding."""
        return self.codes.numel() * self.bits / 8

    @property
    def nbytes(self) -> int:
        out_features, in_features = self.shape
        n_bytes = 4 * out_features * math.ceil(in_features * self.bits / 32) + self.scale.numel() * self.scale.element_size()
        if self.zero_point is not None:  # packed along the outputs
            n_bytes += 4 * math.ceil(out_features * self.bits / 32) * self.scale.shape[1]
        return n_bytes + 16  # weight_shape, two int64

    @property
    def ideal_nbytes(self) -> float:
        zero_points = 0 if self.zero_point is None else self.zero_point.numel() * self.bits / 8
        return self.values_nbytes + self.scale.numel() * self.scale.element_size() + zero_points

    @property
    def numel(self) -> int:
        return self.codes.numel()

    def parameters(self) -> dict[str, Tensor]:
        return {"scale": self.scale}

    def rebuild(self, parameters: Mapping[str, Tensor]) -> Quantized:
        return replace(self, scale=parameters["scale"])

    def masked(self, mask: Tensor) -> Masked:
        zero = 0 if self.zero_point is None else self.zero_point.repeat_interleave(self.group_size, dim=1)
        return Masked(replace(self, codes=torch.where(mask, self.codes, zero).to(torch.int8)), mask)


@dataclass(frozen=True)
class LowRank(Weight):
    """A product of two smaller matrices, ``up @ down``; down: (rank, in), up: (out, rank)."""

    down: Weight
    up: Weight

    @property
    def shape(self) -> tuple[int, int]:
        return self.up.shape[0], self.down.shape[1]

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.down.dtype

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        product = self.up.dense(torch.float32) @ self.down.dense(torch.float32)
        return product.to(dtype or self.dtype)

    @property
    def nbytes(self) -> int:
        return self.down.nbytes + self.up.nbytes

    @property
    def ideal_nbytes(self) -> float:
        return self.down.ideal_nbytes + self.up.ideal_nbytes

    @property
    def numel(self) -> int:
        return self.down.numel + self.up.numel

    def parameters(self) -> dict[str, Tensor]:
        return {f"{part}.{k}": v for part in ("down", "up") for k, v in getattr(self, part).parameters().items()}

    def rebuild(self, parameters: Mapping[str, Tensor]) -> LowRank:
        def part(name: str) -> Weight:
            own = {key.partition(".")[2]: value for key, value in parameters.items() if key.startswith(name + ".")}
            return getattr(self, name).rebuild(own)

        return LowRank(part("down"), part("up"))


class Structure(NamedTuple):
    """What later passes must keep of a weight: which entries are zero, which ranks its factors have."""

    mask: Tensor | None
    rank: int | None
    factors: tuple[Structure, ...]


def structure(weight: Weight) -> Structure:
    """The structure that a weight has now."""
    if isinstance(weight, LowRank):
        return Structure(None, weight.rank, (structure(weight.down), structure(weight.up)))
    return Structure(weight.mask, None, ())


def assert_structure_kept(name: str, before: Structure, after: Weight) -> None:
    """Raise RuntimeError unless every zero and rank of ``before`` still holds in ``after``."""
    if before.rank is not None:
        if not isinstance(after, LowRank) or after.rank > before.rank:
            raise RuntimeError(f"{name}: the rank {before.rank} of an earlier pass was lost")
        for part, factor in zip((after.down, after.up), before.factors, strict=True):
            if after.rank == before.rank:
                assert_structure_kept(name, factor, part)
    if before.mask is not None and (after.mask is None or bool((after.mask & ~before.mask).any())):
        raise RuntimeError(f"{name}: the mask of an earlier pass was lost")
    if after.mask is not None and bool(after.dense()[~after.mask].count_nonzero()):
        raise RuntimeError(f"{name}: weights outside the mask are not zero")
