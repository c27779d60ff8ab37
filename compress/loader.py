"""Open an artifact whose layers stock transformers cannot express: low-rank pairs, and quantized Conv1D layers.

This file is also copied into such artifacts as ``modeling_compress.py``, so it stands alone: torch and transformers only.
The artifact's config is the base architecture's plus ``base_model_type`` and ``compress_modules``, under a model type of its
own, since a plain ``llama`` would silently re-initialise the matrices that it misses. The classes made here are subclasses
of the base architecture's own config and model, so generation, caches and quantizers treat them as such.
"""

from functools import cache
from typing import Any

from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.pytorch_utils import Conv1D

MODEL_TYPE = "compress"


class LowRankLinear(nn.Module):
    """y = up(down(x)): two linear layers, ``down`` (in -> rank) without and ``up`` (rank -> out) with the bias."""

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool):
        super().__init__()
        self.down = nn.Linear(in_features, rank, bias=False)
        self.up = nn.Linear(rank, out_features, bias=bias)

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias of the layer, which ``up`` adds."""
        return self.up.bias

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in) -> (..., out)."""
        return self.up(self.down(x))


def linear_shape(module: Any) -> tuple[int, int]:
    """(out, in) of an nn.Linear, a Conv1D or a low-rank layer."""
    if isinstance(module, LowRankLinear):
        return module.up.out_features, module.down.in_features
    n_rows, n_columns = module.weight.shape
    return (n_columns, n_rows) if isinstance(module, Conv1D) else (n_rows, n_columns)


def reshape_module(module: nn.Module, kind: str, rank: int | None = None) -> nn.Module:
    """A new, uninitialised module that takes the place of a linear layer; kind: ``low_rank`` (of that rank) or ``linear``."""
    out_features, in_features = linear_shape(module)
    has_bias = module.bias is not None
    if kind == "low_rank" and rank is not None:
        return LowRankLinear(in_features, out_features, rank, has_bias)
    if kind == "linear":
        return nn.Linear(in_features, out_features, bias=has_bias)
    raise ValueError(f"compress_modules: unknown kind {kind!r}; a newer release of compress may have written this artifact")


def reshape_model(model: nn.Module, modules: dict) -> None:
    """Replace the modules named in ``modules`` (name -> {"kind", "rank"})."""
    for name, shape in modules.items():
        parent_name, _, child = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        setattr(parent, child, reshape_module(getattr(parent, child), **shape))


@cache
def classes(base_model_type: str) -> tuple[type, type]:
    """The config and model class of artifacts of one architecture, registered with transformers' Auto classes."""
    base_config: Any = CONFIG_MAPPING[base_model_type]
    base_model: Any = MODEL_FOR_CAUSAL_LM_MAPPING[base_config]

    def initialise(self, config, *args, **kwargs):
        base_model.__init__(self, config, *args, **kwargs)
        reshape_model(self, config.compress_modules)

    config_class = type("CompressConfig", (base_config,), {"model_type": MODEL_TYPE, "__module__": __name__})
    model_class = type(
        "CompressForCausalLM",
        (base_model,),
        {"config_class": config_class, "__init__": initialise, "__module__": __name__},
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
