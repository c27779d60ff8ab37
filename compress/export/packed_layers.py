"""What the GPTQ and AWQ formats share: codes without a sign, several to an int32 word, on grids with float16 scales.

Both describe a model by one group size, so finer and coarser groups are brought to their common divisor: a scale that is
repeated changes no value. What they cannot describe is refused before anything is written.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from compress.checkpoint import Checkpoint
from compress.errors import BadInput
from compress.journal import OUTER, block_part
from compress.skeleton import Skeleton
from compress.weights import Dense, Masked, Quantized, Weight
from compress.workspace import Workspace, check_not_source
from compress.writer import BlockStore, write_text

_WORD = 32
_LEAST_GROUP = 32  # readers know powers of two; their kernels for processors begin here
_SCALE_ERROR = 2**-8  # of the scales of a layer, in norm: what rounding them to bfloat16 would cost
# Runtimes that join these layers into one ask for its settings by the joint name.
_FUSED = {("q_proj", "k_proj", "v_proj"): "qkv_proj", ("gate_proj", "up_proj"): "gate_up_proj"}
_DENSE_INSTEAD = "`compress export SOURCE --to dense` writes it as a plain checkpoint that every tool can quantize"


class Survey(NamedTuple):
    """The linear layers of a source. quantized: those inside blocks by full name, on the meta device; dense: full names of
    all others; group_size: the one that the format's config names, -1 for whole rows; symmetric: no zero-points anywhere."""

    quantized: dict[str, Quantized]
    dense: list[str]
    group_size: int
    symmetric: bool


class Plan(NamedTuple):
    """How a source is written. config: ``quantization_config``; tensors: the file's tensors of a layer, given its full name
    and grid; files: further JSON files by name."""

    config: dict[str, Any]
    tensors: Callable[[str, Quantized], dict[str, Tensor]]
    files: dict[str, Any]


