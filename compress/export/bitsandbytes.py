"""The format of bitsandbytes, which transformers opens where that library is installed: NF4, FP4 and LLM.int8().

Its readers take all but the quantized matrices in the dtypes of the file, whatever dtype they are asked for, and so compute
in these; only the product with a 4-bit matrix has a dtype of its own, which the config names.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compress.errors import BadInput
from compress.weights.blockwise import NESTED_BLOCK, Blockwise, RowInt8, is_misread
from compress.weights.grid import Coded

if TYPE_CHECKING:
    from compress.checkpoint import Checkpoint

log = logging.getLogger(__name__)

_STATE = "weight.quant_state.bitsandbytes__"
STATES = (f"{_STATE}nf4", f"{_STATE}fp4")
"""Names of the tensors that hold what shapes and settings a 4-bit matrix has."""


def is_here(name: str, has: Callable[[str], bool]) -> bool:
    """Whether the file holds a linear layer of that name in this format."""
    return has(f"{name}.SCB") or has(f"{name}.weight.absmax")


def encode(weight: Coded) -> dict[str, Tensor]:
    """The file's tensors of one matrix, by their names inside its module."""
    if isinstance(weight, RowInt8):
        format_code = torch.tensor(0, dtype=torch.uint8)  # rows, as they are
        return {"weight": weight.codes.contiguous(), "SCB": weight.absmax, "weight_format": format_code}
    assert isinstance(weight, Blockwise)
    codes = weight.codes.flatten()
    if len(codes) % 2:  # the library fills up with a zero too
        codes = torch.cat([codes, (weight.levels == 0).int().argmax().to(torch.uint8).reshape(1)])
    result = {
        "weight": (codes[0::2] << 4 | codes[1::2]).unsqueeze(1),
        "weight.absmax": weight.absmax,
        "weight.quant_map": weight.levels.clone(),
        _STATE + weight.kind: torch.tensor(list(weight.state), dtype=torch.uint8),
    }
    if weight.nested_absmax is not None and weight.nested_levels is not None:
        result |= {"weight.nested_absmax": weight.nested_absmax, "weight.nested_quant_map": weight.nested_levels.clone()}
    return result


def tensor_names(weight: Coded) -> list[str]:
    """The names of :func:`encode`'s tensors, also for a weight of meta tensors."""
    if isinstance(weight, RowInt8):
        return ["weight", "SCB", "weight_format"]
    assert isinstance(weight, Blockwise)
    nested = ["weight.nested_absmax", "weight.nested_quant_map"] if weight.nested_absmax is not None else []
    return ["weight", "weight.absmax", "weight.quant_map", _STATE + weight.kind, *nested]


def decode(name: str, get: Callable[[str], Tensor], has: Callable[[str], bool], group: Mapping[str, Any]) -> Coded:
    """The inverse of :func:`encode`, through ``get``: a tensor by full name, all but one of ``STATES`` perhaps a meta tensor.
    group: what :func:`group` says of the matrix; a quantization_config of this format says it too."""
    computes_in = getattr(torch, str(group.get("bnb_4bit_compute_dtype") or "float32").removeprefix("torch."))
    packed = get(f"{name}.weight")
    if has(f"{name}.SCB"):
        return RowInt8(packed, get(f"{name}.SCB"), float(group.get("llm_int8_threshold", 6.0)), computes_in)
    found = next((state for state in STATES if has(f"{name}.{state}")), None)
    if found is None or packed.dtype != torch.uint8:
        raise BadInput(
            f"{name}: compress reads 4-bit matrices of bitsandbytes that are stored as bytes (quant_storage uint8) only"
        )
    state = json.loads(bytes(get(f"{name}.{found}").tolist()))
    shape, nested = tuple(state["shape"]), "nested_offset" in state
    if len(shape) != 2 or state.get("nested_blocksize", NESTED_BLOCK) != NESTED_BLOCK:
        raise BadInput(f"{name}: a 4-bit matrix of shape {shape} with {state} is not read by compress")
    codes = torch.stack([packed >> 4, packed & 15], -1).flatten()[: shape[0] * shape[1]].reshape(shape)
    return Blockwise(
        codes, get(f"{name}.weight.absmax"), get(f"{name}.weight.quant_map"), state["quant_type"], state["blocksize"],
        getattr(torch, state["dtype"]), computes_in,
        get(f"{name}.weight.nested_absmax") if nested else None,
        get(f"{name}.weight.nested_quant_map") if nested else None,
        float(state.get("nested_offset", 0.0)),
    )  # fmt: skip


