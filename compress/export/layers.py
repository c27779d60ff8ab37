"""Linear layers in files: from a weight in any representation to named tensors, and back.

A composed weight adds the tensors of its own module, and its children are ordinary linear layers: so a low-rank layer is
the two layers ``down`` and ``up``. A matrix on a grid is written in the format of the library that reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compress.errors import BadInput
from compress.export import bitsandbytes, compressed_tensors
from compress.weights import KINDS, Coded, Composed, Dense, Masked, Weight
from compress.weights.composed import unmasked

LIBRARIES: dict[str, ModuleType] = {"compressed-tensors": compressed_tensors, "bitsandbytes": bitsandbytes}
"""The formats of grids by the libraries that read them; the modules offer the same functions."""


def library(quantized: Mapping[str, Coded]) -> ModuleType:
    """The format of all those grids, by name. Raises :class:`BadInput` for grids of two libraries."""
    found = {weight.library: name for name, weight in quantized.items()}
    if len(found) > 1:
        listed = "; ".join(f"{key} reads {name}" for key, name in found.items())
        raise BadInput(f"one artifact is read by one library, and here {listed}: quantize all layers by methods of one kind")
    return LIBRARIES[next(iter(found), "compressed-tensors")]


def group(weight: Coded) -> dict[str, Any]:
    """What its reader must know of a grid beside its tensors, as JSON values."""
    return LIBRARIES[weight.library].group(weight)


def tensor_names(weight: Coded) -> list[str]:
    """The names of a grid's tensors inside its module, also where they are meta tensors."""
    return LIBRARIES[weight.library].tensor_names(weight)


def tensors(name: str, weight: Weight, *, transposed: bool = False) -> dict[str, Tensor]:
    """The file's tensors of one linear layer; transposed: a dense matrix is stored (in, out), as GPT-2 does."""
    weight = unmasked(weight)
    if isinstance(weight, Composed):
        found = {f"{name}.{key}": tensor.contiguous() for key, tensor in weight.tensors().items()}
        for key, part in weight.children().items():
            found |= tensors(f"{name}.{key}", part)
        return found
    if isinstance(weight, Coded):
        return {f"{name}.{key}": tensor for key, tensor in LIBRARIES[weight.library].encode(weight).items()}
    values = weight.dense()
    return {f"{name}.weight": (values.T if transposed else values).contiguous()}


NEEDED = ("weight_shape", *bitsandbytes.STATES)
"""How the names of tensors end that say what shape others have."""


class Source(NamedTuple):
    """Where layers are read from. get: a tensor by name; all but those whose names end as ``NEEDED`` says may be meta tensors.
    has: whether it is there. quantization: the quantization_config. masked: whether a matrix of that name has removed weights;
    they are its zeros."""

    get: Callable[[str], Tensor]
    has: Callable[[str], bool]
    quantization: dict[str, Any] | None = None
    masked: Callable[[str], bool] = lambda _: False


def read_weight(
    name: str, source: Source, spec: dict[str, Any] | None = None, shape: tuple[int, int] = (0, 0), *, transposed: bool = False
) -> Weight:
    """The inverse of :func:`tensors`. spec: what ``compress_modules`` says of the layer, None for a plain one; shape: (out,
    in), which only composed weights need."""
    if spec is not None and spec["kind"] != "linear":
        weight: Weight = _read_composed(name, source, spec, shape)
    elif bitsandbytes.is_here(name, source.has):
        settings = source.quantization or {}
        own = compressed_tensors.group_of(name, settings) if "config_groups" in settings else settings
        weight = bitsandbytes.decode(name, source.get, source.has, own)
    elif source.has(f"{name}.weight_packed") or source.has(f"{name}.weight_scale"):
        group = compressed_tensors.group_of(name, source.quantization)
        weight = compressed_tensors.decode(name, source.get, source.has, group)
    else:
        values = source.get(f"{name}.weight")
        if values.ndim != 2 or values.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            kind = str(values.dtype).removeprefix("torch.")
            raise BadInput(f"{name}: expected a matrix of 16-bit floats or wider, the file holds {kind} of {tuple(values.shape)}")
        weight = Dense(values.T.contiguous() if transposed else values)
    return Masked(weight, weight.dense() != 0) if source.masked(name) else weight


def _read_composed(name: str, source: Source, spec: dict[str, Any], shape: tuple[int, int]) -> Weight:
    kind, specs = KINDS.get(spec["kind"]), spec.get("children", {})
    if kind is None:
        raise BadInput(f"{name}: unknown kind {spec['kind']!r} of module; a newer release of compress may have written it")
    sizes = {key: value for key, value in spec.items() if key not in ("kind", "children")}
    own = {key: source.get(f"{name}.{key}") for key in kind.tensor_names}
    shapes = kind.child_shapes(shape, sizes)
    children = {key: read_weight(f"{name}.{key}", source, specs.get(key), own_shape) for key, own_shape in shapes.items()}
    return kind.assemble(shape, sizes, own, children)
