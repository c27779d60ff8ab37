"""The kind of pass that trains what is left of the model, and what its loss is given; ``train.py`` runs the loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from compress.passes import Pass, Patterns, matches_any
from compress.weights import Provisional, Weight

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from compress.rollouts import Rollouts

_SCALES = ("scale", "absmax")
"""What weights on grids call the parameters that their codes are multiplied by."""


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
    pass itself has put there in ``prepare``. aids: the modules that the pass asked for, if it did. rows: (n,) int64, which
    windows of the training data these are, or were before a model wrote. tasks: (n, length) int8, the task that each token
    belongs to, where the data has several.
    """

    tokens: Tensor
    counted: Tensor | None = None
    index: int = 0
    extras: dict[str, Tensor] = {}
    aids: nn.Module | None = None
    rows: Tensor | None = None
    tasks: Tensor | None = None

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
    learning_rate: peak of a schedule that is reached after ``warmup`` of the steps; then it falls to 0 along half a cosine or a
    line, stays ("constant"), or stays until the last ``decay`` of the steps and falls along a line ("wsd", after MiniCPM's
    warmup-stable-decay, 2404.06395). A weight moves by about this much a step; the scale of a b-bit grid by 2**(1-b) of it,
    because the largest code multiplies the move.
    weight_decay: of dense matrices and factors only. gradient_clip: largest norm of all gradients together.
    trains: "scales": the scales of grids alone; "factors": the factors of low-rank layers alone; "weights": the blocks' linear
    layers in the form they have (kept values, factors, scales of grids; masks, ranks, codes and zero points stay); "blocks":
    norms and biases too; "everything": embeddings and output head too. targets, skip: which linear layers, by shell patterns
    over their names or the names of their parts (``*.up``).
    checkpointing: keep only what enters each block for the backward pass, which computes the rest again: a third more time,
    for activations of one block in memory instead of all.
    hold_out: share of the windows, a batch at least, that is never trained on; 0, or fewer than two batches: none. The loss on
    them is measured at the start, every ``evaluate_every`` steps and at the end. patience: stop after so many measurements that
    were no better than an earlier one, and give back the parameters at the best; None: go on to the end and keep the last.
    teacher: another checkpoint, as a directory or hub id, instead of the model that the run began with; it must have the same
    tokenizer. correct: steps of the text's own next-token loss that the teacher is trained for before it teaches, with the pass's
    batches, learning rate and schedule ("teacher correction", Muralidharan et al., 2408.11796): where the original has not seen
    this kind of text, the text knows better than it. As it is at its best on held-out windows it then teaches. cache: compute its
    predictions once, keep the ``cache`` likeliest tokens of each on disk with the mass of the rest, for this run and all later
    ones (see ``teacher.py`` for the error); None: keep the teacher in memory.
    """

    steps: int = Field(200, ge=1, description="optimiser steps")
    batch_size: int = Field(8, ge=1, description="sequences per step")
    accumulate: int = Field(1, ge=1, description="parts in which a step's batch is computed")
    length: int | None = Field(None, ge=2, description="tokens per sequence; none: the calibration's")
    data: str | None = Field(None, description="text to train on; none: the calibration's")
    learning_rate: float = Field(1e-4, gt=0, description="peak, followed by the schedule's fall")
    schedule: Literal["cosine", "wsd", "linear", "constant"] = Field("cosine", description="how the learning rate falls")
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the steps")
    decay: float = Field(0.2, gt=0, le=1, description="share of the steps at the end in which wsd falls")
    weight_decay: float = Field(0.0, ge=0, description="of matrices and factors")
    gradient_clip: float = Field(1.0, gt=0, description="largest norm of all gradients together")
    trains: Literal["scales", "factors", "weights", "blocks", "everything"] = Field(
        "blocks",
        description="scales: of grids alone; factors: of low-rank layers alone; weights: all linear layers; blocks: norms and "
        "biases too; everything: embeddings and head too",
    )
    targets: Patterns = ("*",)
    skip: Patterns = ()
    checkpointing: bool = Field(False, description="compute blocks again in the backward pass: more time, less memory")
    hold_out: float = Field(0.02, ge=0, le=0.5, description="share of the windows that is not trained on; 0: none")
    evaluate_every: int = Field(50, ge=1, description="steps between losses on held-out windows")
    patience: int | None = Field(None, ge=1, description="stop after so many of these that are no better, and keep the best")
    teacher: str | None = Field(None, description="another checkpoint as the teacher; none: the model that the run began with")
    correct: int = Field(0, ge=0, description="steps that first fit the teacher itself to this text; 0: none")
    cache: int | None = Field(None, ge=1, description="keep only so many of its likeliest tokens, on disk; none: keep it loaded")

    @model_validator(mode="after")
    def _settings_agree(self) -> TrainPass:
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size={self.batch_size} is not a multiple of accumulate={self.accumulate}")
        if self.patience and not self.hold_out:
            raise ValueError("patience needs windows to judge by: give hold_out")
        if self.patience and self.chooses:
            raise ValueError(f"patience goes back to earlier values, and {self.method()} has chosen for later ones: leave it out")
        if (self.teacher or self.correct or self.cache) and not self.needs.teacher:
            raise ValueError(f"{self.method()} has no teacher: leave out teacher, correct and cache")
        if self.cache and (self.writes or self.needs.states):
            raise ValueError(f"{self.method()} asks its teacher for more than can be kept on disk: leave out cache")
        return self

    @property
    def writes(self) -> bool:
        """Whether it may be trained on other tokens than the text's, because a model writes some in ``prepare``."""
        return type(self).prepare is not TrainPass.prepare

    def n_held_out(self, n_windows: int) -> int:
        """How many of so many windows are not trained on."""
        enough = self.hold_out and n_windows >= 2 * self.batch_size
        return max(self.batch_size, round(self.hold_out * n_windows)) if enough else 0

    @property
    def n_windows(self) -> int:
        """Windows for which no sequence is trained on twice, those that are held out included."""
        n_trained = max(self.steps, self.correct) * self.batch_size
        held_out = max(self.batch_size, math.ceil(n_trained * self.hold_out / (1 - self.hold_out))) if self.hold_out else 0
        return n_trained + held_out

    def correction(self, n_windows: int) -> dict[str, Any]:
        """The settings of ``fine_tune`` by which the teacher is corrected on so many windows."""
        shared = ("batch_size", "accumulate", "learning_rate", "schedule", "warmup", "decay", "weight_decay", "gradient_clip")
        found = {name: getattr(self, name) for name in (*shared, "checkpointing", "hold_out")}
        found |= {"steps": self.correct, "trains": "everything" if self.trains == "everything" else "blocks"}
        judged = {"evaluate_every": max(1, self.correct // 10), "patience": self.correct}
        return found | (judged if self.n_held_out(n_windows) else {})

    def trains_layer(self, name: str) -> bool:
        """Whether the matrix of that name, of a linear layer or of a part of one, is trained."""
        return matches_any(name, self.targets) and not matches_any(name, self.skip)

    def trains_parameter(self, name: str) -> bool:
        """Whether of a matrix's parameters (see :meth:`compress.weights.Weight.parameters`) the one of that name is trained."""
        return self.trains != "scales" or name.rpartition("/")[2] in _SCALES

    def outline(self, weight: Weight) -> Weight:
        """What a matrix or factor, a weight of meta tensors, will become. Raises ValueError where it cannot be handled."""
        return weight

    def adapt(self, weight: Weight, generator: torch.Generator) -> Weight:
        """The form in which a matrix is trained: by default its own. generator: for what is drawn at random."""
        return weight

    def settle(self, weight: Weight) -> Weight:
        """What becomes of a matrix in the form of :meth:`adapt`, once it has been trained: by default what that form ends as."""
        return weight.final() if isinstance(weight, Provisional) else weight

    def choose(self, index: int, weight: Weight) -> Weight | None:
        """What a matrix is trained as from the step with that index on, or None where nothing changes. Asked before every step,
        without gradients, for every matrix and factor that is trained.

        weight: in the form of :meth:`adapt`, around its float32 parameters as trained by now. The answer is of the same form,
        with parameters of the same shapes: other fixed parts, such as a mask or codes, are taken over, and so are other values.
        A function of its arguments alone, so that processes stay in step and an interrupted run can resume.
        """
        return None

    @property
    def chooses(self) -> bool:
        """Whether :meth:`choose` is to be asked."""
        return type(self).choose is not TrainPass.choose

    def remarks(self, weights: Sequence[Weight]) -> list[str]:
        """What the user should know, given the layers, of meta tensors."""
        return []

    def betas(self, parameter: str) -> tuple[float, float]:
        """AdamW's decay rates, of the mean gradient and of its square, for what the form of :meth:`adapt` calls ``parameter`` in
        :meth:`compress.weights.Weight.parameters`; "" stands for everything that is no matrix of a layer."""
        return 0.9, 0.999

    def learning_rate_at(self, index: int) -> float:
        """Learning rate of the step with that index: a linear warm-up to the peak, then the schedule's fall."""
        n_warmup = int(self.warmup * self.steps)
        if index < n_warmup:
            return self.learning_rate * (index + 1) / n_warmup
        done = (index - n_warmup) / (self.steps - n_warmup)
        left_of_decay = (self.steps - index) / max(1, self.decay * self.steps)
        share = {
            "cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "constant": 1.0, "wsd": min(1.0, left_of_decay),
        }  # fmt: skip
        return self.learning_rate * share[self.schedule]

    def pick(self, student: PreTrainedModel, teacher: PreTrainedModel, data: Batch, seed: int) -> Tensor | None:
        """Which windows to train on, (n,) int64, of all that were drawn; None: all. Asked once, of passes that have a teacher in
        memory. student: as it is before training."""
        return None

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
