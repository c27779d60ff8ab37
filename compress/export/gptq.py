"""AutoGPTQ's format, which gptqmodel, vLLM, SGLang and (through gptqmodel and optimum) transformers open.

Codes of 2, 3, 4 or 8 bits are packed along the inputs. Its first version stores every zero-point less one, which wraps
around where that is zero, and readers disagree about what then happens to the neighbouring ones. So symmetric grids, whose
zero-points are all 2**(bits-1), are written in the first version, which every reader knows, and others in the second,
``gptq_v2``, which stores them as they are.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress import __version__
from compress.errors import BadInput
from compress.export import packed_layers
from compress.export.packed_layers import Plan, Survey, check_divisible, dynamic_rules, pack, survey, unsigned
from compress.skeleton import Skeleton
from compress.weights import Quantized

log = logging.getLogger(__name__)

_BITS = (2, 3, 4, 8)
_LARGEST_GROUP = 1024


@torch.no_grad()
def export(source: Path, out: Path, *, overwrite: bool = False) -> Path:
    """Write the artifact ``source`` in the GPTQ format into ``out``, block by block.

    Some layers may be dense. Layers may differ in bits, which gptqmodel and vLLM read, but transformers does not; nor does
    it open GPT-2 from this format, which gptqmodel does. Raises BadInput where ``out`` exists, for grids of other bits, and
    for layers that are neither dense nor quantized.
    """
    return packed_layers.write(source, out, "gptq", _plan, overwrite)


def _plan(skeleton: Skeleton) -> Plan:
    found = survey(skeleton, "gptq", _LARGEST_GROUP)
    sizes: Counter[int] = Counter()
    for name, weight in found.quantized.items():
        if weight.bits not in _BITS:
            raise BadInput(
                f"{name}: gptq holds codes of 2, 3, 4 or 8 bits, this layer has {weight.bits}; quantize with one of them"
            )
        unit = math.lcm(weight.bits, 32) // weight.bits
        check_divisible(name, weight, unit, unit, "gptq")
        sizes[weight.bits] += weight.numel
    bits = sizes.most_common(1)[0][0]
    version = 1 if found.symmetric else 2
    checkpoint_format = "gptq" if version == 1 else "gptq_v2"
    config: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": found.group_size,
        "sym": found.symmetric,
        "desc_act": False,
        "lm_head": False,
        "checkpoint_format": checkpoint_format,
        "format": checkpoint_format,
        "meta": {"quantizer": [f"compress:{__version__}"]},
    }
    if len(sizes) > 1:
        log.warning("gptq: layers differ in bits, which gptqmodel and vLLM read by `dynamic` rules and transformers does not")
    if dynamic := dynamic_rules(skeleton, found, bits):
        config["dynamic"] = dynamic
    if any(name not in found.quantized for name in skeleton.linear_names()):
        config["modules_in_block_to_quantize"] = _quantized_modules(skeleton, found)
    return Plan(config, lambda name, weight: tensors(weight, found.group_size, version), {"quantize_config.json": config})


def tensors(weight: Quantized, group_size: int, version: int) -> dict[str, Tensor]:
    """A layer's tensors: qweight (in * bits / 32, out) int32, qzeros (groups, out * bits / 32) int32, scales (groups, out)
    float16, g_idx (in,) int32, the group of every input.

    weight: inputs and outputs fill whole words. group_size: a divisor of its own, or -1 for its own. version: 1 stores
    zero-points less one, 2 as they are.
    """
    grid = unsigned(weight, group_size)
    stored = grid.zero_point if version == 2 else grid.zero_point - 1
    in_features = weight.shape[1]
    return {
        "qweight": pack(grid.codes.T, weight.bits),
        "qzeros": pack(stored, weight.bits).T.contiguous(),
        "scales": grid.scale.T.contiguous(),
        "g_idx": torch.arange(in_features, dtype=torch.int32) // (in_features // grid.scale.shape[1]),
    }


def _quantized_modules(skeleton: Skeleton, found: Survey) -> list[list[str]]:
    """What transformers is to replace: names within a block where all blocks agree, full names otherwise."""
    count = Counter(local for local in skeleton.arch.linears for i in range(len(skeleton.blocks))
                    if skeleton.module_name(i, local) in found.quantized)  # fmt: skip
    if set(count.values()) == {len(skeleton.blocks)}:
        return [[local for local in group if local in count] for group in skeleton.arch.groups if count.keys() & set(group)]
    return [list(found.quantized)]
