"""Rewrite a model as a whole, block by block: embeddings, norms, head and configuration change together."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.artifact import artifact_config
from compress.block import Block
from compress.checkpoint import Checkpoint
from compress.errors import CompressError
from compress.export import layers
from compress.journal import OUTER, block_part, collect_records, write_block
from compress.passes import ModelPass
from compress.progress import Progress
from compress.records import Streamed, describe, grids
from compress.skeleton import Skeleton
from compress.stream import PROBE_LENGTH, PROBE_SEQUENCES, forward
from compress.weights import Weight
from compress.writer import BlockStore, write_text

_PRESERVED = 0.02  # largest change of logits, relative to their spread, that rounding to the stored dtype may explain


@dataclass(frozen=True)
class Surgery:
    """What a :class:`compress.passes.ModelPass` does.

    outer: from the tensors that belong to no block, by name, to those of the new model; a matrix that is to lie on a grid as a
    weight. Tensors that are returned as they came keep their grid. block: from a block's index,
    linear weights and other tensors (by name inside the block) to the new ones. config: changes to ``config.json``. added:
    tensors of the new model that the old one lacks, on the meta device. preserves: the function is meant to stay, which is
    then checked. cache: how the KV cache is to be rounded (a compressed-tensors scheme). tables: what ``outer`` puts on grids, by
    tensor name, of meta tensors. measure: called before, with calibration windows (n, length) and a directory to work in.
    """

    outer: Callable[[dict[str, Tensor]], Mapping[str, Tensor | Weight]]
    block: Callable[[int, dict[str, Weight], dict[str, Tensor]], tuple[dict[str, Weight], dict[str, Tensor]]]
    config: dict[str, Any] = field(default_factory=dict)
    added: dict[str, Tensor] = field(default_factory=dict)
    preserves: bool = False
    cache: dict[str, Any] | None = None
    tables: dict[str, Weight] = field(default_factory=dict)
    measure: Callable[[Tensor, Path], None] | None = None


@torch.no_grad()
def operate(
    source: Checkpoint, step: ModelPass, tokens: Tensor, store: BlockStore, directory: Path, *, device: str, dtype: torch.dtype,
    progress: Progress,
) -> tuple[Skeleton, Streamed]:  # fmt: skip
    """Run a model pass as a stage; tokens: (n, length) windows, the first of which give the logits to verify by."""
    skeleton = Skeleton(source, device, dtype)
    surgery = step.surgery(skeleton)
    if surgery.measure is not None:
        surgery.measure(tokens, directory)
    n_blocks = len(skeleton.blocks)
    result = Streamed({}, {}, {}, (tokens, tokens), dict(surgery.config), surgery.cache or source.cache_scheme)
    skeleton.mixed = True if result.cache or grids(surgery.tables | skeleton.tables()) else None
    for index in range(n_blocks):
        progress(index, n_blocks, f"block {index + 1} of {n_blocks}")
        before = skeleton.read_weights(index)
        block = Block(skeleton, index, *surgery.block(index, before, skeleton.read_others(index)))
        if not store.done(block_part(index)):
            labels = [step.label()]
            records = {block.name(k): describe(block.name(k), w, w, labels, None) for k, w in block.weights.items()}
            write_block(store, block, records)
        collect_records(store, block, result)
        skeleton.free_block(index)
    _outer(skeleton, step, surgery, store, result)
    probe = tokens[:PROBE_SEQUENCES, :PROBE_LENGTH].contiguous()
    operated = _open(skeleton, result, store, directory / "operated", device, dtype)
    result.probe = (probe, forward(operated, probe))
    if surgery.preserves:
        _check_preserved(step, forward(Skeleton(source, device, dtype), probe), result.probe[1])
    return operated, result


def _outer(skeleton: Skeleton, step: ModelPass, surgery: Surgery, store: BlockStore, result: Streamed) -> None:
    source = skeleton.checkpoint
    given = {name: source.tensor(skeleton.outer_source(name)) for name in skeleton.outer_names()}
    tensors: dict[str, Tensor] = {}
    tables: dict[str, Weight] = {}
    passes: dict[str, list[str]] = {}
    for name, value in surgery.outer(dict(given)).items():
        module = name.removesuffix(".weight")
        if isinstance(value, Weight):
            tables[module], passes[module] = value, [step.label()]
        elif module in source.tables and value is given.get(name):
            tables[module] = source.weight(module, (0, 0))
        else:
            tensors[name] = value
    for module, weight in tables.items():
        tensors |= layers.tensors(module, weight)
    store.write(OUTER, tensors, {})
    outlines = {module: weight.map(lambda tensor: tensor.to("meta")) for module, weight in tables.items()}
    result.add_tables(outlines, passes, skeleton.tied_head())


def _open(skeleton: Skeleton, result: Streamed, store: BlockStore, directory: Path, device: str, dtype: torch.dtype) -> Skeleton:
    directory.mkdir(exist_ok=True)
    store.assemble([OUTER, *(block_part(i) for i in range(len(skeleton.blocks)))], directory)
    write_text(directory / "config.json", json.dumps(artifact_config(skeleton, result)))
    skeleton.checkpoint.copy_companions(directory)
    return Skeleton(Checkpoint(directory), device, dtype)


def _check_preserved(step: ModelPass, before: Tensor, after: Tensor) -> None:
    change = float((after - before).std() / before.std())
    if not change < _PRESERVED:
        raise CompressError(
            f"{step.method()}: the model's logits changed by {change:.1%} of their spread, though its function was to stay; "
            "its architecture must compute something that compress does not know of"
        )