class Grid(NamedTuple):
    """A layer as these formats mean it: ``(codes - zero_point) * scale``, codes (out, in) uint8 in [0, 2**bits - 1], scale
    (out, groups) float16, zero_point (out, groups) uint8."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor


def survey(skeleton: Skeleton, target: str, largest_group: int) -> Survey:
    """Look at every layer without reading codes. target: the format's name, for messages; largest_group: the largest group
    size, a power of two, that the format's readers know.

    Raises :class:`BadInput` for layers that are neither dense nor on an integer grid, where nothing is quantized, for
    groups that readers do not know, and for scales that float16 cannot hold.
    """
    quantized: dict[str, Quantized] = {}
    dense = outer_linears(skeleton)
    for name, own, weight in layers_of(skeleton, target):
        if isinstance(weight, Quantized):
            quantized[name] = weight
            _check_scale(name, skeleton.checkpoint.tensor(f"{own}.weight_scale"), target)
        else:
            dense.append(name)
    if not quantized:
        raise BadInput(
            f"{skeleton.checkpoint.path}: holds no quantized layer, and {target} is a format of quantized ones; run "
            "`compress run MODEL gptq:bits=4 -o OUT` first and export that"
        )
    group_size = _common_group_size(quantized, target, largest_group)
    return Survey(quantized, dense, group_size, all(weight.zero_point is None for weight in quantized.values()))


def outer_linears(skeleton: Skeleton) -> list[str]:
    """The names of the linear layers outside blocks."""
    prefix = skeleton.arch.blocks + "."
    return [n for n, m in skeleton.model.named_modules() if isinstance(m, nn.Linear) and not n.startswith(prefix)]


def layers_of(skeleton: Skeleton, target: str) -> Iterator[tuple[str, str, Weight]]:
    """Every compressible layer's name, the name that the source has its weight under, and the weight, on the meta device and
    without its mask: a grid keeps zeros by its codes. Raises :class:`BadInput` for layers that are neither dense nor on an
    integer grid."""
    for index in range(len(skeleton.blocks)):
        for local in skeleton.arch.linears:
            name, own = (skeleton.module_name(number, local) for number in (index, skeleton.owner(index)))
            weight = skeleton.read_weight(index, local, meta=True)
            weight = weight.inner if isinstance(weight, Masked) else weight
            kind = skeleton.checkpoint.reshaped.get(own, {}).get("kind", "linear")
            if kind != "linear" or not isinstance(weight, Dense | Quantized):
                what = kind if kind != "linear" else type(weight).__name__
                raise BadInput(
                    f"{name}: a layer of kind {what} has no place in the {target} format, whose layers are single "
                    f"matrices; {_DENSE_INSTEAD}"
                )
            yield name, own, weight


def _check_scale(name: str, scale: Tensor, target: str) -> None:
    scale = scale.double()
    rounded = scale.half().double()
    if not bool(rounded.isfinite().all()):
        wrong = f"reach {scale.abs().max():.3g}, beyond float16's largest number"
    elif (rounded - scale).norm() > _SCALE_ERROR * scale.norm():
        wrong = f"are as small as {scale.abs().min():.3g}, where float16 has too few digits left"
    else:
        return
    raise BadInput(
        f"{name}: its scales {wrong}, and {target} stores scales as float16; serve the artifact as it is (compressed-tensors "
        f"keeps the model's own dtype), or {_DENSE_INSTEAD}"
    )


def _common_group_size(quantized: dict[str, Quantized], target: str, largest: int) -> int:
    if all(weight.scale.shape[1] == 1 for weight in quantized.values()):
        return -1
    sizes = {name: weight.group_size for name, weight in quantized.items()}
    divisor = math.gcd(*sizes.values())
    power_of_two = divisor & -divisor
    if power_of_two < _LEAST_GROUP:
        listed = ", ".join(f"{size} ({name})" for size, name in sorted({size: name for name, size in sizes.items()}.items()))
        raise BadInput(
            f"{target} names one group size for all layers, {_LEAST_GROUP} or a larger power of two, and here the groups are of "
            f"{listed}; quantize with group_size=32 (or 64, 128) where it divides the layers' inputs, or with group_size=-1"
        )
    return min(power_of_two, largest)


def check_divisible(name: str, weight: Quantized, inputs: int, outputs: int, target: str) -> None:
    """Raise :class:`BadInput` unless the words of the format hold whole multiples of the layer's inputs and outputs."""
    out_features, in_features = weight.shape
    if in_features % inputs or out_features % outputs:
        raise BadInput(
            f"{name}: {target} packs {weight.bits}-bit codes of layers whose inputs are a multiple of {inputs} and outputs of "
            f"{outputs}, and this one has {in_features} inputs and {out_features} outputs; use other bits, or leave that layer "
            f"out with skip"
        )


def dynamic_rules(skeleton: Skeleton, found: Survey, bits: int) -> dict[str, dict[str, int]]:
    """What gptqmodel is to do other than the config says, by pattern of full names: leave layers dense (``-:``), or read
    them with other bits (``+:``). bits: the config's."""
    blocks_by_rule: dict[tuple[tuple[str, ...], int | None], list[int]] = {}
    for index in range(len(skeleton.blocks)):
        for group in skeleton.arch.groups:
            own = [_bits(found, skeleton.module_name(index, local)) for local in group]
            parts = [(group, own[0])] if len(set(own)) == 1 else [((n,), b) for n, b in zip(group, own, strict=True)]
            for names, part_bits in parts:
                if part_bits != bits:
                    blocks_by_rule.setdefault((names, part_bits), []).append(index)
    rules: dict[str, dict[str, int]] = {}
    for (names, part_bits), indices in blocks_by_rule.items():
        where = r"\d+" if len(indices) == len(skeleton.blocks) else f"({'|'.join(map(str, indices))})"
        pattern = rf"^{re.escape(skeleton.arch.blocks)}\.{where}\.({'|'.join(map(re.escape, _with_fused(names)))})$"
        rules[f"{'-' if part_bits is None else '+'}:{pattern}"] = {} if part_bits is None else {"bits": part_bits}
    return rules


def _bits(found: Survey, name: str) -> int | None:
    return found.quantized[name].bits if name in found.quantized else None


def _with_fused(names: tuple[str, ...]) -> list[str]:
    parents = [name.rpartition(".")[0] for name in names]
    fused = _FUSED.get(tuple(name.rpartition(".")[2] for name in names))
    return [*names, f"{parents[0]}.{fused}"] if fused else list(names)


