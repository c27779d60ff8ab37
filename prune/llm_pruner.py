"""LLM-Pruner: remove the coupled neurons and heads whose weights, times their gradients of the loss on a few short texts, say
that it would change least (Ma et al., 2305.11627)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from compress.errors import BadInput
from compress.gradients import Gradients, gradients
from compress.narrow import attention, n_neurons
from compress.passes import Taxon
from compress.prune.width import Narrower
from compress.skeleton import Skeleton
from compress.walk import Walk

Importance = Literal["param_first", "param_second", "param_mix", "vectorize"]


class LLMPruner(Narrower):
    """Importance of a matrix's entries is w*g ("param_first"), w*F*w with the mean square F of each window's gradient
    ("param_second"), or w*g - w*F*w/2 ("param_mix"), in absolute value, and summed over all that goes with a unit; "vectorize"
    takes the absolute value of the sum over each row or column instead. Hidden channels are judged by the blocks alone.

    Published, for 32 blocks: keep_first=4, keep_last=2. Blocks of which nothing goes make shapes differ, which needs the
    artifact's own loader, so that here none are kept unless asked for.
    """

    taxon: ClassVar[Taxon] = Taxon.STRUCTURED
    paper: ClassVar[str] = "2305.11627"

    importance: Importance = Field("param_first", description="param_first, param_second, param_mix or vectorize")
    windows: int = Field(10, ge=1, description="calibration windows that gradients are taken on")
    length: int = Field(64, ge=2, description="tokens of each window, from its beginning")
    keep_first: int = Field(0, ge=0, description="blocks at the beginning that keep all their neurons and heads")
    keep_last: int = Field(0, ge=0, description="blocks at the end that keep all their neurons and heads")

    def span(self, model: Skeleton) -> list[int]:
        n_blocks = len(model.blocks)
        if self.keep_first + self.keep_last >= n_blocks:
            raise BadInput(f"{self.label()}: the model has {n_blocks} blocks, and one must be left to prune")
        return [index for index in super().span(model) if self.keep_first <= index < n_blocks - self.keep_last]

    def measure(self, walk: Walk) -> dict[str, Any]:
        """Scores by block of neurons, heads and groups of heads, and of hidden channels."""
        model, n_blocks = walk.skeleton, len(walk.skeleton.blocks)
        found: dict[str, list] = {kind: [[]] * n_blocks for kind in ("neurons", "heads", "groups")}
        hidden = torch.zeros(model.checkpoint.config.hidden_size, dtype=torch.float64)
        for seen in gradients(walk, self.short(walk.windows), squares=self.importance in ("param_second", "param_mix")):
            index, arch = seen.block.index, model.arch
            entries = {local: salience(seen, local, self.importance) for local in arch.linears}
            rows = {local: self.total(values, 1) for local, values in entries.items()}
            columns = {local: self.total(values, 0) for local, values in entries.items()}
            sources = [rows[local].unflatten(0, (-1, n_neurons(model, index))).sum(0) for local in arch.neurons.sources]
            found["neurons"][index] = (sum(sources) + columns[arch.neurons.reader]).tolist()
            if arch.heads:
                n_heads, n_groups, _ = attention(model, index)
                queries = (rows[arch.heads.queries] + columns[arch.heads.reader]).unflatten(0, (n_heads, -1)).sum(1)
                values = (rows[arch.heads.keys] + rows[arch.heads.values]).unflatten(0, (n_groups, -1)).sum(1)
                found["heads"][index] = queries.tolist()
                found["groups"][index] = (queries.unflatten(0, (n_groups, -1)).sum(1) + values).tolist()
            hidden += sum(columns[local] for edge in arch.norms for local in edge.readers)
            hidden += sum(rows[local] for local in arch.writers or ())
        return found | {"hidden": hidden.tolist()}

    def short(self, windows: Tensor) -> Tensor:
        """The windows that gradients are taken on; of one token each, which none follows, they are joined."""
        if windows.shape[1] == 1:
            length = min(self.length, len(windows))
            windows = windows.flatten()[: len(windows) // length * length].view(-1, length)
        if windows.shape[1] == 1:
            raise BadInput(f"{self.label()}: the calibration is one token; gradients need two in a row")
        return windows[: self.windows, : self.length].contiguous()

    def total(self, entries: Tensor, dim: int) -> Tensor:
        """Importance of rows (dim 1 is summed) or columns (dim 0), float64."""
        entries = entries.double()
        return (entries.sum(dim).abs() if self.importance == "vectorize" else entries.abs().sum(dim)).cpu()


def salience(seen: Gradients, local: str, importance: Importance) -> Tensor:
    """By how much the loss falls when an entry is removed: to the first order of its change, the second alone, or both.

    Returns (out, in), signed.
    """
    weight = seen.weights[local]
    if importance == "param_second":
        return weight.square() * seen.squares[local]
    first = weight * seen.gradients[local]
    return first - weight.square() * seen.squares[local] / 2 if importance == "param_mix" else first
