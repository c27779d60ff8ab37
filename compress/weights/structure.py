"""What later passes must keep of a weight: zeros, ranks, and the parts it is made of."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from compress.weights.composed import Composed, LowRank, Sum
from compress.weights.matrix import Masked, Weight


class Structure(NamedTuple):
    """mask: (out, in) bool or None, False where a weight has been removed. kind: of a composed weight, with its rank where
    it is a low-rank one, and the structure of its parts by name."""

    mask: Tensor | None
    kind: str | None = None
    rank: int | None = None
    parts: dict[str, Structure] = {}


def structure(weight: Weight) -> Structure:
    """The structure that a weight has now."""
    inner = weight.inner if isinstance(weight, Masked) else weight
    if not isinstance(inner, Composed):
        return Structure(weight.mask)
    rank = inner.rank if isinstance(inner, LowRank) else None
    parts = {name: structure(part) for name, part in inner.children().items()}
    return Structure(weight.mask, inner.kind, rank, parts)


def assert_structure_kept(name: str, before: Structure, after: Weight) -> None:
    """Raise RuntimeError unless every zero and rank of ``before`` still holds in ``after``."""
    inner = after.inner if isinstance(after, Masked) else after
    if before.kind != Sum.kind and isinstance(inner, Sum):  # the first part is what it was; the others were added to it
        first = inner.parts[0]
        inner = first.inner if isinstance(first, Masked) else first
    if before.rank is not None:
        if not isinstance(inner, LowRank) or inner.rank > before.rank:
            raise RuntimeError(f"{name}: the rank {before.rank} of an earlier pass was lost")
        if inner.rank == before.rank:
            _assert_parts_kept(name, before, inner)
    elif before.parts and isinstance(inner, Composed) and inner.kind == before.kind:
        _assert_parts_kept(name, before, inner)
    mask = after.mask
    if before.mask is not None and (mask is None or bool((mask & ~before.mask).any())):
        raise RuntimeError(f"{name}: the mask of an earlier pass was lost")
    if mask is not None and bool(after.dense()[~mask].count_nonzero()):
        raise RuntimeError(f"{name}: weights outside the mask are not zero")


def _assert_parts_kept(name: str, before: Structure, after: Composed) -> None:
    parts = after.children()
    for key, structure_before in before.parts.items():
        if key not in parts:
            raise RuntimeError(f"{name}: its part {key} of an earlier pass was lost")
        assert_structure_kept(f"{name}.{key}", structure_before, parts[key])
