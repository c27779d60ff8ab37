"""`compress open`: from an artifact whose layers are stacks of parts an ordinary one of any size, without compressing again.

Parts are taken in the order of the priorities that the artifact holds (see :class:`compress.weights.Stack`) until the budget is
spent; one that no longer fits ends its layer, and others go on.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import PrivateAttr
from safetensors.torch import load_file

from compress.amounts import parse_bytes
from compress.artifact import carry_records, write_artifact
from compress.budget import fill
from compress.card import write_card
from compress.checkpoint import Checkpoint, resolve
from compress.errors import BadInput
from compress.manifest import Manifest, Step, installed_versions
from compress.outline import Outline
from compress.passes import LinearPass, StoragePass, StreamPass
from compress.pipeline import Result, check_device
from compress.plan import file_bytes
from compress.progress import Progress, silent
from compress.skeleton import Skeleton
from compress.stream import Stream
from compress.verify import PROBE, save_probe, verify
from compress.weights import Weight, prefix, stacks
from compress.weights.composed import settled
from compress.workspace import Workspace, check_not_source
from compress.writer import BlockStore

_MOST_ENTRY_BYTES = 68  # of a tensor in a file's header, without its name and the two offsets


class Opening(StoragePass):
    """Takes the first parts of every stack. size: bytes of the weight files at most; bits: of every code; one of them."""

    size: int | None = None
    bits: int | None = None
    _count: int = PrivateAttr(1)

    @classmethod
    def method(cls) -> str:
        return "open"

    def of(self, count: int) -> Opening:
        """What is done to a layer of which so many parts are taken."""
        own = self.model_copy()
        own._count = count
        return own

    def store(self, weight: Weight) -> Weight:
        return prefix(weight, self._count)


class Unit(NamedTuple):
    """Layers that are opened alike.

    names: in full. costs: bytes of the first, second, ... part of all of them. priorities: of the same parts, per byte; that of
    the first means nothing. widths: of codes, by the number of parts; None: parts are no bits.
    """

    names: tuple[str, ...]
    costs: np.ndarray
    priorities: np.ndarray
    widths: range | None


def open_stack(
    source: str | Path, out: str | Path, *, size: int | str | None = None, bits: int | None = None, overwrite: bool = False,
    device: str = "cpu", progress: Progress = silent,
) -> Result:  # fmt: skip
    """Write into the directory ``out`` the artifact that the first parts of the layers of ``source`` make, and reload it in a
    fresh process.

    size: of the weight files, which are no larger and within a part of it: a number of bytes, or text such as "1.2GB". bits: the
    width of all codes, instead of a size. device: where to compute the logits that the result is verified by. Raises
    :class:`BadInput` where ``source`` holds nothing to open, for a size or width beyond its range, and where ``out`` exists.
    """
    source, out = resolve(source), Path(out).expanduser()
    if (size is None) == (bits is None):
        raise BadInput("give --size, the bytes of the result, or --bits, the width of all its codes: one of them")
    step = Opening(size=parse_bytes(size, "--size") if isinstance(size, str) else size, bits=bits)
    checkpoint = Checkpoint(source)
    check_not_source(out, source)
    check_device(device)
    if checkpoint.manifest is None or not (source / PROBE).exists():
        raise BadInput(f"{source}: not an artifact of compress: it has no manifest or no probe to verify by")
    skeleton = Skeleton(checkpoint, device, getattr(torch, checkpoint.manifest.compute_dtype))
    skeleton.check()
    counts = _counts(skeleton, step)
    with Workspace(out, f"{step.label()}-{checkpoint.digest}", overwrite) as workspace:
        workspace.check_space(2 * checkpoint.nbytes)
        artifact, manifest = workspace.directory / "artifact", _write(skeleton, step, counts, workspace.directory, progress)
        progress(0, 1, "reloading in a fresh process")
        verification = verify(artifact, dtype=manifest.compute_dtype, device=device)
        write_card(artifact, manifest, source)
        workspace.publish(artifact, out)
    return Result(path=out, bytes=manifest.nbytes, manifest=manifest, verification=verification)


def _write(skeleton: Skeleton, step: Opening, counts: Mapping[str, int], directory: Path, progress: Progress) -> Manifest:
    """Write ``directory``/artifact, block by block."""
    checkpoint, artifact = skeleton.checkpoint, directory / "artifact"
    earlier = checkpoint.manifest
    assert earlier is not None
    store, tokens = BlockStore(directory / "blocks"), load_file(checkpoint.path / PROBE)["tokens"]
    allotted: dict[StreamPass, dict[str, LinearPass]] = {}
    allotted[step] = {name: step.of(counts.get(name, 1)) for name in skeleton.linear_names()}
    streamed = Stream(skeleton, [step], tokens, store, directory, progress=progress, allocations=allotted).run()
    carry_records(streamed, earlier)
    made = Step(
        method=step.method(), label=step.label(), taxon=earlier.steps[-1].taxon, paper=earlier.steps[-1].paper,
        settings=step.settings(), stage=0,
    )  # fmt: skip
    lineage: dict[str, Any] = {
        "parent": str(checkpoint.path), "parent_digest": checkpoint.digest, "steps": [*earlier.steps, made],
        "versions": installed_versions(),
    }  # fmt: skip
    shutil.rmtree(artifact, ignore_errors=True)
    manifest = write_artifact(artifact, skeleton, streamed, store, earlier.model_copy(update=lineage))
    save_probe(artifact, *streamed.probe)
    return manifest


def _counts(skeleton: Skeleton, step: Opening) -> dict[str, int]:
    """How many parts of each layer are taken, by full name."""
    outlined = Outline(skeleton)
    units = _units(outlined)
    if not units:
        raise BadInput(
            f"{skeleton.checkpoint.path}: none of its layers can be opened at several sizes; the passes bitstack and nested make "
            "such layers"
        )
    if step.bits is not None:
        picked = [_count_at(unit, step.bits) for unit in units]
    else:
        assert step.size is not None
        picked = _picked(outlined, units, step.size)
    return {name: count for unit, count in zip(units, picked, strict=True) for name in unit.names}


def _units(outlined: Outline) -> list[Unit]:
    """Everything that can be opened, in order."""
    members: dict[Any, dict[str, Weight]] = {}
    for index, block in enumerate(outlined.weights):
        for number, group in enumerate(outlined.skeleton.arch.groups):
            for local in group:
                found = stacks(block[local]) if block else []
                if found:
                    joint = all(stack.joint for stack in found)
                    kind = (index, number, joint or local, tuple(stack.n_parts for stack in found))
                    members.setdefault(kind, {})[outlined.skeleton.module_name(index, local)] = block[local]
    return [_unit(weights) for weights in members.values()]


def _unit(weights: Mapping[str, Weight]) -> Unit:
    found = [stacks(weight) for weight in weights.values()]
    n_parts = max(stack.n_parts for layer in found for stack in layer)
    # By layer and number of parts. Beside grids of other widths zero-points take more room.
    sizes = [[settled(prefix(w, count + 1), mixed=True).nbytes for count in range(n_parts)] for w in weights.values()]
    costs = np.diff(sizes, prepend=0)
    priorities = np.zeros(n_parts)
    if n_parts > 1:
        own = np.array([max(layer, key=lambda stack: stack.n_parts).priorities for layer in found])
        priorities[1:] = (own * costs[:, 1:]).sum(0) / costs[:, 1:].sum(0)
        priorities[0] = priorities[1]
    return Unit(tuple(weights), costs.sum(0), priorities, found[0][0].widths)


def _count_at(unit: Unit, bits: int) -> int:
    """The number of parts with which codes have that width."""
    if unit.widths is None:
        raise BadInput(f"--bits {bits}: the parts of {unit.names[0]} are no bits of codes; give --size")
    if bits not in unit.widths:
        raise BadInput(f"--bits {bits}: {unit.names[0]} can be opened at {unit.widths[0]} to {unit.widths[-1]} bits")
    return unit.widths.index(bits) + 1


def _picked(outlined: Outline, units: Sequence[Unit], budget: int) -> list[int]:
    """How many parts of each unit fit into a file of that many bytes."""
    least, most = (_size(outlined, units, [len(unit.costs) if whole else 1 for unit in units]) for whole in (False, True))
    if not least <= budget <= most:
        raise BadInput(
            f"--size {budget:,}: {outlined.skeleton.checkpoint.path} can be opened at {least:,} to {most:,} bytes, all that "
            "is not in parts included"
        )
    if budget == most:
        return [len(unit.costs) for unit in units]
    weights = outlined.linears()
    others = least - sum(prefix(weights[name], 1).nbytes for unit in units for name in unit.names)
    try:
        return fill([unit.costs for unit in units], [unit.priorities for unit in units], budget - others)
    except ValueError:  # the least parts fit all the same: zero-points of one width for all take less room
        return [1] * len(units)


def _size(outlined: Outline, units: Sequence[Unit], counts: Sequence[int]) -> int:
    """Bytes of the weight files, at most."""
    weights = outlined.linears() | outlined.tables
    for unit, count in zip(units, counts, strict=True):
        weights |= {name: prefix(weights[name], count) for name in unit.names}
    return file_bytes(outlined, weights, _MOST_ENTRY_BYTES)
