"""What low bits cost: how a quantized model's loss falls with bits per weight, and what its training has to do with that.

The loss that quantization adds grows with the tokens D that a model was trained on, and falls with its parameters N and with
the bits P (Ouyang et al., Low-Bit Quantization Favors Undertrained LLMs, 2411.17691): k * D**beta / (N**alpha * P**gamma), in
nats per token. A model that has learned more has more to lose. A report's own runs are of one model, so that N and D are in
their constant, and what is fitted to them is scale / bits**exponent.

The constants of the published law are those that public summaries of the paper state (k and four figures of each exponent one
of them, two figures of alpha and beta two); the paper itself was not at hand to confirm them, nor whether its P counts scales.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
from pydantic import BaseModel, ConfigDict

from compress.amounts import format_count

FEWEST_WIDTHS, APART = 3, 0.1
USUAL = 3
"""Bits at which a report's runs and the published law are set side by side."""
WORTH = 0.1
"""Nats per token that low bits may cost: 10.5 % more perplexity."""
RUINED = 5.0  # nats per token; beyond it a number says no more
BEST_SPENT = 20  # tokens for each parameter that spend compute best (Hoffmann et al., 2203.15556)

K, ALPHA, BETA, GAMMA = 0.017, 0.2261, 0.5251, 5.4967
FITTED = {"parameters": (160e6, 12e9), "tokens": (1e9, 206e9), "bits": (2.0, 4.0)}
"""What the published law was fitted to: Pythia models by GPTQ."""


class BitLaw(BaseModel):
    """loss = scale / bits ** exponent, in nats per token above the base model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    scale: float
    exponent: float

    def loss(self, bits: float) -> float:
        """The loss that so many bits per weight add."""
        return self.scale / bits**self.exponent

    def bits(self, loss: float = WORTH) -> float:
        """The bits per weight that add this loss; fewer add more. The inverse of :meth:`loss`."""
        return (self.scale / loss) ** (1 / self.exponent)


class BitCurve(BitLaw):
    """The law of one recipe's runs. labels: what it was fitted to, fewest bits first. residual: root mean square of ln(loss)
    about it."""

    recipe: str
    labels: tuple[str, ...]
    residual: float


class QuantizedRun(BaseModel):
    """One measured model. recipe: its passes, the quantizers without their options. bits: per weight of the compressed layers,
    scales and indices included. loss: above the base model's on the held-out windows, nats per token. error: its standard
    error, where known."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    label: str
    recipe: str
    bits: float
    loss: float
    error: float | None = None

    @property
    def is_told(self) -> bool:
        """Whether the loss is told from none at all."""
        return self.loss > 2 * (self.error or 0.0)


