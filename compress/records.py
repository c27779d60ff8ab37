"""What became of each linear layer: the manifest's rows, and what the writer of an artifact must know."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from compress.manifest import ModuleRecord
from compress.stats import LinearStats, energy
from compress.weights import Coded, Composed, Weight, leaves, opened, spec_of
from compress.weights.composed import unmasked


@dataclass
class Streamed:
    """records: what each linear layer became. reshaped: modules that need the shim loader. quantized: the packed linear
    modules, with meta tensors. probe: (tokens, logits) of the result in memory. config: changes to ``config.json``. cache: how
    readers round the KV cache. tables: what the embedding and the head became, where they are on grids. origins: of layers
    that had other names before, which. training: of a stage that trained, what is told of it."""

    records: dict[str, ModuleRecord]
    reshaped: dict[str, dict[str, Any]]
    quantized: dict[str, Coded]
    probe: tuple[Tensor, Tensor]
    config: dict[str, Any] = field(default_factory=dict)
    cache: dict[str, Any] | None = None
    tables: dict[str, ModuleRecord] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    training: dict[str, Any] | None = None

    def add(self, name: str, weight: Weight, record: ModuleRecord, conv1d: bool) -> None:
        """Take in one linear layer; conv1d: the architecture's own module is a Conv1D."""
        self.records[name] = record
        if spec := spec_of(weight, conv1d=conv1d):
            self.reshaped[name] = spec
        self.quantized |= grids({name: weight})

    def add_tables(self, tables: Mapping[str, Weight], passes: Mapping[str, list[str]], tied_head: str | None) -> None:
        """Take in matrices outside the blocks that are on grids. passes: what was done to them now; tied_head: the head that
        reads the embedding's."""
        for name, weight in tables.items():
            self.tables[name] = describe(name, weight, weight, [], None)
            self.tables[name].passes = passes.get(name, [])
            if spec := spec_of(weight):
                self.reshaped[name] = spec
                if tied_head is not None:
                    self.reshaped[tied_head] = {"kind": "tied_head", "table": name}
        self.quantized |= grids(tables)


def grids(weights: Mapping[str, Weight]) -> dict[str, Coded]:
    """Every plain linear module in ``weights`` that is on a grid, by name, with meta tensors."""
    matrices = ((module, unmasked(leaf)) for name, weight in weights.items() for module, leaf in leaves(name, weight))
    return {m: w.map(lambda tensor: tensor.to("meta")) for m, w in matrices if isinstance(w, Coded)}


def describe(name: str, weight: Weight, before: Weight, passes: list[str], stats: LinearStats | None) -> ModuleRecord:
    """The manifest's row of one linear layer."""
    parts = [leaf for _, leaf in leaves(name, opened(weight))]
    grid = next((unmasked(leaf) for leaf in parts if isinstance(unmasked(leaf), Coded)), None)
    assert grid is None or isinstance(grid, Coded)
    masked = [module for module, leaf in leaves(name, weight) if leaf.mask is not None and not isinstance(leaf, Composed)]
    is_sparse = any(leaf.mask is not None and not isinstance(leaf, Composed) for leaf in parts)
    weight_error, output_error = errors(weight, before, stats) if passes else (None, None)
    (n_outputs, n_inputs), inner = weight.shape, unmasked(weight)
    return ModuleRecord(
        kind=inner.kind if isinstance(inner, Composed) else "quantized" if grid else "masked" if masked else "dense",
        shape=(n_outputs, n_inputs),
        passes=passes,
        bits=getattr(grid or inner, "bits", None),
        group_size=grid.group_size if grid and grid.scale.shape[1] > 1 else None,
        activations=grid.inputs if grid else None,
        rank=getattr(inner, "rank", None),
        sparsity=_sparsity(parts) if is_sparse else None,
        masked=masked,
        weight_error=weight_error,
        output_error=output_error,
        nbytes=weight.nbytes,
        ideal_nbytes=weight.ideal_nbytes,
        dense_nbytes=n_outputs * n_inputs * weight.dtype.itemsize,
        numel=weight.numel,
    )


def _sparsity(parts: list[Weight]) -> float:
    matrices = [leaf for leaf in parts if not isinstance(leaf, Composed)]
    return round(1 - sum(leaf.numel for leaf in matrices) / sum(leaf.shape[0] * leaf.shape[1] for leaf in matrices), 6)


def errors(weight: Weight, before: Weight, stats: LinearStats | None) -> tuple[float, float | None]:
    """(|dW|^2 / |W|^2, the same weighted by the calibration inputs' second moment, where that was gathered)."""
    old = before.dense(torch.float32)
    new = weight.dense(torch.float32).to(old.device)
    change = new - old
    weight_error = float(change.square().sum() / old.square().sum().clamp_min(1e-30))
    if stats is None or not stats.allowed & {"hessian", "covariance"}:
        return weight_error, None
    hessian = (stats.hessian if "hessian" in stats.allowed else stats.covariance.float()).to(old.device)
    return weight_error, float(energy(change, hessian) / energy(old, hessian).clamp_min(1e-30))
