"""Rewrite a model as a whole, block by block: embeddings, norms, head and configuration change together."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
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
from compress.walk import Walk
from compress.weights import Weight, opened
from compress.writer import BlockStore, write_text

_PRESERVED = 0.02  # largest change of logits, relative to their spread, that rounding to the stored dtype may explain


@dataclass(frozen=True)
class Surgery:
    """What a :class:`compress.passes.ModelPass` does.

    outer: from the tensors that belong to no block, by name, to those of the new model; a matrix that is to lie on a grid as a
    weight. Tensors that are returned as they came keep their grid. block: from a block's index,
    linear weights and other tensors (by name inside the block) to the new ones. config: changes to ``config.json``. blocks: the
    indices of the blocks that stay, in their new order; None: all. structure: what ``compress_structure`` is to say, with the
    numbers of the old blocks; None: what it says now. added: tensors of the new model that the old one lacks, on the meta
    device. preserves: the function is meant to stay, which is then checked. cache: how the KV cache is to be rounded (a
    compressed-tensors scheme). tables: what ``outer`` puts on grids, by tensor name, of meta tensors. selects: ``outer`` and
    ``block`` can be given meta tensors, by which a plan learns the new shapes; otherwise shapes stay.
    """

    outer: Callable[[dict[str, Tensor]], Mapping[str, Tensor | Weight]] = lambda tensors: tensors
    block: Callable[[int, dict[str, Weight], dict[str, Tensor]], tuple[dict[str, Weight], dict[str, Tensor]]] = (
        lambda index, weights, others: (weights, others)
    )
    config: dict[str, Any] = field(default_factory=dict)
    blocks: Sequence[int] | None = None
    structure: dict[str, dict[str, Any]] | None = None
    added: dict[str, Tensor] = field(default_factory=dict)
    preserves: bool = False
    cache: dict[str, Any] | None = None
    tables: dict[str, Weight] = field(default_factory=dict)
    selects: bool = False

    def origins(self, model: Skeleton) -> list[int]:
        """For every block of the new model, which one of the old it is made of."""
        return list(range(len(model.blocks)) if self.blocks is None else self.blocks)

    def operated(
        self, index: int, weights: dict[str, Weight], others: dict[str, Tensor]
    ) -> tuple[dict[str, Weight], dict[str, Tensor]]:
        """What ``block`` makes of a block. It is given masked matrices in the place of bitmasks; what it leaves stays one."""
        loose = {local: opened(weight) for local, weight in weights.items()}
        changed, others = self.block(index, loose, others)
        return {local: weights[local] if weight is loose.get(local) else weight for local, weight in changed.items()}, others

    def alter(self, model: Skeleton) -> Checkpoint:
        """The model's files under the configuration of what it is about to become."""
        checkpoint, origins = model.checkpoint, self.origins(model)
        structure = checkpoint.structure if self.structure is None else self.structure
        structure = _renumbered(structure, model.arch.blocks, origins)
        return checkpoint.altered(_with_depth(checkpoint, len(model.blocks), origins) | self.config, structure)


def _with_depth(checkpoint: Checkpoint, n_blocks: int, origins: Sequence[int]) -> dict[str, Any]:
    """Changes to ``config.json`` for a choice of blocks: their number, and every list that has an entry for each, also those
    that older files leave to be worked out from a block's place."""
    if list(origins) == list(range(n_blocks)):
        return {}
    key = getattr(checkpoint.config, "attribute_map", {}).get("num_hidden_layers", "num_hidden_layers")
    plain = checkpoint.plain_config
    full = {name: getattr(checkpoint.config, name, plain.get(name)) for name in _PER_LAYER}
    lists = {name: values for name, values in full.items() if isinstance(values, list) and len(values) == n_blocks}
    windows = {"max_window_layers": sum(i < plain["max_window_layers"] for i in origins)} if "max_window_layers" in plain else {}
    return {key: len(origins), **windows, **{k: [v[index] for index in origins] for k, v in lists.items()}}


_PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers", "attention_layers")


