"""AutoAWQ's GEMM format, which vLLM, SGLang and (through gptqmodel) transformers open: 4 bits, packed along the outputs.

Only the format is AWQ's: any 4-bit grid fits it, whichever method chose the codes. A symmetric grid is one whose
zero-points are all 8.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.errors import BadInput
from compress.export import packed_layers
from compress.export.packed_layers import Plan, check_divisible, dynamic_rules, pack, survey, unsigned
from compress.skeleton import Skeleton
from compress.weights import Quantized

_BITS = 4
_PER_WORD = 8
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight outputs each nibble of a word holds, from the lowest
_LARGEST_GROUP = 128
# Architectures whose activations transformers multiplies by scales that only AutoAWQ's search makes, and fills with garbage.
_SCALED_ACTIVATIONS = ("gpt_neox",)


@torch.no_grad()
def export(source: Path, out: Path, *, overwrite: bool = False) -> Path:
    """Write the artifact ``source`` in AutoAWQ's format into ``out``, block by block.

    Raises BadInput where ``out`` exists, for grids of other than 4 bits, for layers that are neither dense nor quantized,
    and for architectures that transformers does not open from this format (GPT-2, GPT-NeoX).
    """
    return packed_layers.write(source, out, "awq", _plan, overwrite)


def _plan(skeleton: Skeleton) -> Plan:
    model_type = skeleton.checkpoint.base_model_type
    if model_type in _SCALED_ACTIVATIONS:
        raise BadInput(f"{model_type}: transformers expects awq files of this architecture to scale activations; use `--to gptq`")
    found = survey(skeleton, "awq", _LARGEST_GROUP)
    if any(skeleton.is_conv1d(local) for local in skeleton.arch.linears):
        raise BadInput(f"{model_type}: readers of awq replace nn.Linear layers, this architecture has Conv1D; use `--to gptq`")
    for name, weight in found.quantized.items():
        if weight.bits != _BITS:
            raise BadInput(f"{name}: awq holds 4-bit codes, this layer has {weight.bits}; `--to gptq` takes 2, 3, 4 and 8 bits")
        check_divisible(name, weight, 1, _PER_WORD, "awq")
    config: dict[str, Any] = {
        "quant_method": "awq",
        "bits": _BITS,
        "group_size": found.group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": sorted(found.dense),
    }
    if dynamic := dynamic_rules(skeleton, found, _BITS):
        config["dynamic"] = dynamic  # gptqmodel itself does not look at modules_to_not_convert
    return Plan(config, lambda name, weight: tensors(weight, found.group_size), {})


def tensors(weight: Quantized, group_size: int) -> dict[str, Tensor]:
    """A layer's tensors: qweight (in, out / 8) int32, qzeros (groups, out / 8) int32, scales (groups, out) float16.

    weight: a 4-bit grid. group_size: a divisor of its own, or -1 for its own.
    """
    grid = unsigned(weight, group_size)
    return {
        "qweight": _pack_outputs(grid.codes),
        "qzeros": _pack_outputs(grid.zero_point),
        "scales": grid.scale.T.contiguous(),
    }


def _pack_outputs(values: Tensor) -> Tensor:
    """(out, n) -> (n, out / 8) int32."""
    interleaved = values.unflatten(0, (-1, _PER_WORD))[:, _ORDER].flatten(0, 1)
    return pack(interleaved, _BITS).T.contiguous()
