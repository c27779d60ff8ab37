"""TensorGPT: the token embedding as tensor trains, each token's vector one of its own, without data (Xu et al., 2307.00526)."""

from __future__ import annotations

from math import prod
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from compress.errors import BadInput
from compress.lowrank.factor import leading_directions, rank_for
from compress.lowrank.tensor_train import balanced
from compress.passes import ModelPass, Taxon
from compress.skeleton import Skeleton
from compress.surgery import Surgery
from compress.weights import Lookup, TableFactors, TableTrains

_ROWS = 4096  # that are decomposed at a time


class TensorGPT(ModelPass):
    """The embedding, and a head that shares it, in ``ratio`` of its parameters; an output head of its own stays as it is.

    ``form="rows"`` is the method as published: a vector of d entries becomes a tensor of ``cores`` balanced dimensions and that
    a train, whatever the other rows are, so that a token can be added or changed alone; it needs the entries of a vector to be
    alike where their digits are. ``form="matrix"`` is a low-rank matrix, whose d-sided factor all tokens share, and pays where
    vectors lie near a subspace. Those of trained models do, and have no order of entries: in half the bytes rows of two
    cores lose 36 % of the bundled model's energy, the matrix 8 %; in 42 % rows of three cores, the most that fits into half,
    lose 47 %, the matrix 10 %.
    """

    taxon: ClassVar[Taxon] = Taxon.LOW_RANK
    paper: ClassVar[str] = "2307.00526"

    ratio: float = Field(0.5, gt=0, le=1, description="share of the embedding's parameters that is kept")
    form: Literal["rows", "matrix"] = Field("rows", description="a tensor train for every row, or a low-rank matrix for all")
    cores: Literal[2, 3] = Field(2, description="tensors that a row becomes")

    def surgery(self, model: Skeleton, found: Any = None) -> Surgery:
        module = model.arch.embeddings[0]
        name, embedding = f"{module}.weight", model.model.get_submodule(module)
        if type(embedding) is not nn.Embedding and not hasattr(embedding, "scalar_embed_scale"):
            raise BadInput(f"{self.method()}: compress does not know how a {type(embedding).__name__} computes")
        if self.ratio >= 1:
            return Surgery()
        meta = self.factorise(model.outer_meta(name))
        return Surgery(outer=lambda tensors: tensors | {name: self.factorise(tensors[name])}, tables={name: meta})

    def factorise(self, table: Tensor) -> Lookup:
        """A matrix (vocabulary, d), or one of meta tensors, in its dtype. Raises BadInput where nothing that small exists."""
        n_rows, width = table.shape
        if self.form == "matrix":
            rank = rank_for(self.ratio, n_rows, width)
            if rank is None:
                raise BadInput(f"{self.method()}: no two factors of a {n_rows} x {width} embedding are smaller than it")
            if table.is_meta:
                left, right = table.new_empty(n_rows, rank), table.new_empty(rank, width)
            else:
                right = leading_directions(table.double().T, rank).T
                left, right = (table.double() @ right.T).to(table.dtype), right.to(table.dtype)
            return TableFactors(left, right)
        digits = balanced(width, self.cores)
        bonds = self._bonds(digits)
        if table.is_meta:
            return TableTrains(table.new_empty(n_rows, numbers(digits, bonds)), digits, bonds)
        parts = [row_cores(rows.double(), digits, bonds).to(table.dtype) for rows in table.split(_ROWS)]
        return TableTrains(torch.cat(parts), digits, bonds)

    def _bonds(self, digits: tuple[int, ...]) -> tuple[int, ...]:
        """The largest bonds, all alike but where fewer are exact, of trains within the ratio."""
        budget, best = int(self.ratio * prod(digits) + 1e-6), None
        for bond in range(1, prod(digits)):
            bonds = tuple(min(bond, prod(digits[:i]), prod(digits[i:])) for i in range(1, len(digits)))
            if numbers(digits, bonds) > budget:
                break
            best = bonds
        if best is None:
            least = numbers(digits, (1,) * (len(digits) - 1)) / prod(digits)
            raise BadInput(f"{self.method()}: rows of {prod(digits)} entries need ratio={least:.3f} at least; try form=matrix")
        return best


def numbers(digits: tuple[int, ...], bonds: tuple[int, ...]) -> int:
    """How many a row's cores hold."""
    return sum(size * before * after for size, before, after in zip(digits, (1, *bonds), (*bonds, 1), strict=True))


def row_cores(rows: Tensor, digits: tuple[int, ...], bonds: tuple[int, ...]) -> Tensor:
    """The cores of every row (n, d), one after the other: (n, numbers), by one truncated decomposition after the other, each
    the best of its size."""
    cores, rest, before = [], rows, 1
    for size, bond in zip(digits, bonds, strict=False):
        left, values, right = torch.linalg.svd(rest.reshape(len(rows), before * size, -1), full_matrices=False)
        cores.append(left[:, :, :bond].flatten(1))
        rest, before = values[:, :bond, None] * right[:, :bond], bond
    return torch.cat([*cores, rest.flatten(1)], dim=1)
