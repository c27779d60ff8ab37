"""Weights that stock layers cannot hold: products, sums, and parts with tensors of their own.

A composed weight says what its module in ``loader.py`` looks like (``kind`` and ``sizes``), which tensors of its own that
holds, and which child modules it has, so that writing, reading, installing and sizing are one mechanism for all of them.
A new representation is one class here or beside, one module class in ``loader.py``, and both under the same ``kind``.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from compress.weights.grid import Coded, Quantized
from compress.weights.matrix import Masked, Weight

KINDS: dict[str, type[Composed]] = {}
"""Composed weights by kind; a class enters by being defined."""


class Composed(Weight):
    """A weight with a module of its own in the artifact, described there by ``compress_modules``."""

    kind: ClassVar[str]
    tensor_names: ClassVar[tuple[str, ...]] = ()
    """Names of :meth:`tensors`."""

    def __init_subclass__(cls) -> None:
        if "kind" in vars(cls):
            KINDS[cls.kind] = cls

    def sizes(self) -> dict[str, Any]:
        """The numbers (and lists of numbers) that, with the matrix's shape, give the shapes of :meth:`tensors` and children."""
        return {}

    def tensors(self) -> dict[str, Tensor]:
        """Its own tensors by their names inside the module, as the file holds them."""
        return {}

    def children(self) -> dict[str, Weight]:
        """The weights of its child modules, by name."""
        return {}

    @classmethod
    def child_shapes(cls, shape: tuple[int, int], sizes: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
        """Names and shapes of the children of such a weight, (out, in)."""
        return {}

    @classmethod
    @abstractmethod
    def assemble(
        cls, shape: tuple[int, int], sizes: Mapping[str, Any], tensors: Mapping[str, Tensor], children: Mapping[str, Weight]
    ) -> Weight:
        """The inverse of :meth:`sizes`, :meth:`tensors` and :meth:`children`. Meta tensors give a weight of such."""

    @property
    def own_nbytes(self) -> int:
        """Bytes of :meth:`tensors`, of which none is worked out."""
        outlined = self.map(lambda tensor: tensor.to("meta"))
        return sum(tensor.numel() * tensor.element_size() for tensor in outlined.tensors().values())

    @property
    def nbytes(self) -> int:
        return self.own_nbytes + sum(part.nbytes for part in self.children().values())

    @property
    def ideal_nbytes(self) -> float:
        return self.own_nbytes + sum(part.ideal_nbytes for part in self.children().values())

    @property
    def numel(self) -> int:
        return sum(part.numel for part in self.children().values())

    def parameters(self) -> dict[str, Tensor]:
        return {f"{name}/{k}": v for name, part in self.children().items() for k, v in part.parameters().items()}

    def shares(self) -> dict[str, float]:
        own = super().shares()
        return own | {f"{name}/{k}": v for name, part in self.children().items() for k, v in part.shares().items()}

    def _rebuilt_children(self, parameters: Mapping[str, Tensor]) -> dict[str, Weight]:
        def own(name: str) -> dict[str, Tensor]:
            return {key.partition("/")[2]: value for key, value in parameters.items() if key.startswith(name + "/")}

        return {name: part.rebuild(own(name)) for name, part in self.children().items()}


@dataclass(frozen=True)
class LowRank(Composed):
    """A product of two smaller matrices, ``up @ down``; down: (rank, in), up: (out, rank)."""

    kind = "low_rank"
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

    def sizes(self) -> dict[str, int]:
        return {"rank": self.rank}

    def children(self) -> dict[str, Weight]:
        return {"down": self.down, "up": self.up}

    @classmethod
    def child_shapes(cls, shape, sizes) -> dict[str, tuple[int, int]]:
        return {"down": (sizes["rank"], shape[1]), "up": (shape[0], sizes["rank"])}

    @classmethod
    def assemble(cls, shape, sizes, tensors, children) -> LowRank:
        return LowRank(children["down"], children["up"])

    def rebuild(self, parameters: Mapping[str, Tensor]) -> LowRank:
        return LowRank(**self._rebuilt_children(parameters))


@dataclass(frozen=True)
class Sum(Composed):
    """A sum of weights of one shape, such as a grid and a low-rank correction of its error, or a grid and its outliers."""

    kind = "sum"
    parts: tuple[Weight, ...]

    @property
    def shape(self) -> tuple[int, int]:
        return self.parts[0].shape

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].dtype

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        total = self.parts[0].dense(torch.float32)
        for part in self.parts[1:]:
            total = total + part.dense(torch.float32)
        return total.to(dtype or self.dtype)

    @property
    def mask(self) -> Tensor | None:
        masks = [part.mask for part in self.parts]
        if any(mask is None for mask in masks):
            return None
        return torch.stack(masks).any(0)  # type: ignore[arg-type]

    @property
    def numel(self) -> int:
        return sum(part.numel for part in self.parts)

    def sizes(self) -> dict[str, int]:
        return {"n_parts": len(self.parts)}

    def children(self) -> dict[str, Weight]:
        return {f"parts.{i}": part for i, part in enumerate(self.parts)}

    @classmethod
    def child_shapes(cls, shape, sizes) -> dict[str, tuple[int, int]]:
        return {f"parts.{i}": shape for i in range(sizes["n_parts"])}

    @classmethod
    def assemble(cls, shape, sizes, tensors, children) -> Sum:
        return Sum(tuple(children[f"parts.{i}"] for i in range(sizes["n_parts"])))

    def rebuild(self, parameters: Mapping[str, Tensor]) -> Sum:
        return Sum(tuple(self._rebuilt_children(parameters).values()))


def unmasked(weight: Weight) -> Weight:
    """The weight inside a mask."""
    return weight.inner if isinstance(weight, Masked) else weight


def leaves(name: str, weight: Weight) -> list[tuple[str, Weight]]:
    """(module name, weight) of everything in a weight that is not itself made of weights; masks are kept on."""
    inner = unmasked(weight)
    children = inner.children() if isinstance(inner, Composed) else {}
    if not children:
        return [(name, weight)]
    return [leaf for key, part in children.items() for leaf in leaves(f"{name}.{key}", part)]


def settled(weight: Weight, mixed: bool) -> Weight:
    """The same weight, with its integer grids in a file that has other schemes too, or not; see :class:`Quantized`."""
    if all(getattr(unmasked(leaf), "mixed", mixed) == mixed for _, leaf in leaves("", weight)):
        return weight
    if isinstance(weight, Masked):
        return Masked(settled(weight.inner, mixed), weight.kept)
    if isinstance(weight, Composed):
        children = {name: settled(part, mixed) for name, part in weight.children().items()}
        return type(weight).assemble(weight.shape, weight.sizes(), weight.tensors(), children)
    return replace(weight, mixed=mixed) if isinstance(weight, Quantized) else weight


def spec_of(weight: Weight, *, conv1d: bool = False) -> dict[str, Any] | None:
    """What module a weight needs in place of the architecture's own, as ``compress_modules`` says it; None: its own.

    conv1d: the architecture's own stores its matrix as (in, out), which compressed-tensors does not know.
    """
    inner = unmasked(weight)
    if isinstance(inner, Composed):
        children = {name: spec for name, part in inner.children().items() if (spec := spec_of(part))}
        return {"kind": inner.kind, **inner.sizes(), **({"children": children} if children else {})}
    return {"kind": "linear"} if conv1d and isinstance(inner, Coded) and inner.library == "compressed-tensors" else None
