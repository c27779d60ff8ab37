"""Passes whose layers can be opened at any size: what they have in common is the order in which parts are to be taken."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from pydantic import Field, PrivateAttr
from typing_extensions import Self

from compress.apply import apply
from compress.budget import slopes
from compress.passes import LinearPass, Needs
from compress.stats import LinearStats
from compress.weights import Weight, prefix, stacks


class StackPass(LinearPass):
    """Base of the methods that make of a matrix a :class:`compress.weights.Stack`, of which `compress open` takes a prefix.

    The order of the parts of all layers is that of how much each brings the output of its block nearer to what it was, per
    byte, measured for one layer at a time before the stage. Where a later part of a layer would be worth more than an earlier
    one, the two count as one.
    """

    order: Literal["effect", "level"] = Field(
        "effect",
        description="of the parts: by measured effect per byte; level: every layer's next part before any layer's second",
    )
    _priorities: tuple[float, ...] = PrivateAttr(())

    @property
    def surveys(self) -> Needs | None:
        return Needs(self.needs.stats, inputs=True) if self.order == "effect" else None

    def survey(self, weight: Weight, stats: LinearStats, effect: Callable[[Weight], float]) -> Any:
        whole = apply(self, weight, stats)
        openings = [prefix(whole, count + 1) for count in range(max(stack.n_parts for stack in stacks(whole)))]
        return {"nbytes": [opened.nbytes for opened in openings], "effects": [effect(opened) for opened in openings]}

    def allocate(self, found: dict[str, Any], groups: Sequence[tuple[str, ...]]) -> dict[str, StackPass]:
        return {name: self._ordered(slopes(own["nbytes"], own["effects"])) for name, own in found.items()}

    def _ordered(self, priorities: Sequence[float]) -> Self:
        """This pass with the priorities of one layer's parts."""
        own = self.model_copy()
        own._priorities = tuple(float(f"{priority:.5g}") for priority in priorities)
        return own

    def priorities(self, n_parts: int) -> tuple[float, ...]:
        """Of all parts but the first, falling: as they were measured, or level by level."""
        return self._priorities or tuple(-float(level) for level in range(1, n_parts))