def misread_here(checkpoint: Checkpoint, device: str) -> bool:
    """Whether the library would read a 4-bit matrix of the checkpoint wrongly, or not at all, on that device of this machine;
    elsewhere it reads what it should. See :func:`compress.weights.blockwise.is_misread`."""
    if not device.startswith("cpu") or (checkpoint.quantization or {}).get("quant_method") != "bitsandbytes":
        return False
    states = (json.loads(bytes(checkpoint.tensor(key).tolist())) for key in checkpoint.keys if key.endswith(STATES))
    if found := any(len(state["shape"]) == 2 and is_misread(tuple(state["shape"]), state["blocksize"]) for state in states):
        log.warning(
            "%s: bitsandbytes cannot multiply by matrices of such widths on this processor (it misreads rows that are no "
            "multiple of the block, or refuses outputs that are none of 32); compress reads them itself here. GPUs and other "
            "processors are not concerned", checkpoint.path,
        )  # fmt: skip
    return found


def group(weight: Coded) -> dict[str, Any]:
    """What a reader must know of a matrix beside its tensors, in the words of the config. Of an 8-bit matrix, whose product
    has no dtype of its own, that is the dtype in which its other parts are stored."""
    if isinstance(weight, RowInt8):
        return {"llm_int8_threshold": weight.threshold, "bnb_4bit_compute_dtype": _word(weight.stored)}
    assert isinstance(weight, Blockwise)
    return {"bnb_4bit_compute_dtype": _word(weight.computes_in)}


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def is_mixed(quantized: Mapping[str, Coded], cache_scheme: dict[str, Any] | None) -> bool:
    """Whether other layers change how a layer is written: never in this format."""
    return False


def _settings(weight: Coded) -> str:
    """What all matrices of a file must share."""
    if isinstance(weight, RowInt8):
        return f"8 bits, threshold {weight.threshold:g}"
    return f"4 bits, compute_dtype {group(weight)['bnb_4bit_compute_dtype']}"


def check_readable(quantized: Mapping[str, Coded], cache_scheme: dict[str, Any] | None, dtype: torch.dtype) -> None:
    """Raise :class:`BadInput` for matrices that no one config describes: 8-bit rows beside 4-bit blocks, several thresholds or
    dtypes of products, or a rounded KV cache beside any."""
    found: dict[str, str] = {}
    for name, weight in quantized.items():
        found.setdefault(_settings(weight), name)
    if len(found) > 1:
        listed = "; ".join(f"{settings} ({name}, ...)" for settings, name in found.items())
        raise BadInput(
            f"one artifact of bitsandbytes layers has either nf4 and fp4 or llm_int8, with the same settings: {listed}"
        )
    if cache_scheme is not None:
        raise BadInput("a rounded KV cache is described by compressed-tensors, which cannot stand beside bitsandbytes layers")


def quantization_config(
    quantized: Mapping[str, Coded], dense_linears: list[str], cache_scheme: dict[str, Any] | None = None
) -> dict[str, Any]:
    """``config.json``'s quantization_config. quantized: every module in this format by name; dense_linears: all other linear
    modules. Raises as :func:`check_readable` does."""
    check_readable(quantized, cache_scheme, torch.float32)
    first = next(iter(quantized.values()))
    is_8bit = isinstance(first, RowInt8)
    return {
        "quant_method": "bitsandbytes",
        "_load_in_4bit": not is_8bit, "_load_in_8bit": is_8bit, "load_in_4bit": not is_8bit, "load_in_8bit": is_8bit,
        "bnb_4bit_compute_dtype": "float32",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": first.kind if isinstance(first, Blockwise) else "fp4",
        "bnb_4bit_use_double_quant": isinstance(first, Blockwise) and first.nested_absmax is not None,
        "llm_int8_enable_fp32_cpu_offload": False, "llm_int8_has_fp16_weight": False, "llm_int8_threshold": 6.0,
        "llm_int8_skip_modules": sorted(dense_linears),
        **group(first),
    }  # fmt: skip
