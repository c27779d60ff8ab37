"""Integer grids in the compressed-tensors format, which transformers and vLLM open with no import of ours.

Codes are packed into int32 by that library's own functions. A low-rank layer is two ordinary linear layers, ``down`` and
``up``, each dense or packed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import version
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compress.errors import BadInput
from compress.weights import Dense, LowRank, Masked, Quantized, Weight


@cache
def _packers() -> tuple[Callable, Callable]:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

    return pack_to_int32, unpack_from_int32


def tensors(name: str, weight: Weight, *, transposed: bool = False) -> dict[str, Tensor]:
    """The file's tensors of one linear layer; transposed: a dense matrix is stored (in, out), as GPT-2 does."""
    if isinstance(weight, Masked):
        return tensors(name, weight.inner, transposed=transposed)
    if isinstance(weight, LowRank):
        return tensors(f"{name}.down", weight.down) | tensors(f"{name}.up", weight.up)
    if isinstance(weight, Quantized):
        pack, _ = _packers()
        result = {
            f"{name}.weight_packed": pack(weight.codes, weight.bits),
            f"{name}.weight_scale": weight.scale.contiguous(),
            f"{name}.weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
        }
        if weight.zero_point is not None:
            result[f"{name}.weight_zero_point"] = pack(weight.zero_point, weight.bits, packed_dim=0)
        return result
    values = weight.dense()
    return {f"{name}.weight": (values.T if transposed else values).contiguous()}


def read_weight(
    name: str,
    get: Callable[[str], Tensor],
    has: Callable[[str], bool],
    quantization: dict[str, Any] | None,
    *,
    masked: Callable[[str], bool] = lambda _: False,
    transposed: bool = False,
) -> Weight:
    """The inverse of :func:`tensors`: read a layer through ``get`` in whatever form it is there; all but a
    ``weight_shape`` may be meta tensors.

    masked: whether a matrix of that name has removed weights; they are its zeros.
    """
    if has(f"{name}.down.weight") or has(f"{name}.down.weight_packed"):
        parts = [read_weight(f"{name}.{part}", get, has, quantization, masked=masked) for part in ("down", "up")]
        return LowRank(*parts)
    if has(f"{name}.weight_packed") or has(f"{name}.weight_scale"):
        weight: Weight = _read_quantized(name, get, has, scheme_of(name, quantization))
    else:
        values = get(f"{name}.weight")
        if values.ndim != 2 or values.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            kind = str(values.dtype).removeprefix("torch.")
            raise BadInput(f"{name}: expected a matrix of 16-bit floats or wider, the file holds {kind} of {tuple(values.shape)}")
        weight = Dense(values.T.contiguous() if transposed else values)
    return Masked(weight, weight.dense() != 0) if masked(name) else weight


def _read_quantized(name: str, get: Callable, has: Callable, scheme: dict[str, Any]) -> Quantized:
    bits, scale = scheme["num_bits"], get(f"{name}.weight_scale")
    if scheme.get("type", "int") != "int" or scheme.get("strategy") not in ("group", "channel"):
        raise BadInput(f"{name}: compressed-tensors scheme {scheme.get('type')}/{scheme.get('strategy')} is not read by compress")
    _, unpack = _packers()
    zero_point = get(f"{name}.weight_zero_point") if has(f"{name}.weight_zero_point") else None
    if has(f"{name}.weight_packed"):
        packed, shape = get(f"{name}.weight_packed"), torch.Size(get(f"{name}.weight_shape").tolist())
        if packed.is_meta:
            codes = torch.empty(shape, dtype=torch.int8, device="meta")
            zero_point = None if zero_point is None else torch.empty(scale.shape, dtype=torch.int8, device="meta")
            return Quantized(codes, scale, zero_point, bits)
        codes = unpack(packed, bits, shape)
        if zero_point is not None:
            zero_point = unpack(zero_point, bits, scale.shape, packed_dim=0)
    else:
        codes = get(f"{name}.weight")
    scale = scale.reshape(codes.shape[0], -1)
    return Quantized(
        codes.contiguous(), scale, None if zero_point is None else zero_point.to(torch.int8).reshape(scale.shape), bits
    )


def scheme_of(name: str, quantization: dict[str, Any] | None) -> dict[str, Any]:
    """The weight scheme that a quantization_config gives to a module."""
    groups = list((quantization or {}).get("config_groups", {}).values())
    for group in groups:
        if name in group["targets"]:
            return group["weights"]
    for group in groups:
        if "Linear" in group["targets"]:
            return group["weights"]
    raise BadInput(f"{name}: its tensors are quantized, but quantization_config names no scheme for it")


class Scheme(NamedTuple):
    """What a reader must know of a grid; group_size None: one scale per row."""

    bits: int
    group_size: int | None
    symmetric: bool


def schemes(quantized: Mapping[str, Quantized]) -> dict[Scheme, list[str]]:
    """Modules by scheme. A row that is one group joins the group-wise scheme of its width where there is one."""
    found: dict[Scheme, list[str]] = {}
    for name, weight in quantized.items():
        group_size = weight.group_size if weight.scale.shape[1] > 1 else None
        found.setdefault(Scheme(weight.bits, group_size, weight.zero_point is None), []).append(name)
    for whole_row in [scheme for scheme in found if scheme.group_size is None]:
        names = found.pop(whole_row)
        for name in names:
            grouped = whole_row._replace(group_size=quantized[name].shape[1])
            found.setdefault(grouped if grouped in found else whole_row, []).append(name)
    return found


def check_readable(quantized: Mapping[str, Quantized]) -> None:
    """Raise :class:`BadInput` for grids that stock transformers cannot open together.

    Its loader reads asymmetric grids only by unpacking them while loading, and then knows a single scheme.
    """
    found = schemes(quantized)
    if len(found) > 1 and any(not scheme.symmetric for scheme in found):
        listed = "; ".join(
            f"{s.bits} bits, group {s.group_size or 'row'}, {'' if s.symmetric else 'a'}symmetric ({names[0]}, ...)"
            for s, names in found.items()
        )
        raise BadInput(
            f"transformers opens asymmetric grids only where all layers share one scheme, and here there are {len(found)}: "
            f"{listed}. Use symmetric=true, or one group_size that divides the inputs of every layer (for low-rank "
            "factors, let their rank be a multiple of it: round_to)"
        )


def quantization_config(quantized: Mapping[str, Quantized], dense_linears: list[str]) -> dict[str, Any]:
    """``config.json``'s quantization_config. quantized: every packed nn.Linear by name; dense_linears: all the others."""
    by_scheme = schemes(quantized)
    single = len(by_scheme) == 1
    groups = {
        f"group_{i}": {
            "targets": ["Linear"] if single else names,
            "weights": _scheme(scheme),
            "input_activations": None,
            "output_activations": None,
            "format": "pack-quantized",
        }
        for i, (scheme, names) in enumerate(by_scheme.items())
    }
    # Read as they are, packed zero points do not fit the shapes that transformers prepares for them.
    unpack_on_load = {"dequantize": True} if any(not scheme.symmetric for scheme in by_scheme) else {}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": sorted(dense_linears),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "sparsity_config": {},
        "transform_config": {},
        "version": version("compressed-tensors"),
        **unpack_on_load,
    }


def _scheme(scheme: Scheme) -> dict[str, Any]:
    return {
        "num_bits": scheme.bits, "type": "int", "symmetric": scheme.symmetric,
        "strategy": "group" if scheme.group_size else "channel", "group_size": scheme.group_size,
        "dynamic": False, "actorder": None, "observer": "minmax",
    }  # fmt: skip
