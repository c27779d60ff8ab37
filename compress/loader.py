"""Open an artifact whose layers stock transformers cannot express: low-rank pairs, sums, outliers, quantized Conv1D layers.

This file is also copied into such artifacts as ``modeling_compress.py``, so it stands alone: torch and transformers only.
The artifact's config is the base architecture's plus ``base_model_type`` and ``compress_modules``, under a model type of its
own, since a plain ``llama`` would silently re-initialise the matrices that it misses. The classes made here are subclasses
of the base architecture's own config and model, so generation, caches and quantizers treat them as such.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.pytorch_utils import Conv1D

MODEL_TYPE = "compress"


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """Signed codes (count,) int8 in [-2**(bits-1), 2**(bits-1) - 1] from a stream of bits, (bytes,) uint8, least first."""
    if packed.is_meta:
        return torch.empty(count, dtype=torch.int8, device="meta")
    stream = ((packed.unsqueeze(-1) >> torch.arange(8, device=packed.device)) & 1).flatten()[: count * bits]
    weights = 1 << torch.arange(bits, dtype=torch.int16, device=packed.device)
    return ((stream.view(count, bits) * weights).sum(1) - 2 ** (bits - 1)).to(torch.int8)


def signs(packed: Tensor, count: int) -> Tensor:
    """Signs (count,) int8, -1 or 1, from a stream of bits, (bytes,) uint8, least first: a set bit is 1."""
    return unpack_bits(packed, 1, count) * 2 + 1


def spread(x: Tensor) -> Tensor:
    """x Q along the last dimension, for the orthonormal, symmetric Q (so its own inverse) that spreads every entry over all.

    Q is the Kronecker product of a Hartley matrix, of the length's odd part, and a Walsh-Hadamard matrix: it exists for
    every length and needs no table. Computed in at least float32, in O(n (odd + log n)) for each row.
    """
    n = x.shape[-1]
    odd = n // (n & -n)
    y = (x if x.dtype == torch.float64 else x.float()).unflatten(-1, (odd, n // odd))
    if odd > 1:
        steps = torch.arange(odd, device=x.device)
        angles = (torch.outer(steps, steps) % odd).to(y.dtype) * (2 * torch.pi / odd)
        y = (angles.cos() + angles.sin()) @ y
    for _ in range((n // odd).bit_length() - 1):  # each round turns the digits of the index once, so all of them come home
        first, second = y.unflatten(-1, (2, -1)).unbind(-2)
        y = torch.stack((first + second, first - second), -1).flatten(-2)
    return (y.flatten(-2) * n**-0.5).to(x.dtype)


class LowRankLinear(nn.Module):
    """y = up(down(x)): two linear layers, ``down`` (in -> rank) without and ``up`` (rank -> out) with the bias."""

    def __init__(self, in_features: int, out_features: int, bias: bool, rank: int, children: dict):
        super().__init__()
        self.down = build(children.get("down"), in_features, rank, False)
        self.up = build(children.get("up"), rank, out_features, bias)

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias of the layer, which ``up`` adds."""
        return self.up.bias

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in) -> (..., out)."""
        return self.up(self.down(x))


class SumLinear(nn.Module):
    """y = bias + the sum of its parts' outputs."""

    def __init__(self, in_features: int, out_features: int, bias: bool, n_parts: int, children: dict):
        super().__init__()
        self.parts = nn.ModuleList(build(children.get(f"parts.{i}"), in_features, out_features, False) for i in range(n_parts))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in) -> (..., out)."""
        total = self.parts[0](x)
        for part in self.parts[1:]:
            total = total + part(x)
        return total if self.bias is None else total + self.bias


class StoredLinear(nn.Module):
    """A linear layer whose matrix is worked out from its own tensors whenever it is used."""

    bias: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, bias: bool):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def hold(self, name: str, tensor: Tensor) -> None:
        """Keep a tensor of the file: a parameter where it is of floats, which libraries look for to tell a module's dtype."""
        if tensor.is_floating_point():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        else:
            self.register_buffer(name, tensor)

    def matrix(self) -> Tensor:
        """The (out, in) matrix."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in) -> (..., out)."""
        return nn.functional.linear(x, self.matrix(), self.bias)


class OutlierLinear(StoredLinear):
    """A sparse matrix: values (count,) at columns (count,), those of row i from row_starts[i] to row_starts[i + 1]."""

    values: Tensor
    columns: Tensor
    row_starts: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool, count: int, children: dict):
        super().__init__(in_features, out_features, bias)
        self.hold("values", torch.empty(count))
        self.hold("columns", torch.empty(count, dtype=torch.int16 if in_features <= 1 << 15 else torch.int32))
        self.hold("row_starts", torch.empty(out_features + 1, dtype=torch.int32))

    def matrix(self) -> Tensor:
        counts = (self.row_starts[1:] - self.row_starts[:-1]).long()
        rows = torch.arange(self.out_features, device=counts.device).repeat_interleave(counts)
        dense = self.values.new_zeros(self.out_features, self.in_features)
        return dense.index_put_((rows, self.columns.long()), self.values)


