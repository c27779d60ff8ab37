"""CompactifAI: each weight matrix as a matrix product operator of two or three small tensors (Tomut et al., 2401.14109)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from compress.lowrank.allocation import probed_ranks
from compress.lowrank.factor import Factoriser, spectrum
from compress.lowrank.tensor_train import balanced, least_discarded, separated, train, unfolded
from compress.passes import Needs, Taxon
from compress.stats import LinearStats
from compress.weights import Dense, Masked, TensorTrain, Weight
from compress.weights.tensor_train import core_shapes


class CompactifAI(Factoriser):
    """Outputs and inputs are numbered by digits; of the tensor over pairs of these, singular value decompositions one after the
    other keep ``ratio`` of the parameters. Three cores get the bonds whose discarded singular values weigh least.

    ``weighted``: each input counts by its root mean square, as far as that is a product of factors of its digits, so that it
    costs nothing in the file. On the bundled model it loses a little: perplexity 51.6 against 50.6 at ``ratio=0.6``.

    ``ranks`` is for two cores. Unlike a matrix of low rank such a chain computes no faster than the whole matrix, into which
    readers multiply it out where that is less work: it saves storage. ``logit_kd`` heals the cores.
    """

    taxon: ClassVar[Taxon] = Taxon.LOW_RANK
    paper: ClassVar[str] = "2401.14109"

    cores: Literal[2, 3] = Field(2, description="number of tensors that a matrix becomes")
    weighted: bool = Field(False, description="weigh inputs by their root mean square on the calibration text")
    rank: int | None = Field(None, ge=1, description="size of every bond, instead of the ratio's")
    ranks: Literal["uniform", "energy", "sensitivity"] = Field(  # type: ignore[assignment]
        "uniform", description="how the ratio is shared out among layers: alike, or by a rule after a survey of all of them"
    )

    @model_validator(mode="after")
    def _rules_are_for_one_bond(self) -> CompactifAI:
        if self.cores > 2 and self.ranks != "uniform":
            raise ValueError(f"ranks={self.ranks} shares out one bond per layer: it goes with cores=2")
        return self

    @property
    def needs(self) -> Needs:  # type: ignore[override]  # a constant of other methods, here it depends on a setting
        return Needs(frozenset({"sqnorm"})) if self.weighted else Needs()

    def linear(self, weight: Tensor, stats: LinearStats, mask: Tensor | None) -> Weight:
        rows, columns = (balanced(size, self.cores) for size in weight.shape)
        tensor, scales = self._paired(weight, stats)
        bonds = self._bonds(tensor.shape, lambda: [spectrum(unfolded(tensor, i)) for i in range(1, self.cores)])
        if bonds is None:
            return Dense(weight) if mask is None else Masked(Dense(weight), mask)
        cores = []
        for core, scale, m, n in zip(train(tensor, bonds), scales, rows, columns, strict=True):
            matrix = (core.unflatten(1, (m, n)) / scale.unsqueeze(1)).permute(1, 3, 0, 2)  # m, bond after; bond before, n
            cores.append(Dense(matrix.flatten(2).flatten(0, 1).to(weight.dtype)))
        return TensorTrain(tuple(cores), rows, columns)

    def outline(self, weight: Tensor, stats: LinearStats, mask: Tensor | None) -> Weight:
        rows, columns = (balanced(size, self.cores) for size in weight.shape)
        sizes = [m * n for m, n in zip(rows, columns, strict=True)]
        flat = [torch.ones(min(prod(sizes[:i]), prod(sizes[i:]))) for i in range(1, self.cores)]
        bonds = self._bonds(sizes, lambda: flat)
        if bonds is None:
            return Dense(weight.to("meta")) if mask is None else Masked(Dense(weight.to("meta")), mask.to("meta"))
        shapes = core_shapes(rows, columns, bonds)
        return TensorTrain(tuple(Dense(torch.empty(s, dtype=weight.dtype, device="meta")) for s in shapes), rows, columns)

    def check_budget(self, weights: Sequence[Weight]) -> None:
        super().check_budget([Dense(torch.empty(self._sizes(weight.shape), device="meta")) for weight in weights])

    def survey(self, weight: Weight, stats: LinearStats, effect: Callable[[Weight], float]) -> Any:
        sizes = self._sizes(weight.shape)
        if self.ranks == "energy":
            tensor, _ = self._paired(weight.dense(), stats)
            return {"shape": sizes, "ranks": [], "effects": [], "spectrum": spectrum(tensor).tolist()}
        ranks = probed_ranks(sizes[0], sizes[1], self.round_to)
        widest = self._with(ranks[-1]).linear(weight.dense(), stats, None) if ranks else None
        effects = [effect(_with_bond(widest, rank)) for rank in ranks if isinstance(widest, TensorTrain)]
        return {"shape": sizes, "ranks": ranks, "effects": effects}

    def _sizes(self, shape: Sequence[int]) -> list[int]:
        """Of the digit pairs of an (out, in) matrix."""
        return [m * n for m, n in zip(*(balanced(size, self.cores) for size in shape), strict=True)]

    def _paired(self, weight: Tensor, stats: LinearStats) -> tuple[Tensor, list[Tensor]]:
        """The tensor over digit pairs of a matrix (out, in) in its metric, float64, and the scale of every digit of its inputs
        that it has been multiplied by."""
        rows, columns = (balanced(size, self.cores) for size in weight.shape)
        squares = stats.sqnorm.double() if self.weighted and stats.n else weight.new_ones(weight.shape[1], dtype=torch.float64)
        scales = separated(squares.sqrt(), columns)
        tensor = weight.double().reshape(*rows, *columns)
        for i, scale in enumerate(scales):
            tensor = (tensor.movedim(self.cores + i, -1) * scale).movedim(-1, self.cores + i)
        pairs = tensor.permute([axis for i in range(self.cores) for axis in (i, self.cores + i)])
        return pairs.reshape(self._sizes(weight.shape)), scales

    def _bonds(self, sizes: Sequence[int], spectra: Callable[[], Sequence[Tensor]]) -> list[int] | None:
        """The bonds between digit pairs of those sizes; None: nothing would be saved."""
        if self.cores == 2:
            rank = self.rank_of(*sizes)
            return None if rank is None else [rank]
        if self.rank is None:
            return None if self.ratio >= 1 else least_discarded(sizes, spectra(), int(self.ratio * prod(sizes) + 1e-6))
        bonds = [min(self.rank, sizes[0]), min(self.rank, sizes[2])]
        return bonds if _numel(sizes, *bonds) < prod(sizes) else None


def _with_bond(chain: TensorTrain, bond: int) -> TensorTrain:
    """Two cores with only the first values of their bond."""
    left, right = (core.dense() for core in chain.cores)
    left = left.unflatten(0, (chain.rows[0], -1))[:, :bond].flatten(0, 1)
    right = right.unflatten(1, (-1, chain.columns[1]))[:, :bond].flatten(1)
    return TensorTrain((Dense(left), Dense(right)), chain.rows, chain.columns)


def _numel(sizes: Sequence[int], first: int, second: int) -> int:
    return sizes[0] * first + first * sizes[1] * second + second * sizes[2]
