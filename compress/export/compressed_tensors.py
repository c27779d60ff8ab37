"""Number grids in the compressed-tensors format, which transformers and vLLM open with no import of ours.

Integer codes are packed into int32 by that library's own functions. One file may hold several schemes; each layer's is
given by name. Where all layers share one scheme the file is laid out as every reader knows it. That layout has packed zero
points and 4-bit floats, which stock transformers takes only if told to unpack the weights while loading ("dequantize"),
which works for a single scheme and forgets the rounding of inputs and caches. Elsewhere zero points stand unpacked beside
blocks of one row, which it opens in any company (vLLM does not know these).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import version
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compress.activations import Inputs
from compress.errors import BadInput
from compress.weights import Coded, FloatQuantized, Quantized

_INPUTS: dict[Inputs, dict[str, Any]] = {
    "int8": {"num_bits": 8, "type": "int"},
    "int4": {"num_bits": 4, "type": "int"},
    "fp8": {"num_bits": 8, "type": "float"},
}
_PER_TOKEN = {"symmetric": True, "strategy": "token", "dynamic": True}
_SCALES = {"mxfp4-pack-quantized": "torch.uint8", "nvfp4-pack-quantized": "torch.float8_e4m3fn"}


@cache
def _packers() -> tuple[Callable, Callable]:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

    return pack_to_int32, unpack_from_int32


def encode(weight: Coded) -> dict[str, Tensor]:
    """The file's tensors of one matrix on a grid, by their names inside its module."""
    if isinstance(weight, FloatQuantized):
        return _encode_floats(weight)
    assert isinstance(weight, Quantized)
    if not weight.packed:
        return {"weight": weight.codes.contiguous(), "weight_scale": weight.scale.contiguous()}
    pack, _ = _packers()
    result = {
        "weight_packed": pack(weight.codes, weight.bits),
        "weight_scale": weight.scale.contiguous(),
        "weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
    }
    if weight.zero_point is not None:
        plain = weight.zero_point.contiguous()
        result["weight_zero_point"] = plain if weight.mixed else pack(plain, weight.bits, packed_dim=0)
    return result


def _encode_floats(weight: FloatQuantized) -> dict[str, Tensor]:
    if weight.bits == 8:
        scale = weight.scale.flatten() if weight.scale.numel() == 1 else weight.scale
        return {"weight": weight.codes.contiguous(), "weight_scale": scale.contiguous()}
    result = {
        "weight_packed": weight.codes[:, 0::2] | weight.codes[:, 1::2] << 4,
        "weight_scale": weight.scale.contiguous(),
    }
    return result if weight.global_scale is None else {**result, "weight_global_scale": weight.global_scale}


def tensor_names(weight: Coded) -> list[str]:
    """The names of :func:`encode`'s tensors, also for a weight of meta tensors."""
    names = ["weight_packed" if Scheme.of(weight).format.count("pack") else "weight", "weight_scale"]
    if isinstance(weight, Quantized):
        return names + ["weight_shape"] * weight.packed + ["weight_zero_point"] * (weight.zero_point is not None)
    return names + ["weight_global_scale"] * (isinstance(weight, FloatQuantized) and weight.global_scale is not None)


def decode(name: str, get: Callable[[str], Tensor], has: Callable[[str], bool], group: dict[str, Any]) -> Coded:
    """The inverse of :func:`encode`, through ``get``: a tensor by full name, all but a ``weight_shape`` perhaps a meta
    tensor. group: what :func:`group_of` says of the module."""
    scheme, inputs = group["weights"], _inputs_of(name, group)
    known = ("group", "channel", "tensor", "tensor_group", "block")
    block = scheme.get("block_structure") or [1]
    if scheme.get("type", "int") not in ("int", "float") or scheme.get("strategy") not in known or block[0] != 1:
        raise BadInput(f"{name}: compressed-tensors scheme {scheme.get('type')}/{scheme.get('strategy')} is not read by compress")
    if scheme.get("type") == "float":
        return _decode_floats(name, get, has, scheme["num_bits"], inputs)
    bits, scale = scheme["num_bits"], get(f"{name}.weight_scale")
    _, unpack = _packers()
    zero_point = get(f"{name}.weight_zero_point") if has(f"{name}.weight_zero_point") else None
    mixed = zero_point is not None and zero_point.dtype == torch.int8
    if not has(f"{name}.weight_packed"):
        codes = get(f"{name}.weight")
    elif (packed := get(f"{name}.weight_packed")).is_meta:
        codes = torch.empty(torch.Size(get(f"{name}.weight_shape").tolist()), dtype=torch.int8, device="meta")
        zero_point = None if zero_point is None else torch.empty(scale.shape, dtype=torch.int8, device="meta")
    else:
        codes = unpack(packed, bits, torch.Size(get(f"{name}.weight_shape").tolist()))
        if zero_point is not None and not mixed:
            zero_point = unpack(zero_point, bits, scale.shape, packed_dim=0)
    if scale.numel() == 1:
        scale = scale.reshape(1, 1).expand(codes.shape[0], 1).contiguous()
    scale = scale.reshape(codes.shape[0], -1)
    zero_point = None if zero_point is None else zero_point.to(torch.int8).reshape(scale.shape)
    plain = inputs is None and zero_point is None and bits == 8 and not has(f"{name}.weight_packed")
    return Quantized(codes.contiguous(), scale, zero_point, bits, inputs, mixed, plain)


