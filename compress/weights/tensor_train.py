"""A matrix as a chain of small tensors: what a matrix product operator, or tensor train, makes of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from math import prod
from typing import Any

import torch
from torch import Tensor

from compress.stats import LinearStats
from compress.weights.composed import Composed, leaves, unmasked
from compress.weights.grid import Coded
from compress.weights.matrix import Weight

_MOST_INPUTS = 1 << 14  # of a core that statistics are carried to: theirs are square


@dataclass(frozen=True)
class TensorTrain(Composed):
    """Outputs and inputs are numbered by digits, (m_1 ... m_c) and (n_1 ... n_c), and core i holds the pairs (m_i, n_i) and a
    bond to each neighbour: entry (m, n) of the matrix is the product over the cores of their matrices at (m_i, n_i).

    cores: matrices (m_i * bond_i, bond_{i-1} * n_i), bonds at the ends being 1. So a core is a linear layer that eats the
    inputs' next digit and puts out the outputs' next one, for all other digits alike; pruners and quantizers take it for one.
    rows: (m_1 ... m_c); columns: (n_1 ... n_c).
    """

    kind = "tensor_train"
    cores: tuple[Weight, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, int]:
        return prod(self.rows), prod(self.columns)

    @property
    def dtype(self) -> torch.dtype:
        return self.cores[0].dtype

    @property
    def bonds(self) -> tuple[int, ...]:
        """The sizes of the bonds between neighbours, (c - 1,)."""
        return tuple(core.shape[0] // n_rows for core, n_rows in zip(self.cores[:-1], self.rows[:-1], strict=True))

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        from compress.stored_layers import tensor_train

        return tensor_train([core.dense(torch.float32) for core in self.cores], self.rows, self.columns).to(dtype or self.dtype)

    def sizes(self) -> dict[str, Any]:
        opened = contraction(self.rows, self.columns, self.bonds) > prod(self.shape) and not any(map(_computes, self.cores))
        return {"rows": list(self.rows), "columns": list(self.columns), "bonds": list(self.bonds), "opened": int(opened)}

    def children(self) -> dict[str, Weight]:
        return {f"cores.{i}": core for i, core in enumerate(self.cores)}

    @classmethod
    def child_shapes(cls, shape, sizes) -> dict[str, tuple[int, int]]:
        return {f"cores.{i}": each for i, each in enumerate(core_shapes(sizes["rows"], sizes["columns"], sizes["bonds"]))}

    @classmethod
    def assemble(cls, shape, sizes, tensors, children) -> TensorTrain:
        return cls(tuple(children.values()), tuple(sizes["rows"]), tuple(sizes["columns"]))

    def rebuild(self, parameters: Mapping[str, Tensor]) -> TensorTrain:
        return replace(self, cores=tuple(self._rebuilt_children(parameters).values()))

    def each_core(self, change: Callable[[Weight, LinearStats], Weight], stats: LinearStats | None) -> TensorTrain:
        """The chain of ``change(core, statistics of what enters it)``: the inputs' statistics carried through the cores before
        it as changed. stats: of the layer's inputs, with a Hessian; None: the cores get empty ones."""
        cores: list[Weight] = []
        for core in self.cores:
            entering = LinearStats(core.shape[1], (), "meta") if stats is None else self.entering(stats, cores)
            cores.append(change(core, entering))
        return replace(self, cores=tuple(cores))

    def check_cores(self, wanted: frozenset[str]) -> None:
        """Raise ValueError where statistics that a pass wants are too large to be carried to a core."""
        most = max(core.shape[1] for core in self.cores)
        if wanted and most > _MOST_INPUTS:
            raise ValueError(f"a core of its tensor train has {most} inputs, too many for their statistics: use a method without")

    def entering(self, stats: LinearStats, done: Sequence[Weight]) -> LinearStats:
        """The statistics of what enters the core after ``done``, the first ones, over tokens and all digits that it does not
        eat, from those of what enters the layer."""
        for core, n_rows in zip(done, self.rows, strict=False):
            matrices = core.dense(torch.float32).unflatten(0, (n_rows, -1))  # (bond, in) for each value of the outputs' digit
            stats = _merged(stats, matrices.shape[1], [lambda x, own=own: own.to(x) @ x for own in matrices], core.shape[1])
        n_inputs = self.cores[len(done)].shape[1]
        rest = stats.n_inputs // n_inputs
        return _merged(stats, n_inputs, [lambda x, i=i: x[..., i : i + 1] for i in range(rest)], n_inputs)


def core_shapes(rows: Sequence[int], columns: Sequence[int], bonds: Sequence[int]) -> list[tuple[int, int]]:
    """(out, in) of every core's matrix."""
    return [(m * after, before * n) for m, n, before, after in zip(rows, columns, (1, *bonds), (*bonds, 1), strict=True)]


def contraction(rows: Sequence[int], columns: Sequence[int], bonds: Sequence[int]) -> int:
    """Multiply-adds per token of going through the cores one by one."""
    shapes = core_shapes(rows, columns, bonds)
    return sum(prod(shape) * prod(rows[:i]) * prod(columns[i + 1 :]) for i, shape in enumerate(shapes))


def _computes(core: Weight) -> bool:
    """Whether a reader's layer does anything but a product with the core's matrix."""
    grids = [grid for _, leaf in leaves("", core) if isinstance(grid := unmasked(leaf), Coded)]
    return any(grid.inputs is not None or type(grid).layer is not Coded.layer for grid in grids)


def _merged(stats: LinearStats, n_outputs: int, maps: list[Callable[[Tensor], Tensor]], n_eaten: int) -> LinearStats:
    """The statistics of all those maps of the inputs, seen as (n_eaten, others), taken together."""

    def mapped(function: Callable[[Tensor], Tensor]) -> LinearStats:
        n_others = function(torch.empty(n_eaten, stats.n_inputs // n_eaten, device="meta")).shape[-1]
        return stats.mapped(lambda x: function(x.unflatten(1, (n_eaten, -1))).flatten(1), n_outputs * n_others)

    return reduce(LinearStats.merge, map(mapped, maps))
