"""TED: compare of hidden states what matters for predicting, by filters that were trained to predict from them (Liang et al.,
2210.01351)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from compress.distill.features import layer_map, linear_maps
from compress.distill.losses import cross_entropy, per_token
from compress.distill.white_box import Divergent
from compress.passes import Needs, Taxon
from compress.train_pass import Batch, Signal


class TED(Divergent):
    """At every layer of both models stands a filter, a linear map of the states, scaled to mean square 1, into the space that the
    teacher's head reads. For ``filter_steps`` only the filters are trained, each to let that head predict the next token.
    Then the student is, to give the filtered states that the teacher's filters, fixed from now on, make of the teacher's; its
    own filters go on being trained.

    See :class:`TrainPass` for the training fields; ``learning_rate`` and its schedule are those of both parts.
    """

    taxon: ClassVar[Taxon] = Taxon.WHITE_BOX
    paper: ClassVar[str] = "2210.01351"
    needs: ClassVar[Needs] = Needs(teacher=True, states=True)

    filter_steps: float = Field(0.2, ge=0, lt=1, description="share of the steps in which the filters are trained")
    features: float = Field(1.0, ge=0, description="weight of the mean squared difference of the filtered states")
    cross_entropy: float = Field(0.0, ge=0, description="weight of the next token's loss")

    def aids(self, student_sizes: tuple[int, ...], teacher_sizes: tuple[int, ...]) -> nn.Module | None:
        pairs, read = layer_map(len(student_sizes), len(teacher_sizes)), teacher_sizes[-1]
        return nn.ModuleList(
            [linear_maps((student_sizes[i], read) for i, _ in pairs), linear_maps((teacher_sizes[j], read) for _, j in pairs)]
        )

    def loss(self, student: Signal, teacher: Signal | None, batch: Batch) -> Tensor:
        """Mean over tokens, in nats; in the second part with that over layers of the squared difference."""
        teacher = self.given(teacher)
        ours, theirs = filtered(student, teacher, batch.aids, self.trains_filters(batch.index))
        if self.trains_filters(batch.index):
            losses = [
                per_token(cross_entropy, Signal(states, teacher.head), None, batch.targets, chunk=self.chunk).mean()
                for states in (*ours, *theirs)
            ]
            return torch.stack(losses).mean()
        distances = [(a - b.detach()).square().mean() for a, b in zip(ours, theirs, strict=True)]
        loss = self.temperature**2 * self.divergences(student, teacher).mean() + self.features * torch.stack(distances).mean()
        if self.cross_entropy:
            text = per_token(cross_entropy, student, None, batch.targets, chunk=self.chunk).mean()
            loss = loss + self.cross_entropy * text
        return loss

    def trains_filters(self, index: int) -> bool:
        """Whether the step of that index belongs to the first part."""
        return index < int(self.filter_steps * self.steps)


def filtered(student: Signal, teacher: Signal, filters: nn.Module | None, frozen: bool) -> tuple[list[Tensor], list[Tensor]]:
    """The filtered states of both models, layer by layer, (tokens, d) each. frozen: whether the student takes no gradient."""
    assert isinstance(filters, nn.ModuleList)
    pairs = layer_map(len(student.states), len(teacher.states))
    own = [student.states[i].detach() if frozen else student.states[i] for i, _ in pairs]
    return _through(filters[0], own), _through(filters[1], [teacher.states[j] for _, j in pairs])


def _through(filters: nn.Module, states: Iterable[Tensor]) -> list[Tensor]:
    normal = (F.rms_norm(each.float(), each.shape[-1:], eps=1e-6) for each in states)
    return [module(each) for module, each in zip(filters.children(), normal, strict=True)]
