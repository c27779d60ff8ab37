"""Write an artifact as a plain dense checkpoint: factors multiplied out, grids unpacked, masks as zeros, shared layers once for
every block that computes with them.

Every tool loads the result, and its weights are those that the artifact computes with; what is given up is the size, and the
rounding of inputs and of the KV cache where the artifact has it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from compress.checkpoint import Checkpoint
from compress.journal import OUTER, block_part
from compress.skeleton import Skeleton
from compress.workspace import Workspace, check_not_source
from compress.writer import BlockStore, write_text


@torch.no_grad()
def export(source: Path, out: Path, *, overwrite: bool = False) -> Path:
    """Write the dense equivalent of ``source`` into ``out``, block by block. Raises BadInput where ``out`` exists."""
    return write("dense", source, out, lambda model: model.checkpoint.plain_config, dense_block, overwrite=overwrite)


def write(
    name: str, source: Path, out: Path, config: Callable[[Skeleton], dict[str, Any]],
    block: Callable[[Skeleton, int], dict[str, torch.Tensor]], *, overwrite: bool,
    beside: Callable[[Skeleton, Path], object] = lambda skeleton, directory: None,
) -> Path:  # fmt: skip
    """Write a checkpoint of that format block by block: config makes its ``config.json``, or raises BadInput for what does not
    fit; block the tensors of a block, by full name. beside: writes into the directory what else belongs to it."""
    checkpoint = Checkpoint(source)
    check_not_source(out, source)
    skeleton = Skeleton(checkpoint)
    skeleton.check()
    described = config(skeleton)
    with Workspace(out, f"{name}-{checkpoint.digest}", overwrite) as workspace:
        n_numbers = sum(p.numel() for p in skeleton.model.parameters()) * len(skeleton.blocks)  # at most: shared ones come again
        workspace.check_space(2 * 4 * n_numbers // (len(skeleton.blocks) - len(skeleton.owners)))
        store = BlockStore(workspace.directory / "blocks")
        parts = [OUTER, *(block_part(i) for i in range(len(skeleton.blocks)))]
        for index in range(len(skeleton.blocks)):
            if not store.done(block_part(index)):
                store.write(block_part(index), block(skeleton, index), {})
        store.write(OUTER, {n: checkpoint.tensor(skeleton.outer_source(n)) for n in skeleton.outer_names()}, {})
        artifact = workspace.directory / "artifact"
        artifact.mkdir(exist_ok=True)
        store.assemble(parts, artifact)
        write_text(artifact / "config.json", json.dumps(described, indent=2) + "\n")
        checkpoint.copy_companions(artifact)
        beside(skeleton, artifact)
        workspace.publish(artifact, out)
    return out


def dense_block(skeleton: Skeleton, index: int) -> dict[str, torch.Tensor]:
    """A block's tensors by full name, as its architecture has them."""
    tensors = {}
    for local, weight in skeleton.read_weights(index).items():
        values = weight.dense()
        tensors[f"{skeleton.module_name(index, local)}.weight"] = values.T if skeleton.is_conv1d(local) else values
    return tensors | {name: skeleton.checkpoint.tensor(source) for name, source in skeleton.own_tensors(index).items()}
