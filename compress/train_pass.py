"""The kind of pass that trains what is left of the model, and what its loss is given; ``train.py`` runs the loop."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NamedTuple

from pydantic import Field, model_validator
from torch import Tensor, nn

from compress.passes import Pass, Patterns, matches_any
from compress.weights import Weight

if TYPE_CHECKING:
    from compress.rollouts import Rollouts


class Signal(NamedTuple):
    """What a model says about a batch, before its logits exist: they are big, and a loss computes them piece by piece.

    hidden: (tokens, d), whatever ``head`` makes logits of: final hidden states. head: (n, d) -> (n, vocabulary). Only tokens
    whose next one is to be predicted are there. states: of passes whose ``needs`` names them, (tokens, d') each: what enters
    every block, and at last what the final norm puts out, at the same tokens.
    """

    hidden: Tensor
    head: Callable[[Tensor], Tensor]
    states: tuple[Tensor, ...] = ()


class Batch(NamedTuple):
    """What a step trains on: one part of its sequences.

    tokens: (n, length) int64. counted: (n, length) bool, the tokens that are to be predicted (not those of a prompt, or of
    padding; the first of a window never is); None: all of them. index: of the step. extras: (n, length) each, by name, of what a
    pass itself has put there in ``prepare``. aids: the modules that the pass asked for, if it did.
    """

    tokens: Tensor
    counted: Tensor | None = None
    index: int = 0
    extras: dict[str, Tensor] = {}
    aids: nn.Module | None = None

    def at_predicted(self, values: Tensor) -> Tensor:
        """Of values (n, length, ...) those at the tokens that are to be predicted: (tokens, ...), window after window."""
        values = values[:, 1:]
        return values.flatten(0, 1) if self.counted is None else values[self.counted[:, 1:]]

    def before_predicted(self, values: Tensor) -> Tensor:
        """Of values (n, length, ...) those at the places from which these tokens are predicted, one before each."""
        values = values[:, :-1]
        return values.flatten(0, 1) if self.counted is None else values[self.counted[:, 1:]]

    @property
    def targets(self) -> Tensor:
        """(tokens,) int64: the tokens to predict."""
        return self.at_predicted(self.tokens)

    @property
    def windows(self) -> Tensor:
        """(tokens,) int64: which window of the batch each of the tokens to predict belongs to."""
        numbers = self.tokens.new_ones(self.tokens.shape).cumsum(0) - 1
        return self.at_predicted(numbers)


class TrainPass(Pass):
    """A pass that trains what is left of the model: a loss; ``train.py`` runs the loop. It may remove weights on the way.

    steps: optimiser steps (AdamW). batch_size: sequences per step.
    accumulate: equal parts in which a step's batch is computed, one after the other, to fit in memory.
    length: tokens per sequence; None: the calibration's. data: what to train on, named as calibration data is; None: the
    calibration's.
    learning_rate: peak of a schedule that is reached after ``warmup`` of the steps. A weight moves by about this
    much a step; the scale of a b-bit grid by 2**(1-b) of it, because the largest code multiplies the move.
    weight_decay: of dense matrices and factors only. gradient_clip: largest norm of all gradients together.
    trains: "factors": the factors of low-rank layers alone; "weights": the blocks' linear layers in the form they have (kept
    values, factors, scales of grids; masks, ranks, codes and zero points stay); "blocks": norms and biases too; "everything":
    embeddings and output head too. targets, skip: which linear layers, by shell patterns over their names or the names of
    their parts (``*.up``).
    """

    steps: int = Field(200, ge=1, description="optimiser steps")
    batch_size: int = Field(8, ge=1, description="sequences per step")
    accumulate: int = Field(1, ge=1, description="parts in which a step's batch is computed")
    length: int | None = Field(None, ge=2, description="tokens per sequence; none: the calibration's")
    data: str | None = Field(None, description="text to train on; none: the calibration's")
    learning_rate: float = Field(1e-4, gt=0, description="peak, followed by the schedule's fall")
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the steps")
    weight_decay: float = Field(0.0, ge=0, description="of matrices and factors")
    gradient_clip: float = Field(1.0, gt=0, description="largest norm of all gradients together")
    trains: Literal["factors", "weights", "blocks", "everything"] = Field(
        "blocks",
        description="factors: of low-rank layers alone; weights: all linear layers; blocks: norms and biases too; everything: "
        "embeddings and head too",
    )
    targets: Patterns = ("*",)
    skip: Patterns = ()

    @model_validator(mode="after")
    def _parts_are_equal(self) -> TrainPass:
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size={self.batch_size} is not a multiple of accumulate={self.accumulate}")
        return self

    def trains_layer(self, name: str) -> bool:
        """Whether the matrix of that name, of a linear layer or of a part of one, is trained."""
        return matches_any(name, self.targets) and not matches_any(name, self.skip)

    def outline(self, weight: Weight) -> Weight:
        """What a linear layer, a weight of meta tensors, will become. Raises ValueError where it cannot be handled."""
        return weight

    def choose(self, index: int, values: Tensor, mask: Tensor | None) -> Tensor | None:
        """Which entries of a matrix take part in training from the step with that index on: a mask (out, in) bool, or None
        where nothing changes. Asked before every step, for every matrix and factor that is not on a grid.

        values: (out, in) float32, as trained by now; an entry that is left out takes no gradient, but is still there. mask: that
        of earlier passes, None where they removed nothing; what it removed stays removed. The last choice is the result's mask.
        """
        return None

    def learning_rate_at(self, index: int) -> float:
        """Learning rate of the step with that index: a linear warm-up to the peak, then half a cosine towards 0."""
        n_warmup = int(self.warmup * self.steps)
        if index < n_warmup:
            return self.learning_rate * (index + 1) / n_warmup
        return self.learning_rate * (1 + math.cos(math.pi * (index - n_warmup) / (self.steps - n_warmup))) / 2

    def aids(self, student_sizes: tuple[int, ...], teacher_sizes: tuple[int, ...]) -> nn.Module | None:
        """Modules of the pass's own that are trained along, and dropped in the end: ``loss`` finds them in the batch.

        student_sizes, teacher_sizes: the widths of the models' ``states``; () where a pass does not need any.
        """
        return None

    def prepare(self, batch: Batch, rollouts: Rollouts) -> Batch:
        """What a part of a step is really trained on, for passes that let a model write: by default the text itself.

        Called without gradients, before ``loss``; a function of its arguments alone, so that an interrupted run can resume.
        """
        return batch

    def loss(self, student: Signal, teacher: Signal | None, batch: Batch) -> Tensor:
        """The scalar to minimise: a mean over the tokens that are to be predicted.

        student, teacher: their signals at the same tokens; only the student's takes gradients, and the teacher's is
        None unless ``needs`` asks for it.
        """
        raise NotImplementedError(type(self).__name__)