class Smaller(BaseModel):
    """A dense model of the reference family that takes as many bits as a run, kept at more bits per weight: its parameters, its
    bits, and both models' loss, in the family's units."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    label: str
    parameters: float
    bits: float
    loss: float
    run_loss: float


class LowBits(BaseModel):
    """runs: those that quantize, and do nothing else that loses. curves: of the recipes that have one; without: why another has
    none. parameters: of the base model, outside embeddings and head. training_tokens: that it was trained on. published: the
    published law for those; None where they are not known. smaller: what the same bits would do in a smaller model; None where
    no reference family says it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    runs: tuple[QuantizedRun, ...]
    curves: tuple[BitCurve, ...] = ()
    without: dict[str, str] = {}
    parameters: int | None = None
    training_tokens: int | None = None
    published: BitLaw | None = None
    smaller: Smaller | None = None

    def curve_of(self, run: QuantizedRun) -> BitCurve | None:
        """The curve of the run's recipe."""
        return next((curve for curve in self.curves if curve.recipe == run.recipe), None)

    def words(self) -> list[str]:
        """What follows from it, a sentence or two each."""
        return [*self._own_words(), *self._training_words(), *self._smaller_words()]

    def widths(self, curve: BitCurve) -> tuple[float, float]:
        """The fewest and the most bits that a curve was fitted to."""
        bits = {run.label: run.bits for run in self.runs}
        return bits[curve.labels[0]], bits[curve.labels[-1]]

    def _own_words(self) -> Iterator[str]:
        for curve in self.curves:
            least, most = self.widths(curve)
            yield (
                f"{curve.recipe}: by its own {len(curve.labels)} runs of {least:.2f} to {most:.2f} bits per weight, "
                f"loss = {curve.scale:.3g} / bits^{curve.exponent:.2f} (residual {curve.residual:.2g} in ln loss). "
                f"{_passing(curve, (least, most))}."
            )
        for reason in dict.fromkeys(self.without.values()):
            recipes = [recipe for recipe, own in self.without.items() if own == reason]
            yield f"No curve for {', '.join(recipes)}: {reason}."
        if len(self.without) > 1:
            yield "A curve through runs of different recipes would mean nothing."

    def _training_words(self) -> Iterator[str]:
        if self.training_tokens is None:
            return
        if self.published is None or self.parameters is None:
            yield "The published law needs the base model's size outside embeddings, which these measurements do not hold."
            return
        level = self.training_tokens / self.parameters
        yield (
            f"The base model was trained on {format_count(self.training_tokens)} tokens, {level:,.0f} for each of its "
            f"{format_count(self.parameters)} parameters outside embeddings; about {BEST_SPENT} spend compute best."
        )
        losses = ", ".join(f"{_nats(self.published.loss(bits))} at {bits} bits" for bits in (2, 3, 4))
        yield (
            f"The published law (2411.17691) says for that size and training: {losses} (nats per token). "
            f"{_passing(self.published, FITTED['bits'], 'the range that it was fitted on')}. {self._against_best_spent(level)}"
        )
        known = [curve for curve in self.curves if self.widths(curve)[0] <= USUAL <= self.widths(curve)[1]]
        if best := min(known, key=lambda curve: curve.loss(USUAL), default=None):
            yield (
                f"What was measured counts for more: {best.recipe} loses {_nats(best.loss(USUAL))} at {USUAL} bits, where the "
                f"published law says {_nats(self.published.loss(USUAL))}."
            )
        outside = [
            f"{format_count(value)} {name}"
            for name, value in (("parameters", self.parameters), ("tokens", self.training_tokens))
            if not FITTED[name][0] <= value <= FITTED[name][1]
        ]
        ranges = "160M to 12B parameters, trained on 1B to 206B tokens, by GPTQ at 2 to 4 bits"
        yield f"That law was fitted to models of {ranges}" + (
            f": here it is an extrapolation, as {' and '.join(outside)} {'are' if len(outside) > 1 else 'is'} outside."
            if outside else ", other models and data: here too it is an extrapolation."
        )  # fmt: skip

    def _against_best_spent(self, level: float) -> str:
        """Whether it is the training that makes low bits a bad bargain."""
        assert self.parameters is not None and self.published is not None
        here, there = self.published.bits(), published_law(self.parameters, BEST_SPENT * self.parameters).bits()
        if level <= BEST_SPENT:
            return "A model trained so little gives up bits cheaply."
        return (
            f"A model of this size that was trained on {BEST_SPENT} tokens a parameter would at {there:.1f} bits: the training "
            f"of this one makes fewer than {here:.1f} a bad bargain, by that law."
        )

    def _smaller_words(self) -> Iterator[str]:
        if (other := self.smaller) is None:
            return
        verdict = "lose less" if other.loss < other.run_loss else "not lose less"
        yield (
            f"In the bits of {other.label}, a dense model of the reference family of {format_count(other.parameters)} parameters "
            f"could be kept at {other.bits:.1f} bits; if it lost there what this one does, it would come to {other.loss:.3f} "
            f"bits per byte, and {other.label} has {other.run_loss:.3f}: a smaller model at more bits would {verdict}."
        )


def published_law(parameters: float, tokens: float) -> BitLaw:
    """The published law for a model of that size, outside embeddings and head, and training."""
    return BitLaw(scale=K * tokens**BETA / parameters**ALPHA, exponent=GAMMA)


def fit(recipe: str, runs: Sequence[QuantizedRun]) -> BitCurve:
    """The law of one recipe, by least squares of logarithms, over the runs whose loss is told from none.

    Raises ValueError for fewer than three widths, a tenth of a bit apart, or a loss that does not fall with bits.
    """
    told = sorted((run for run in runs if run.is_told), key=lambda run: run.bits)
    n_widths = sum(wider - bits >= APART for bits, wider in pairwise([-math.inf, *(run.bits for run in told)]))
    if n_widths < FEWEST_WIDTHS:
        lost = len(runs) - len(told)
        aside = f", and {lost} whose loss is not told from none" if lost else ""
        raise ValueError(f"it takes {FEWEST_WIDTHS} widths that cost something, and there {_are(n_widths)}{aside}")
    bits, losses = np.log([run.bits for run in told]), np.log([run.loss for run in told])
    slope, offset = np.polyfit(bits, losses, 1)
    if not slope < 0:
        raise ValueError("its loss does not fall with bits")
    return BitCurve(
        recipe=recipe, labels=tuple(run.label for run in told), scale=float(np.exp(offset)), exponent=float(-slope),
        residual=float(np.sqrt(np.mean((losses - slope * bits - offset) ** 2))),
    )  # fmt: skip


def _passing(law: BitLaw, known: tuple[float, float], range_of: str = "what was measured") -> str:
    bits = law.bits()
    where = "" if known[0] <= bits <= known[1] else f", {'below' if bits < known[0] else 'above'} {range_of}"
    return f"It passes {WORTH:g} nats per token ({math.expm1(WORTH):.1%} more perplexity) at {bits:.1f} bits{where}"


def _are(n: int) -> str:
    return f"{'is' if n == 1 else 'are'} {n or 'none'}"


def _nats(loss: float) -> str:
    return f"{loss:.2g}" if loss <= RUINED else f"more than {RUINED:g}"
