"""SliceGPT: turn the residual stream to its principal components, and delete the least of them from every matrix that reads or
writes it (Ashkboos et al., 2401.15024).

Each norm reads the stream in a basis of its own, so residual connections change bases. As published they take a full matrix
each. But whatever orthogonal matrix turns a basis within its span leaves the function alone, and two spans of d' among d
dimensions share at least 2 d' - d: turned as close to one another as they can be, neighbouring bases differ by 1 - F F^T with
an F of d - d' columns. That is what is stored: a quarter of the published matrices at sparsity 0.2, half at 1/3.

A norm divides by the root of a mean over d channels, and its architecture's own module by that over d': the whole stream is
made smaller by sqrt(d' / d) instead, and every reader's matrix larger, so that no norm and no epsilon changes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from compress.errors import BadInput
from compress.passes import ModelPass, Needs, Taxon
from compress.prune import components
from compress.quant.hadamard import random_hadamard
from compress.rotate import (
    check_model,
    check_outer,
    check_weight,
    head_matrix,
    is_centred,
    resized_config,
    resized_structure,
    shortcut_name,
    shortcut_ranks,
    stream_size,
    takes_size,
    turned_block,
    turned_outer,
)
from compress.skeleton import Skeleton
from compress.surgery import Surgery
from compress.walk import Walk
from compress.weights import Weight
from compress.writer import BlockStore


class SliceGPT(ModelPass):
    """Models of norms without a mean, whose heads need not divide the stream: Llama, Mistral, Qwen and Phi-3.

    Every basis is found with the model turned and sliced up to there. The head loses channels too, since ``hidden_size`` is one
    number. shared: one basis, of what enters the norms of the model as it was; the artifact is then a plain model. sparsity 0
    turns the model without slicing, which leaves its function. Embedding and head become two matrices where they were one.
    It must come before masks and grids, which a rotation would fill. Training after it trains the shortcuts too.
    """

    taxon: ClassVar[Taxon] = Taxon.STRUCTURED
    paper: ClassVar[str] = "2401.15024"
    needs: ClassVar[Needs] = Needs(frozenset({"covariance"}))

    sparsity: float = Field(0.25, ge=0, lt=1, description="share of the stream's channels removed")
    round_to: int = Field(8, ge=1, description="the number of channels that stay is a multiple of this")
    shared: bool = Field(False, description="one basis for the whole model: no shortcut matrices, and larger losses")
    final_orientation: Literal["random", "pca"] = Field(
        "random", description="of the kept channels; random: none stands out; pca: in the order of their energies at the start"
    )
    seed: int = Field(0, ge=0, description="of the random orientation")

    @property
    def measures(self) -> bool:
        return True

    def outline(self, weight: Weight) -> Weight:
        return check_weight(self, weight)

    def size(self, model: Skeleton) -> int:
        """How many channels stay. Raises :class:`BadInput` where none would, or the architecture takes no such number."""
        width = stream_size(model)
        kept = int((1 - self.sparsity) * width + 1e-9)
        for size in [width] if kept == width else range(kept - kept % self.round_to, 0, -self.round_to):
            if takes_size(model, size):
                return size
        raise BadInput(f"{self.label()}: of {width} channels none would stay, or no number of them that the model can have")

    def measure(self, walk: Walk) -> str:
        """A directory: of every basis, (d, size) float64, and of the factor of the shortcut that leads to it, (size, rank)."""
        store, size = BlockStore(walk.scratch / "bases"), self.size(walk.skeleton)
        if self.shared:
            found = iter([(self._turned(components.of_all_places(walk, size)), torch.zeros(0))])
        else:
            found = components.of_every_place(walk, size, lambda index: self._ranks(walk.skeleton, index), self._turned)
        for number, (basis, factor) in enumerate(found):
            store.write(_part(number), {"basis": basis, "factor": factor}, {})
        return str(store.directory)

    def _turned(self, basis: Tensor) -> Tensor:
        turn = random_hadamard(basis.shape[1], self.seed).to(basis.device)
        return basis @ turn if self.final_orientation == "random" else basis

    def _ranks(self, model: Skeleton, index: int) -> list[int]:
        """Columns of the factor of every shortcut of a block; 0: none is needed."""
        size, earlier = self.size(model), shortcut_ranks(model, index)
        return earlier if self.shared else [min(size, stream_size(model) - size + rank) for rank in earlier]

    def surgery(self, model: Skeleton, found: Any = None) -> Surgery:
        check_model(self, model)
        if is_centred(model):
            raise BadInput(
                f"{self.method()}: {model.checkpoint.base_model_type} models take the size of heads from that of the stream, "
                "and their norms subtract a mean, so the stream cannot be sliced; neurons and whole blocks can be removed"
            )
        head, width, size = head_matrix(model), stream_size(model), self.size(model)
        table, n_places = model.outer_meta(f"{model.arch.embeddings[0]}.weight"), len(model.arch.norms)
        ranks = [self._ranks(model, index) for index in range(len(model.blocks))]
        scale = (size / width) ** 0.5

        def basis(number: int) -> Tensor:
            return torch.empty(width, size, dtype=torch.float64, device="meta") if found is None else self._read(found, number)[0]

        def block(index: int, weights: dict[str, Weight], others: dict[str, Tensor]):
            first, dtype = n_places * index, others[f"{model.arch.norms[0].source}.weight"].dtype
            bases = [basis(first + place) for place in range(n_places + 1)]
            weights, new = turned_block(model, index, weights, others, bases, scale)
            for place, rank in enumerate([] if self.shared else ranks[index]):
                factor = bases[0].new_empty(size, rank) if found is None else self._read(found, first + place + 1)[1]
                new |= {f"{shortcut_name(model, place)}.factor": factor.to(dtype)} if rank else {}
            return weights, new

        def outer(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            check_outer(self, model, tensors)
            return turned_outer(model, tensors, basis(0), basis(n_places * len(model.blocks)), scale)

        return Surgery(
            outer=outer,
            block=block,
            config=resized_config(model, size) | {"tie_word_embeddings": False},
            structure=resized_structure(model, size, ranks),
            added={head: table.new_empty(len(table), size)} if head in model.tied else {},
            preserves=size == width,
            selects=True,
        )

    def _read(self, directory: str, number: int) -> tuple[Tensor, Tensor]:
        """What :meth:`measure` wrote."""
        tensors = BlockStore(Path(directory)).tensors(_part(0 if self.shared else number))
        return tensors["basis"], tensors["factor"]


def _part(number: int) -> str:
    return f"basis-{number:05d}"
