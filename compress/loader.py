"""Open an artifact whose layers stock transformers cannot express: low-rank pairs, sums, outliers, quantized Conv1D layers,
layers of other shapes than their neighbours', blocks that share their weights, residual connections between bases.

This file is also copied into such artifacts as ``modeling_compress.py``, with ``stored_layers.py``, ``stored_codebooks.py``,
``stored_binary.py`` and ``stored_tables.py`` beside it, so they stand alone: torch and transformers only.
The artifact's config is the base architecture's plus ``base_model_type``, ``compress_structure`` and ``compress_modules``, under
a model type of its own, since a plain ``llama`` would silently re-initialise the matrices that it misses. The classes made here
are subclasses of the base architecture's own config and model, so generation, caches and quantizers treat them as such.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.pytorch_utils import Conv1D

from .stored_binary import BinaryLinear
from .stored_codebooks import CodebookLinear
from .stored_layers import (
    AffineLinear,
    BilevelLinear,
    BitmaskGridLinear,
    BitmaskLinear,
    ColumnLinear,
    OpenedLinear,
    OutlierLinear,
    RowLinear,
    signs,
    spread,
    tensor_train,
)  # fmt: skip
from .stored_tables import Lookup, Table, TableFactors, TableTrains, TiedHead

MODEL_TYPE = "compress"
_ROWS_OF_ONES = 1024  # that a matrix is read out with at a time


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


class TensorTrainLinear(OpenedLinear):
    """A chain of cores, linear layers (bond before * n_i -> m_i * bond after): each eats the inputs' next digit and puts out the
    outputs' next one, for all other digits alike. rows: (m_1 ... m_c), columns: (n_1 ... n_c). opened: the matrix that they
    make is multiplied out once, where computing with it is less work."""

    def __init__(self, in_features: int, out_features: int, bias: bool, rows: list, columns: list, bonds: list, opened: int,
                 children: dict):  # fmt: skip
        super().__init__(in_features, out_features, bias)
        self.rows, self.columns, self.opens = rows, columns, opened
        sizes = zip(rows, columns, [1, *bonds], [*bonds, 1], strict=True)
        self.cores = nn.ModuleList(
            build(children.get(f"cores.{i}"), before * n, m * after, False) for i, (m, n, before, after) in enumerate(sizes)
        )

    def matrix(self) -> Tensor:
        return tensor_train([matrix_of(core) for core in self.cores], self.rows, self.columns)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in) -> (..., out)."""
        if self.opens and not any(core._forward_pre_hooks for core in self.cores):  # which want to see what enters a core
            return super().forward(x)
        y = x.reshape(-1, 1, self.in_features)  # tokens and outputs' digits; bond; inputs' digits that are left
        for core, m, n in zip(self.cores, self.rows, self.columns, strict=True):
            y = core(y.unflatten(2, (n, -1)).flatten(1, 2).transpose(1, 2))  # (tokens, rest, m * bond)
            y = y.unflatten(2, (m, -1)).permute(0, 2, 3, 1).flatten(0, 1)
        y = y.reshape(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias


class SharedLinear(nn.Module):
    """A linear layer without tensors of its own: it computes as that of another block does."""

    def __init__(self, block: nn.Module, name: str):
        super().__init__()
        self.place = (block, name)  # in a tuple they are no children, whose tensors would be saved twice

    @property
    def own(self) -> Any:
        """The layer that it stands for."""
        return self.place[0].get_submodule(self.place[1])

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in) -> (..., out)."""
        return self.own(x)


class Shortcut(nn.Module):
    """What a residual connection adds to a sum, so that x + f(norm(x)) becomes x (1 - F F^T) + f(norm(x)): the change of basis
    between the places before and after f. factor: F (size, rank).

    The block's own forward stays: hooks see x enter the norm, and add to what f puts out.
    """

    def __init__(self, size: int, rank: int):
        super().__init__()
        self.factor = nn.Parameter(torch.empty(size, rank))
        self.seen: Any = None

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., size) -> -x F F^T."""
        return -((x @ self.factor) @ self.factor.T)

    def connect(self, norm: nn.Module, module: nn.Module) -> None:
        """Watch the norm's input and the output of f. Bound methods as hooks are copied along with the model."""
        norm.register_forward_pre_hook(self.remember)
        module.register_forward_hook(self.add)

    def remember(self, _: nn.Module, inputs: tuple) -> None:
        """The norm's hook."""
        self.seen = inputs[0]

    def add(self, _: nn.Module, inputs: tuple, output: Any) -> Any:
        """The hook of f; where f runs without its block there is nothing to add."""
        if self.seen is None:
            return output
        change, self.seen = self(self.seen), None
        return (output[0] + change, *output[1:]) if isinstance(output, tuple) else output + change