def unsigned(weight: Quantized, group_size: int) -> Grid:
    """The same grid with codes from 0, and groups of that size, a divisor of its own (-1: its own)."""
    offset = 2 ** (weight.bits - 1)
    codes = (weight.codes.to(torch.int16) + offset).to(torch.uint8)
    scale = weight.scale.half()
    if weight.zero_point is None:
        zero_point = torch.full(scale.shape, offset, dtype=torch.uint8)
    else:
        zero_point = (weight.zero_point.to(torch.int16) + offset).to(torch.uint8)
    repeats = 1 if group_size == -1 else weight.group_size // group_size
    return Grid(codes, scale.repeat_interleave(repeats, dim=1), zero_point.repeat_interleave(repeats, dim=1))


def pack(values: Tensor, bits: int) -> Tensor:
    """Write the values of every column one after another into the bits of int32 words, from the lowest bit on.

    values: (n, columns) integers in [0, 2**bits - 1], n * bits a multiple of 32 and of whole ``lcm(bits, 32)``.
    Returns (n * bits / 32, columns) int32.
    """
    span = math.lcm(bits, _WORD)
    runs = values.reshape(-1, span // bits, values.shape[1])
    words = torch.zeros(runs.shape[0], span // _WORD, values.shape[1], dtype=torch.int32)
    for i in range(runs.shape[1]):
        word, shift = divmod(i * bits, _WORD)
        value = runs[:, i].to(torch.int32)
        words[:, word] |= value << shift
        if shift + bits > _WORD:
            words[:, word + 1] |= value >> (_WORD - shift)
    return words.flatten(0, 1)


def write(source: Path, out: Path, target: str, prepare: Callable[[Skeleton], Plan], overwrite: bool) -> Path:
    """Write ``source`` into ``out`` block by block, as ``prepare`` plans it; tensors outside linear layers stay as they are.

    Raises :class:`BadInput` where ``out`` exists, and what ``prepare`` raises.
    """
    checkpoint = Checkpoint(source)
    check_not_source(out, source)
    skeleton = Skeleton(checkpoint)
    skeleton.check()
    with Workspace(out, f"{target}-{checkpoint.digest}", overwrite) as workspace:
        plan = prepare(skeleton)
        n_blocks, n_own = len(skeleton.blocks), len(skeleton.blocks) - len(skeleton.owners)
        workspace.check_space(3 * checkpoint.nbytes * n_blocks // n_own)  # blocks and the joined file, with room for repeats
        store = BlockStore(workspace.directory / "blocks")
        parts = [OUTER, *(block_part(i) for i in range(len(skeleton.blocks)))]
        for index in range(len(skeleton.blocks)):
            if not store.done(block_part(index)):
                store.write(block_part(index), _block(skeleton, index, plan), {})
        store.write(OUTER, {n: checkpoint.tensor(skeleton.outer_source(n)) for n in skeleton.outer_names()}, {})
        artifact = workspace.directory / "artifact"
        artifact.mkdir(exist_ok=True)
        store.assemble(parts, artifact)
        files = {"config.json": {**checkpoint.plain_config, "quantization_config": plan.config}, **plan.files}
        for file, content in files.items():
            write_text(artifact / file, json.dumps(content, indent=2) + "\n")
        checkpoint.copy_companions(artifact)
        workspace.publish(artifact, out)
    return out


def _block(skeleton: Skeleton, index: int, plan: Plan) -> dict[str, Tensor]:
    tensors = {name: skeleton.checkpoint.tensor(source) for name, source in skeleton.own_tensors(index).items()}
    for local, weight in skeleton.read_weights(index).items():
        name = skeleton.module_name(index, local)
        inner = weight.inner if isinstance(weight, Masked) else weight
        if isinstance(inner, Quantized):
            tensors |= {f"{name}.{leaf}": tensor for leaf, tensor in plan.tensors(name, inner).items()}
        else:
            values = inner.dense()
            tensors[f"{name}.weight"] = values.T if skeleton.is_conv1d(local) else values
    return tensors
