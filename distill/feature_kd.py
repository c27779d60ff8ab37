"""Feature distillation: the student's hidden states are to be the teacher's, block by block, and its predictions too (after
FitNets, Romero et al., 1412.6550)."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from compress.distill.features import cosine_distance, layer_map, linear_maps, relative_error
from compress.distill.white_box import Divergent
from compress.passes import Needs, Taxon
from compress.train_pass import Batch, Signal

_DISTANCES = {"mse": relative_error, "cosine": cosine_distance}


class FeatureKD(Divergent):
    """What every block puts out (and at last the final norm) is compared with what the teacher's block at the same share of the
    depth does. Where widths differ a linear map to the teacher's is trained along, and dropped in the end.

    See :class:`TrainPass` for the training fields.
    """

    taxon: ClassVar[Taxon] = Taxon.WHITE_BOX
    paper: ClassVar[str] = "1412.6550"
    needs: ClassVar[Needs] = Needs(teacher=True, states=True)

    logits: float = Field(1.0, ge=0, description="weight of T**2 times the divergence of the predictions")
    features: float = Field(1.0, ge=0, description="weight of the mean distance of the states")
    distance: Literal["mse", "cosine"] = Field("mse", description="mse: over the teacher's mean square; cosine: 1 - cos")
    maps: Literal["widths", "all"] = Field("widths", description="all: a map is trained where widths agree too")

    def aids(self, student_sizes: tuple[int, ...], teacher_sizes: tuple[int, ...]) -> nn.Module | None:
        widths = [(student_sizes[i], teacher_sizes[j]) for i, j in layer_map(len(student_sizes), len(teacher_sizes))]
        if self.maps == "all" or any(ours != theirs for ours, theirs in widths):
            return linear_maps(widths)
        return None

    def loss(self, student: Signal, teacher: Signal | None, batch: Batch) -> Tensor:
        """Weighted sum of the mean distance of states and, in nats per token, of the predictions."""
        loss = self.features * self.distance_of_states(student, self.given(teacher), batch.aids)
        if self.logits:
            loss = loss + self.logits * self.temperature**2 * self.divergences(student, teacher).mean()
        return loss

    def distance_of_states(self, student: Signal, teacher: Signal, maps: nn.Module | None) -> Tensor:
        """Mean over layers."""
        pairs = layer_map(len(student.states), len(teacher.states))
        modules = [nn.Identity() for _ in pairs] if maps is None else list(maps.children())
        distance = _DISTANCES[self.distance]
        distances = [
            distance(module(student.states[i]), teacher.states[j]) for module, (i, j) in zip(modules, pairs, strict=True)
        ]
        return sum(distances[1:], distances[0]) / len(distances)
