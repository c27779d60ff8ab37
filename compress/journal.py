"""Finished blocks in the store: written once, and read back by a run that was interrupted."""

from __future__ import annotations

from torch import Tensor

from compress.block import Block
from compress.export import layers
from compress.manifest import ModuleRecord
from compress.records import Streamed
from compress.skeleton import Skeleton
from compress.weights import Coded, LowRank, leaves, spec_of
from compress.weights.composed import unmasked
from compress.writer import BlockStore

OUTER = "outer"


def block_part(index: int) -> str:
    """Name of a block's file in the store."""
    return f"block-{index:05d}"


def write_block(store: BlockStore, block: Block, records: dict[str, ModuleRecord]) -> None:
    """Store a block as it is now; records: of its linear layers, by full name."""
    tensors: dict[str, Tensor] = {}
    specs, schemes = {}, {}
    own = {} if block.index in block.skeleton.owners else block.weights
    for local, weight in own.items():
        conv1d = block.skeleton.is_conv1d(local)
        specs[local] = spec_of(weight, conv1d=conv1d)
        transposed = conv1d and specs[local] is None
        tensors |= layers.tensors(block.name(local), weight, transposed=transposed)
        for module, leaf in leaves(block.name(local), weight):
            if isinstance(grid := unmasked(leaf), Coded):
                schemes[module] = layers.group(grid)
    for name, tensor in block.others.items():
        owner, _, leaf_name = name.rpartition(".")
        is_factored = leaf_name == "bias" and isinstance(block.weights.get(owner), LowRank)
        tensors[block.skeleton.module_name(block.index, f"{owner}.up.bias" if is_factored else name)] = tensor
    described = {name: record.model_dump(mode="json") for name, record in records.items()}
    store.write(block_part(block.index), tensors, {"layers": described, "specs": specs, "schemes": schemes})


def read_block(store: BlockStore, skeleton: Skeleton, index: int) -> Block:
    """A stored block, loaded and ready to run."""
    tensors, record = store.tensors(block_part(index)), store.record(block_part(index))
    groups = {module: {"targets": [module], **scheme} for module, scheme in record["schemes"].items()}
    masked = {matrix for entry in record["layers"].values() for matrix in entry["masked"]}
    source = layers.Source(tensors.__getitem__, tensors.__contains__, {"config_groups": groups}, masked.__contains__)
    if index in skeleton.owners:
        weights = read_block(store, skeleton, skeleton.owner(index)).weights
        others = {name: tensors[skeleton.module_name(index, name)] for name in skeleton.other_names(index)}
        return Block(skeleton, index, weights, others)
    weights = {}
    for local in skeleton.arch.linears:
        spec = record["specs"][local]
        transposed = skeleton.is_conv1d(local) and spec is None
        name, shape = skeleton.module_name(index, local), skeleton.shape(index, local)
        weights[local] = layers.read_weight(name, source, spec, shape, transposed=transposed)
    others = {}
    for name in skeleton.other_names(index):
        full = skeleton.module_name(index, name)
        others[name] = tensors[full if full in tensors else full.removesuffix("bias") + "up.bias"]
    return Block(skeleton, index, weights, others)


def collect_records(store: BlockStore, block: Block, result: Streamed) -> None:
    """Add what a stored block's layers became to ``result``; those that it shares are another block's."""
    if block.index in block.skeleton.owners:
        return
    stored = store.record(block_part(block.index))["layers"]
    for local, weight in block.weights.items():
        name = block.name(local)
        result.add(name, weight, ModuleRecord.model_validate(stored[name]), block.skeleton.is_conv1d(local))
