"""The format of transformers' own ``bitnet`` quantizer: ternary matrices, four weights to a byte.

Its layers round what enters them to 8 bits, token by token, whatever the model was trained with. Rows are packed a quarter of
the matrix apart: byte i of a column holds rows i, i + out/4, i + out/2 and i + 3 out/4, lowest bits first. Of the reader's two
classes this is for ``bitlinear``, which keeps weights packed in memory and unpacks them whenever they are used. (The other one,
``autobitlinear``, multiplies biases by the scale too, and does not open in bfloat16.)
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.errors import BadInput
from compress.export import packed_layers
from compress.export.packed_layers import Plan, layers_of, outer_linears
from compress.skeleton import Skeleton
from compress.weights import Quantized, Weight
from compress.weights.composed import unmasked

log = logging.getLogger(__name__)

ROUNDS_INPUTS = True
_PER_BYTE = 4
_MAKE_ONE = "`compress run MODEL bitnet -o OUT` makes ternary models with one scale a matrix"


@torch.no_grad()
def export(source: Path, out: Path, *, overwrite: bool = False) -> Path:
    """Write the artifact ``source`` for transformers' ``bitnet`` quantizer into ``out``, block by block.

    Some layers may be dense. Raises BadInput where ``out`` exists, and for matrices that are neither dense nor ternary with one
    scale for all, whose outputs are no multiple of four, or that are no nn.Linear.
    """
    return packed_layers.write(source, out, "bitnet", _plan, overwrite)


def _plan(skeleton: Skeleton) -> Plan:
    dense, found, rounds = outer_linears(skeleton), 0, True
    for name, own, weight in layers_of(skeleton, "bitnet"):
        if not isinstance(weight, Quantized):
            dense.append(name)
            continue
        index, _, local = own.removeprefix(f"{skeleton.arch.blocks}.").partition(".")
        if skeleton.is_conv1d(local):
            raise BadInput(f"{name}: the bitnet format is of nn.Linear layers, this one is a Conv1D; `--to dense` holds it")
        _check(name, unmasked(skeleton.read_weight(int(index), local)))
        found, rounds = found + 1, rounds and weight.inputs is not None
    if not found:
        raise BadInput(f"{skeleton.checkpoint.path}: holds no ternary layer, which the bitnet format is of; {_MAKE_ONE}")
    if not rounds:
        log.warning("bitnet: transformers rounds what enters these layers to 8 bits, as activations=int8 does")
    config: dict[str, Any] = {
        "quant_method": "bitnet",
        "linear_class": "bitlinear",
        "quantization_mode": "offline",
        "modules_to_not_convert": [f"{name}$" for name in dense],
    }
    return Plan(config, lambda name, weight: tensors(weight), {})


def _check(name: str, weight: Weight) -> None:
    assert isinstance(weight, Quantized)
    scales = (
        "it has more than one scale, as training and per_row=true leave it; `--to gguf:tq2_0` holds one for every 256 weights"
    )
    inputs = f"its inputs are rounded to {weight.inputs}, and bitnet's to int8; use activations=int8 or none"
    problems = {
        "its codes are not all -1, 0 or 1": weight.zero_point is not None or int(weight.codes.abs().max()) > 1,
        scales: weight.scale.unique().numel() > 1,
        f"its outputs, {weight.shape[0]}, are no multiple of {_PER_BYTE}": bool(weight.shape[0] % _PER_BYTE),
        inputs: weight.inputs not in (None, "int8"),
    }  # fmt: skip
    for problem, there in problems.items():
        if there:
            raise BadInput(f"{name}: the bitnet format holds ternary matrices with one scale each, and {problem}. {_MAKE_ONE}")


def tensors(weight: Quantized) -> dict[str, Tensor]:
    """A layer's tensors: weight (out / 4, in) uint8, and weight_scale (1,), what the reader divides by: the scale's inverse, in
    float32, so that it is not rounded before the reader does."""
    quarters = (weight.codes + 1).to(torch.uint8).unflatten(0, (_PER_BYTE, -1))
    packed = quarters[0] | quarters[1] << 2 | quarters[2] << 4 | quarters[3] << 6
    return {"weight": packed, "weight_scale": 1 / weight.scale.flatten()[:1].float()}