def _renumbered(structure: dict[str, dict[str, Any]], blocks: str, origins: Sequence[int]) -> dict[str, dict[str, Any]]:
    """The same structure with the numbers of the new blocks; of blocks that share weights the first that stays owns them."""
    found: dict[str, dict[str, Any]] = {}
    owners: dict[str, str] = {}
    for index, origin in enumerate(origins):
        old, new = f"{blocks}.{origin}", f"{blocks}.{index}"
        owner = structure.get(old, {}).get("of", old)
        own = {new + n.removeprefix(old): spec for n, spec in structure.items() if n.startswith(old + ".")}
        found |= {n: spec for n, spec in own.items() if spec["kind"] != "shape"}  # shapes are of layers, which may be shared
        if owner in owners:
            found[new] = {"kind": "shared", "of": owners[owner]}
            continue
        owners[owner] = new
        shapes = {n: spec for n, spec in structure.items() if n.startswith(owner + ".") and spec["kind"] == "shape"}
        found |= {new + n.removeprefix(owner): spec for n, spec in shapes.items()}
    return found


@torch.no_grad()
def operate(
    source: Checkpoint, step: ModelPass, tokens: Tensor, store: BlockStore, directory: Path, *, device: str, dtype: torch.dtype,
    progress: Progress,
) -> tuple[Skeleton, Streamed]:  # fmt: skip
    """Run a model pass as a stage; tokens: (n, length) windows, to decide by and, the first, to verify by."""
    old = Skeleton(source, device, dtype)
    surgery = step.surgery(old, _measured(step, old, tokens, directory, progress))
    new, origins = Skeleton(surgery.alter(old), device, dtype), surgery.origins(old)
    config = {key: value for key, value in surgery.config.items() if key == "tie_word_embeddings"}
    result = Streamed({}, {}, {}, (tokens, tokens), config, surgery.cache or source.cache_scheme)
    new.mixed = True if result.cache or grids(surgery.tables | old.tables()) else None
    for index, origin in enumerate(origins):
        progress(index, len(origins), f"block {index + 1} of {len(origins)}")
        before = old.read_weights(origin)
        weights, others = surgery.operated(origin, before, old.read_others(origin) | old.read_shared_biases(origin))
        shared = new.bias_names(new.owner(index)) if index in new.owners else []
        block = Block(new, index, weights, {name: tensor for name, tensor in others.items() if name not in shared})
        if not store.done(block_part(index)):
            labels = [step.label()]
            records = {block.name(k): describe(block.name(k), w, w, labels, None) for k, w in block.weights.items()}
            write_block(store, block, records)
        collect_records(store, block, result)
        result.origins |= {block.name(local): old.module_name(old.owner(origin), local) for local in block.weights}
        new.free_block(index)
        source.unmap()
    _outer(old, new, step, surgery, store, result)
    probe = tokens[:PROBE_SEQUENCES, :PROBE_LENGTH].contiguous()
    operated = _open(new, result, store, directory / "operated", device, dtype)
    result.probe = (probe, forward(operated, probe))
    if not bool(torch.isfinite(result.probe[1]).all()):
        raise CompressError(f"{step.label()}: the changed model's logits are not finite; use a milder setting")
    if surgery.preserves:
        _check_preserved(step, forward(old, probe), result.probe[1])
    return operated, result


def _measured(step: ModelPass, model: Skeleton, tokens: Tensor, directory: Path, progress: Progress) -> Any:
    """What the pass measures, kept in ``directory`` so that a rerun decides the same."""
    file = directory / "measured.json"
    if not step.measures:
        return None
    if not file.exists():
        write_text(file, json.dumps(step.measure(Walk(model, tokens, directory, progress))))
    return json.loads(file.read_text())


def _outer(old: Skeleton, new: Skeleton, step: ModelPass, surgery: Surgery, store: BlockStore, result: Streamed) -> None:
    source = old.checkpoint
    given = {name: source.tensor(old.outer_source(name)) for name in old.outer_names()}
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
    result.add_tables(outlines, passes, new.tied_head())


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
