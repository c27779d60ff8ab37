"""Mixed precision: measure once how much every layer's rounding disturbs its block, then share out an average of true bits
so that the sum of disturbances is least (the budgeted allocation of HAQ, 1811.08886, and HAWQ-V2, 1911.03852)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator
from torch import Tensor

from compress import methods
from compress.apply import apply, outline
from compress.budget import share_out
from compress.passes import LinearPass, Needs, StreamPass, Taxon
from compress.stats import LinearStats
from compress.weights import Weight

_REFINED_BITS = 4  # up to which finer groups are tried too: beyond, another bit is the better buy


class Mixed(StreamPass):
    """Bits and group size of every layer, chosen to meet an average exactly: at most ``bits``, scales and all else in the
    file counted, and as close below it as the layers' sizes allow.

    Layers that share an input (q/k/v, gate/up) share a scheme, since fused runtimes need it. The disturbance of a choice is
    that of the block's output, relative to it, when this layer alone is quantized by ``quantizer`` with that choice.
    """

    taxon: ClassVar[Taxon] = Taxon.WEIGHT_ONLY
    paper: ClassVar[str] = "1911.03852"
    needs: ClassVar[Needs] = Needs(frozenset({"hessian"}))

    bits: float = Field(3.2, ge=2, le=8, description="average true bits per weight, scales counted")
    choices: tuple[int, ...] = Field((2, 3, 4, 5, 6, 8), description="bits to choose from")
    group_size: int = Field(128, ge=32, description="consecutive inputs that share a scale; halves and quarters are tried too")
    quantizer: Literal["gptq", "rtn"] = Field("gptq", description="what rounds the layers")

    @field_validator("choices", mode="before")
    @classmethod
    def _choices_from_text(cls, value: object) -> object:
        return tuple(str(value).split("+")) if isinstance(value, str | int) else value

    @property
    def surveys(self) -> Needs:
        return self.needs._replace(inputs=True)

    def candidates(self) -> list[LinearPass]:
        """The quantizers to choose from, coarsest first."""
        found = []
        for bits in sorted(self.choices):
            for divisor in (1, 2, 4) if bits <= _REFINED_BITS else (1,):
                step = methods.build(self.quantizer, {"bits": bits, "group_size": self.group_size // divisor})
                assert isinstance(step, LinearPass)
                found.append(step)
        return found

    def outline(self, weight: Tensor, stats: LinearStats, mask: Tensor | None) -> Weight:
        """The largest uniform choice within the budget: the survey, which a plan does not make, decides what it will be."""
        outlines = [step.outline(weight, stats, mask) for step in self.candidates()]
        within = [outline for outline in outlines if 8 * outline.nbytes <= self.bits * weight.numel()]
        return max(within, key=lambda outline: outline.nbytes) if within else min(outlines, key=lambda outline: outline.nbytes)

    def check_budget(self, weights: Sequence[Weight]) -> None:
        least = sum(min(outline(step, weight).nbytes for step in self.candidates()) for weight in weights)
        n_weights = sum(weight.shape[0] * weight.shape[1] for weight in weights)
        if 8 * least > self.bits * n_weights:
            raise ValueError(f"the choices take at least {8 * least / n_weights:.3f} bits per weight here")

    def survey(self, weight: Weight, stats: LinearStats, effect: Callable[[Weight], float]) -> Any:
        rows = []
        for step in self.candidates():
            quantized = apply(step, weight, stats)
            rows.append((quantized.nbytes, effect(quantized)))
        n_weights = weight.shape[0] * weight.shape[1]
        return {"n_weights": n_weights, "nbytes": [row[0] for row in rows], "effects": [row[1] for row in rows]}

    def allocate(self, found: dict[str, Any], groups: Sequence[tuple[str, ...]]) -> dict[str, LinearPass]:
        units = [members for group in groups if (members := [name for name in group if name in found])]
        costs = [_sums(found, unit, "nbytes") for unit in units]
        losses = [_sums(found, unit, "effects") for unit in units]
        budget = int(self.bits * sum(layer["n_weights"] for layer in found.values()) / 8)
        steps = self.candidates()
        picked = share_out(costs, losses, budget)
        return {name: steps[index] for unit, index in zip(units, picked, strict=True) for name in unit}


def _sums(found: dict[str, Any], unit: Sequence[str], key: str) -> list:
    return [sum(values) for values in zip(*(found[name][key] for name in unit), strict=True)]
