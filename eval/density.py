"""How large a dense model of a family would have to be to do as well: effective parameters and density.

The loss of dense models of one family falls with their size as a power (Kaplan et al., 2001.08361). Read backwards, that curve
says which size has the loss of a compressed model. Its score on tasks is first turned into a loss, by a sigmoid over the same
family (Xiao et al., Densing Law, 2412.04315). Compression pays where density does not fall, or where bits are what is scarce.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict

FEWEST_SIZES, FEWEST_SCORES = 3, 4
INNER = 0.95  # of the sigmoid's range can be turned back into a loss; its flat ends would give any size


class FamilyMember(BaseModel):
    """A dense model of the reference family. parameters: outside embeddings and head. loss: bits per byte of the text task.
    score: mean of the tasks where higher is better, 0..1; None without such tasks."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    label: str
    parameters: float
    loss: float
    score: float | None = None


class ScoreCurve(BaseModel):
    """score = floor + (1 - floor) / (1 + exp(slope * (loss - middle))); slope is positive: lower losses score higher."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    floor: float
    slope: float
    middle: float

    def loss(self, score: float) -> float:
        """The loss at which the curve has that score, the score being kept to the inner 95 % of its range."""
        margin = (1 - INNER) / 2
        share = min(max((score - self.floor) / (1 - self.floor), margin), 1 - margin)
        return self.middle + math.log(1 / share - 1) / self.slope

    def score(self, loss: float) -> float:
        """The score at that loss."""
        return self.floor + (1 - self.floor) / (1 + math.exp(self.slope * (loss - self.middle)))


class Density(BaseModel):
    """The curve of a family of dense models: loss = (critical / parameters) ** exponent.

    task: whose bits per byte are the loss. members: what the curve was fitted to, smallest first. residual: root mean square
    of ln(loss) about the curve. scored: from losses to the mean score of ``score_tasks``; None with fewer than four members or
    where better losses do not score higher. A model's ``effective_parameters`` are those at which the curve has its loss;
    ``density`` is the share of its own parameters that a member of its score, or without scores of its loss, would have;
    ``bit_density`` counts 16 bits of its file for one parameter of its own. Parameters are those outside embeddings and head.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: str
    members: tuple[FamilyMember, ...]
    exponent: float
    critical: float
    residual: float
    score_tasks: tuple[str, ...] = ()
    scored: ScoreCurve | None = None

    def loss(self, parameters: float) -> float:
        """The family's loss at that size."""
        return (self.critical / parameters) ** self.exponent

    def parameters(self, loss: float) -> float:
        """The size at which the family has that loss: the inverse of :meth:`loss`. 0 for an infinite loss."""
        return self.critical / loss ** (1 / self.exponent) if loss < math.inf else 0.0

    def parameters_of(self, loss: float, score: float | None) -> float:
        """The size that the model's score calls for, where scores are known, else its loss."""
        if self.scored is None or score is None:
            return self.parameters(loss)
        return self.parameters(self.scored.loss(score))


def check_sizes(parameters: Sequence[float]) -> None:
    """Raise ValueError where models of these sizes are too few for a curve."""
    if len(set(parameters)) < FEWEST_SIZES:
        raise ValueError(f"a family's curve needs dense models of at least {FEWEST_SIZES} sizes, got {len(parameters)} models")


def fit(task: str, members: Sequence[FamilyMember], score_tasks: Sequence[str] = ()) -> Density:
    """Fit the power law by least squares of logarithms. Raises ValueError for fewer than three sizes, or losses that do not
    fall with size."""
    ordered = tuple(sorted(members, key=lambda member: member.parameters))
    check_sizes([member.parameters for member in ordered])
    sizes = np.log([member.parameters for member in ordered])
    losses = np.log([member.loss for member in ordered])
    slope, offset = np.polyfit(sizes, losses, 1)
    if not slope < 0:
        raise ValueError("the reference models are no family: their losses do not fall with size")
    residual = float(np.sqrt(np.mean((losses - slope * sizes - offset) ** 2)))
    return Density(
        task=task, members=ordered, exponent=float(-slope), critical=float(np.exp(-offset / slope)), residual=residual,
        score_tasks=tuple(score_tasks), scored=_fit_scores(ordered),
    )  # fmt: skip


def _fit_scores(members: Sequence[FamilyMember]) -> ScoreCurve | None:
    """The sigmoid through (loss, score): for each floor a straight line through logits, of which the closest is taken."""
    pairs = [(member.loss, member.score) for member in members if member.score is not None and 0 < member.score < 1]
    if len(pairs) < FEWEST_SCORES:
        return None
    losses, scores = np.array(pairs).T
    best: tuple[float, ScoreCurve] | None = None
    for floor in np.linspace(0, scores.min(), 200, endpoint=False):
        slope, offset = np.polyfit(losses, np.log((1 - floor) / (scores - floor) - 1), 1)
        if not slope > 0:
            continue
        curve = ScoreCurve(floor=float(floor), slope=float(slope), middle=float(-offset / slope))
        error = sum((curve.score(loss) - score) ** 2 for loss, score in pairs)
        if best is None or error < best[0]:
            best = (error, curve)
    return best[1] if best else None