def _decode_floats(
    name: str, get: Callable[[str], Tensor], has: Callable[[str], bool], bits: int, inputs: Inputs | None
) -> FloatQuantized:
    scale = get(f"{name}.weight_scale")
    if bits == 8:
        codes = get(f"{name}.weight")
        if scale.numel() not in (1, codes.shape[0]) or codes.dtype != torch.float8_e4m3fn:
            raise BadInput(f"{name}: compress reads 8-bit floats (e4m3) with one scale per row or matrix only")
        return FloatQuantized(codes, scale.reshape(-1, 1), None, inputs)
    packed = get(f"{name}.weight_packed")
    codes = torch.stack([packed & 15, packed >> 4], -1).flatten(1)
    global_name = f"{name}.weight_global_scale"
    return FloatQuantized(codes, scale, get(global_name) if has(global_name) else None, inputs)


def _inputs_of(name: str, group: dict[str, Any]) -> Inputs | None:
    wanted = group.get("input_activations")
    if group.get("output_activations"):
        raise BadInput(f"{name}: compress does not read a scheme that rounds the layer's outputs")
    if not wanted:
        return None
    for kind, arguments in _INPUTS.items():
        if all(wanted.get(key) == value for key, value in {**arguments, **_PER_TOKEN}.items()):
            return kind
    raise BadInput(f"{name}: compress reads inputs rounded to int8, int4 or fp8 with a scale per token, not {wanted}")


def group_of(name: str, quantization: dict[str, Any] | None) -> dict[str, Any]:
    """The config group that a quantization_config gives to a module: by its name, a pattern, or its class."""
    groups = list((quantization or {}).get("config_groups", {}).values())
    for fits in (
        lambda target: target == name,
        lambda target: target.startswith("re:") and re.match(target[3:], name) is not None,
        lambda target: target == "Linear",
    ):
        for group in groups:
            if any(map(fits, group["targets"])):
                return group
    raise BadInput(f"{name}: its tensors are quantized, but quantization_config names no scheme for it")


def group(weight: Coded) -> dict[str, Any]:
    """The config group of one matrix, all but its targets."""
    return Scheme.of(weight).group()


class Scheme(NamedTuple):
    """What a reader must know of a grid; group_size None: one scale per row, or for the whole matrix."""

    format: str
    strategy: str
    bits: int
    group_size: int | None
    symmetric: bool
    inputs: Inputs | None

    @classmethod
    def of(cls, weight: Coded) -> Scheme:
        """The scheme of one matrix."""
        if isinstance(weight, FloatQuantized):
            if weight.bits == 8:
                strategy = "tensor" if weight.scale.numel() == 1 else "channel"
                return cls("float-quantized", strategy, 8, None, True, weight.inputs)
            if weight.global_scale is None:
                return cls("mxfp4-pack-quantized", "group", 4, 32, True, weight.inputs)
            return cls("nvfp4-pack-quantized", "tensor_group", 4, 16, True, weight.inputs)
        assert isinstance(weight, Quantized)
        unpacked = weight.zero_point is not None and weight.mixed
        strategy = "block" if unpacked else "group" if weight.scale.shape[1] > 1 else "channel"
        size = None if strategy == "channel" else weight.group_size
        container = "pack-quantized" if weight.packed else "int-quantized"
        return cls(container, strategy, weight.bits, size, weight.zero_point is None, weight.inputs)

    @property
    def is_fp4(self) -> bool:
        """Whether it is one of the 4-bit floats."""
        return self.format in _SCALES

    @property
    def unpacks_on_load(self) -> bool:
        """Whether stock transformers must be told to unpack such grids while loading."""
        return self.is_fp4 or (not self.symmetric and self.strategy != "block")

    def group(self) -> dict[str, Any]:
        """The config group, all but its targets."""
        weights = {
            "num_bits": self.bits, "type": "float" if "float" in self.format or self.is_fp4 else "int",
            "symmetric": self.symmetric, "strategy": self.strategy, "group_size": self.group_size, "dynamic": False,
            "actorder": None, "observer": "minmax",
        }  # fmt: skip
        if self.strategy == "block":
            weights |= {"group_size": None, "block_structure": [1, self.group_size]}
        if self.is_fp4:
            weights |= {"scale_dtype": _SCALES[self.format], "zp_dtype": _SCALES[self.format]}
        rounded = {**_INPUTS[self.inputs], **_PER_TOKEN} if self.inputs else None
        return {"weights": weights, "input_activations": rounded, "output_activations": None, "format": self.format}