KINDS: dict[str, Any] = {
    "low_rank": LowRankLinear,
    "sum": SumLinear,
    "outliers": OutlierLinear,
    "columns": ColumnLinear,
    "rows": RowLinear,
    "affine": AffineLinear,
    "table": Table,
    "table_factors": TableFactors,
    "table_trains": TableTrains,
    "bilevel": BilevelLinear,
    "incoherent": IncoherentLinear,
    "bitmask": BitmaskLinear,
    "bitmask_grid": BitmaskGridLinear,
    "tensor_train": TensorTrainLinear,
    "codebook": CodebookLinear,
    "binary": BinaryLinear,
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


def matrix_of(module: Any) -> Tensor:
    """The (out, in) matrix of a linear module without a bias: its weight where it is a plain one, else what it makes of ones."""
    if type(module) is nn.Linear and hasattr(module, "weight"):
        return module.weight
    like, n_inputs = next(module.parameters()), linear_shape(module)[1]
    ones = torch.eye(n_inputs, dtype=like.dtype if like.is_floating_point() else None, device=like.device)
    return torch.cat([module(rows) for rows in ones.split(_ROWS_OF_ONES)]).T


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
    if isinstance(shaped, Lookup):
        shaped.factor = getattr(module, "scalar_embed_scale", None)
    return shaped


def restructure(model: nn.Module, structure: dict) -> None:
    """Change a model's modules before ``compress_modules`` is applied, as ``compress_structure`` says (name -> spec).

    kind "shape": a linear layer has ``out_features``, ``in_features`` and perhaps a ``bias`` of its own; that of the queries
    says with ``queries_per_group`` how many heads share a key and value head. kind "shared": a block computes with the linear
    layers of the block ``of``. kind "shortcut": a :class:`Shortcut` of that ``rank`` in a block, which skips from its ``norm`` to
    behind its ``module``.
    """
    for name, spec in structure.items():
        if spec["kind"] == "shape":
            parent_name, _, child = name.rpartition(".")
            parent = model.get_submodule(parent_name)
            setattr(parent, child, nn.Linear(spec["in_features"], spec["out_features"], bias=spec["bias"]))
            if "queries_per_group" in spec:
                parent.num_key_value_groups = spec["queries_per_group"]
        elif spec["kind"] == "shared":
            block, owner = model.get_submodule(name), model.get_submodule(spec["of"])
            for local, module in list(block.named_modules()):
                if isinstance(module, nn.Linear | Conv1D):
                    block.set_submodule(local, SharedLinear(owner, local))
        elif spec["kind"] == "shortcut":
            block_name, _, child = name.rpartition(".")
            block: Any = model.get_submodule(block_name)
            norm = block.get_submodule(spec["norm"])
            shortcut = Shortcut(len(norm.weight), spec["rank"])
            shortcut.connect(norm, block.get_submodule(spec["module"]))
            block.add_module(child, shortcut)
        else:
            raise ValueError(
                f"compress_structure: unknown kind {spec['kind']!r}; a newer release of compress may have written this artifact"
            )


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
        restructure(self, getattr(config, "compress_structure", {}))
        reshape_model(self, getattr(config, "compress_modules", {}))

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
