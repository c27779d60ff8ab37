"""Write an artifact as a plain dense checkpoint: factors multiplied out, grids unpacked, masks as zeros.

Every tool loads the result, and its weights are those that the artifact computes with; what is given up is the size, and the
rounding of inputs and of the KV cache where the artifact has it.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from compress.checkpoint import Checkpoint
from compress.journal import OUTER, block_part
from compress.skeleton import Skeleton
from compress.workspace import Workspace, check_not_source
from compress.writer import BlockStore, write_text


@torch.no_grad()
def export(source: Path, out: Path, *, overwrite: bool = False) -> Path:
    """Write the dense equivalent of ``source`` into ``out``, block by block. Raises BadInput where ``out`` exists."""
    checkpoint = Checkpoint(source)
    check_not_source(out, source)
    skeleton = Skeleton(checkpoint)
    skeleton.check()
    with Workspace(out, f"dense-{checkpoint.digest}", overwrite) as workspace:
        workspace.check_space(2 * 4 * sum(p.numel() for p in skeleton.model.parameters()))
        store = BlockStore(workspace.directory / "blocks")
        parts = [OUTER, *(block_part(i) for i in range(len(skeleton.blocks)))]
        for index in range(len(skeleton.blocks)):
            if not store.done(block_part(index)):
                store.write(block_part(index), _dense_block(skeleton, index), {})
        store.write(OUTER, {n: checkpoint.tensor(skeleton.outer_source(n)) for n in skeleton.outer_names()}, {})
        artifact = workspace.directory / "artifact"
        artifact.mkdir(exist_ok=True)
        store.assemble(parts, artifact)
        write_text(artifact / "config.json", json.dumps(checkpoint.plain_config, indent=2) + "\n")
        checkpoint.copy_companions(artifact)
        workspace.publish(artifact, out)
    return out


def _dense_block(skeleton: Skeleton, index: int) -> dict[str, torch.Tensor]:
    tensors = {}
    for local, weight in skeleton.read_weights(index).items():
        values = weight.dense()
        tensors[f"{skeleton.module_name(index, local)}.weight"] = values.T if skeleton.is_conv1d(local) else values
    for name in skeleton.block_names(index, cache_scales=False):
        tensors[name] = skeleton.checkpoint.tensor(skeleton.file_name(name))
    return tensors