def schemes(quantized: Mapping[str, Coded]) -> dict[Scheme, list[str]]:
    """Modules by scheme. A row that is one group joins the group-wise scheme of its width where there is one."""
    found: dict[Scheme, list[str]] = {}
    for name, weight in quantized.items():
        found.setdefault(Scheme.of(weight), []).append(name)
    for whole_row in [s for s in found if s.format == "pack-quantized" and s.strategy == "channel"]:
        for name in found.pop(whole_row):
            grouped = whole_row._replace(strategy="group", group_size=quantized[name].shape[1])
            found.setdefault(grouped if grouped in found else whole_row, []).append(name)
    return found


def is_mixed(quantized: Mapping[str, Coded], cache_scheme: dict[str, Any] | None) -> bool:
    """Whether the file must do without being unpacked while loading: it has several schemes, or something that this would
    drop. cache_scheme: how the KV cache is rounded."""
    settled = {n: Quantized(w.codes, w.scale, w.zero_point, w.bits, w.inputs) if isinstance(w, Quantized) else w
               for n, w in quantized.items()}  # fmt: skip
    found = schemes(settled)
    return len(found) > 1 or cache_scheme is not None or any(scheme.inputs for scheme in found)


def check_readable(quantized: Mapping[str, Coded], cache_scheme: dict[str, Any] | None, dtype: torch.dtype) -> None:
    """Raise :class:`BadInput` for 4-bit floats that stock transformers does not open in ``dtype``."""
    found = schemes(quantized)
    if any(scheme.is_fp4 for scheme in found) and is_mixed(quantized, cache_scheme) and dtype != torch.bfloat16:
        listed = "; ".join(f"{s.format} {s.bits} bits ({names[0]}, ...)" for s, names in found.items())
        raise BadInput(
            "transformers opens 4-bit floats beside other grids, rounded inputs or a rounded KV cache in bfloat16 only, and "
            f"here there are: {listed}. Use --dtype bfloat16, or one 4-bit float format for all layers and nothing else"
        )


def quantization_config(
    quantized: Mapping[str, Coded], dense_linears: list[str], cache_scheme: dict[str, Any] | None = None
) -> dict[str, Any]:
    """``config.json``'s quantization_config. quantized: every module on a grid by name; dense_linears: all other nn.Linear
    modules. cache_scheme: how the KV cache is rounded, if at all."""
    by_scheme = schemes(quantized)
    single, tables = len(by_scheme) == 1, any(getattr(weight, "plain", False) for weight in quantized.values())
    unpack_on_load = any(scheme.unpacks_on_load for scheme in by_scheme) and not is_mixed(quantized, cache_scheme)
    return {
        "quant_method": "compressed-tensors",
        "format": next(iter(by_scheme)).format if single else "mixed-precision" if by_scheme else "dense",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{i}": {"targets": ["Linear"] if single and not tables else names, **scheme.group()}
            for i, (scheme, names) in enumerate(by_scheme.items())
        },
        "ignore": sorted(dense_linears),
        "kv_cache_scheme": cache_scheme,
        "global_compression_ratio": None,
        "sparsity_config": {},
        "transform_config": {},
        "version": version("compressed-tensors"),
        **({"dequantize": True} if unpack_on_load else {}),
    }