class ColumnLinear(StoredLinear):
    """A matrix of few columns that are not zero: values (out, count) at the inputs ``indices`` (count,)."""

    values: Tensor
    indices: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool, count: int, children: dict):
        super().__init__(in_features, out_features, bias)
        self.hold("values", torch.empty(out_features, count))
        self.hold("indices", torch.empty(count, dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x.index_select(-1, self.indices), self.values, self.bias)


class AffineLinear(StoredLinear):
    """A grid with fractional zeros: (codes - zero) * scale, with a scale and a zero per group of inputs of a row; whole: the
    zeros are integers."""

    packed: Tensor
    scale: Tensor
    zero: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool, bits: int, n_groups: int, children: dict, whole: int = 0):
        super().__init__(in_features, out_features, bias)
        self.bits = bits
        self.hold("packed", torch.empty(-(-out_features * in_features * bits // 8), dtype=torch.uint8))
        self.hold("scale", torch.empty(out_features, n_groups))
        self.hold("zero", torch.empty(out_features, n_groups, dtype=torch.int8 if whole else None))

    def matrix(self) -> Tensor:
        codes = unpack_bits(self.packed, self.bits, self.out_features * self.in_features)
        codes = codes.view(*self.scale.shape, -1).to(self.scale.dtype)
        zero, scale = self.zero.to(codes.dtype).unsqueeze(-1), self.scale.unsqueeze(-1)
        return ((codes - zero) * scale).view(self.out_features, self.in_features)


class BilevelLinear(StoredLinear):
    """A grid with integer zeros per group of inputs of a row, whose scales are base + code * step for every 16 rows."""

    packed: Tensor
    packed_zero: Tensor
    packed_scale: Tensor
    base: Tensor
    step: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool, bits: int, n_groups: int, children: dict):
        super().__init__(in_features, out_features, bias)
        self.bits, self.n_grids = bits, out_features * n_groups
        self.hold("packed", torch.empty(-(-out_features * in_features * bits // 8), dtype=torch.uint8))
        self.hold("packed_zero", torch.empty(-(-self.n_grids * bits // 8), dtype=torch.uint8))
        self.hold("packed_scale", torch.empty(-(-self.n_grids * 3 // 8), dtype=torch.uint8))
        self.hold("base", torch.empty(-(-out_features // 16), n_groups))
        self.hold("step", torch.empty(-(-out_features // 16), n_groups))

    def matrix(self) -> Tensor:
        codes = unpack_bits(self.packed, self.bits, self.out_features * self.in_features)
        zero = unpack_bits(self.packed_zero, self.bits, self.n_grids)
        scale_codes = (unpack_bits(self.packed_scale, 3, self.n_grids) + 4).view(self.out_features, -1)
        rows = torch.arange(self.out_features, device=codes.device) // 16
        scale = self.base[rows] + scale_codes.to(self.base.dtype) * self.step[rows]
        codes, zero = (part.view(*scale.shape, -1).to(scale.dtype) for part in (codes, zero))
        return ((codes - zero) * scale.unsqueeze(-1)).view(self.out_features, self.in_features)


class IncoherentLinear(nn.Module):
    """y = signs * spread(inner(spread(signs * x))): a linear layer in a basis in which none of its entries stands out."""

    signs_in: Tensor
    signs_out: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool, children: dict):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.inner = build(children.get("inner"), in_features, out_features, False)
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.register_buffer("signs_in", torch.empty(-(-in_features // 8), dtype=torch.uint8))
        self.register_buffer("signs_out", torch.empty(-(-out_features // 8), dtype=torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in) -> (..., out)."""
        y = self.inner(spread(x * signs(self.signs_in, self.in_features)))
        y = spread(y) * signs(self.signs_out, self.out_features)
        return y if self.bias is None else y + self.bias


class Table(nn.Module):
    """An embedding whose rows are codes times scales: packed (vocabulary, d * bits / 8), scale (vocabulary, n_groups).
    factor: what rows are multiplied by when they are looked up, in families that do so."""

    packed: Tensor
    factor: float | None = None

    def __init__(self, in_features: int, out_features: int, bias: bool, bits: int, n_groups: int, children: dict):
        super().__init__()
        self.bits = bits
        self.register_buffer("packed", torch.empty(out_features, in_features * bits // 8, dtype=torch.uint8))
        self.scale = nn.Parameter(torch.empty(out_features, n_groups), requires_grad=False)

    def rows(self, packed: Tensor, scale: Tensor) -> Tensor:
        """The rows (n, d) of those codes (n, d * bits / 8) and scales (n, n_groups)."""
        codes = unpack_bits(packed.flatten(), self.bits, packed.numel() * 8 // self.bits).to(scale.dtype)
        return (codes.view(*scale.shape, -1) * scale.unsqueeze(-1)).flatten(1)

    def matrix(self) -> Tensor:
        """The (vocabulary, d) matrix."""
        return self.rows(self.packed, self.scale)

    def forward(self, ids: Tensor) -> Tensor:
        """ids: (...) -> (..., d)."""
        flat = ids.flatten()
        found = self.rows(self.packed[flat], self.scale[flat]).view(*ids.shape, -1)
        return found if self.factor is None else found * torch.tensor(self.factor, device=found.device).to(found.dtype)


class TiedHead(nn.Module):
    """A head without tensors of its own: it multiplies by the embedding's table."""

    def __init__(self, table: Any):
        super().__init__()
        self.tables = (table,)  # in a tuple it is no child, whose tensors would be saved twice

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., d) -> (..., vocabulary)."""
        return nn.functional.linear(x, self.tables[0].matrix().to(x.dtype))


KINDS: dict[str, Any] = {
    "low_rank": LowRankLinear,
    "sum": SumLinear,
    "outliers": OutlierLinear,
    "columns": ColumnLinear,
    "affine": AffineLinear,
    "table": Table,
    "bilevel": BilevelLinear,
    "incoherent": IncoherentLinear,
}


def build(spec: dict | None, in_features: int, out_features: int, bias: bool) -> Any:
    """A new, uninitialised linear module of that shape, as ``spec`` ({"kind", sizes, "children"}) says; None: a plain one."""
    if spec is None or spec["kind"] == "linear":
        return nn.Linear(in_features, out_features, bias=bias)
    if spec["kind"] not in KINDS:
        raise ValueError(
            f"compress_modules: unknown kind {spec['kind']!r}; a newer release of compress may have written this artifact"
        )
    sizes = {key: value for key, value in spec.items() if key not in ("kind", "children")}
    module = KINDS[spec["kind"]](in_features, out_features, bias, **sizes, children=spec.get("children", {}))
    module.spec, module.shape = spec, (out_features, in_features)
    return module


def linear_shape(module: Any) -> tuple[int, int]:
    """(out, in) of an nn.Linear, a Conv1D or a module of :func:`build`."""
    if hasattr(module, "spec"):
        return module.shape
    n_rows, n_columns = module.weight.shape
    return (n_columns, n_rows) if isinstance(module, Conv1D) else (n_rows, n_columns)


def reshape_module(module: nn.Module, spec: dict | None) -> nn.Module:
    """A new, uninitialised module of that ``spec`` that takes the place of a linear layer."""
    out_features, in_features = linear_shape(module)
    shaped = build(spec, in_features, out_features, getattr(module, "bias", None) is not None)
    if isinstance(shaped, Table):
        shaped.factor = getattr(module, "scalar_embed_scale", None)
    return shaped


def reshape_model(model: nn.Module, modules: dict) -> None:
    """Replace the modules named in ``modules`` (name -> spec); a "tied_head" names the ``table`` that it reads."""
    for name, spec in sorted(modules.items(), key=lambda item: item[1]["kind"] == "tied_head"):
        parent_name, _, child = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        tied = spec["kind"] == "tied_head"
        module: Any = TiedHead(model.get_submodule(spec["table"])) if tied else reshape_module(getattr(parent, child), spec)
        setattr(parent, child, module)


@cache
def classes(base_model_type: str) -> tuple[type, type]:
    """The config and model class of artifacts of one architecture, registered with transformers' Auto classes."""
    base_config: Any = CONFIG_MAPPING[base_model_type]
    base_model: Any = MODEL_FOR_CAUSAL_LM_MAPPING[base_config]

    def initialise(self, config, *args, **kwargs):
        base_model.__init__(self, config, *args, **kwargs)
        reshape_model(self, config.compress_modules)

    shared = {"__module__": __name__}  # _auto_class: so that save_pretrained copies this file too
    config_class = type("CompressConfig", (base_config,), {"model_type": MODEL_TYPE, "_auto_class": "AutoConfig", **shared})
    model_class = type(
        "CompressForCausalLM",
        (base_model,),
        {"config_class": config_class, "__init__": initialise, "_auto_class": "AutoModelForCausalLM", **shared},
    )
    AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)
    return config_class, model_class


class CompressConfig(PretrainedConfig):
    """Entry point of AutoConfig: makes the config class of the artifact's base architecture."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """Build the configuration; ``base_model_type`` says of which architecture."""
        return classes(config_dict["base_model_type"])[0].from_dict(config_dict, **kwargs)


class CompressForCausalLM(PreTrainedModel):
    """Entry point of AutoModelForCausalLM with remote code: opens the model class of the base architecture."""

    config_class = CompressConfig

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, config=None, **kwargs):
        """Like every from_pretrained; returns a model of the base architecture's class."""
        if config is None:
            config = CompressConfig.from_pretrained(pretrained_model_name_or_path)
        model_class = classes(config.base_model_type)[1]
        return model_class.from_pretrained(pretrained_model_name_or_path, *args, config=config, **kwargs)
