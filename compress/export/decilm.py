"""Write a Llama whose blocks have widths of their own as DeciLM (``nemotron-nas``), which says in ``block_configs`` how many key
and value heads and how many neurons each block has, and which vLLM, SGLang, TensorRT-LLM and llama.cpp read.

Weights are dense. The format says ``ffn_mult``, from which readers make ``int(2 * ffn_mult * hidden_size / 3)`` neurons, rounded
up to a multiple of 256: blocks with another number are filled up with zero neurons. The number of query heads is the same
for all blocks.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.errors import BadInput
from compress.export import dense
from compress.narrow import attention, n_neurons
from compress.skeleton import Skeleton

log = logging.getLogger(__name__)

_MULTIPLE = 256


@torch.no_grad()
def export(source: Path, out: Path, *, overwrite: bool = False) -> Path:
    """Write ``source`` into ``out``, block by block. Raises BadInput where ``out`` exists or the format cannot hold the model."""
    code = Path(__file__).with_name("configuration_decilm.py")

    def beside(_: Skeleton, directory: Path) -> None:
        shutil.copyfile(code, directory / code.name)

    return dense.write("decilm", source, out, _config, _block, overwrite=overwrite, beside=beside)


def padded(n_neurons: int) -> int:
    """The number of neurons that readers make of a block's, all of them multiples of 256."""
    return -(-n_neurons // _MULTIPLE) * _MULTIPLE


def _config(model: Skeleton) -> dict[str, Any]:
    """``config.json``. Raises BadInput for what does not fit."""
    plain, name = model.checkpoint.plain_config, model.checkpoint.path
    if model.checkpoint.base_model_type != "llama":
        raise BadInput(f"{name}: DeciLM is a form of Llama, and this is a {model.checkpoint.base_model_type} model")
    if any(spec["kind"] == "shortcut" for spec in model.checkpoint.structure.values()):
        raise BadInput(f"{name}: DeciLM has no place for what SliceGPT puts beside the layers of a block")
    count = range(len(model.blocks))
    own = {
        local for i in count for local in model.arch.linears if model.blocks[model.owner(i)].get_submodule(local).bias is not None
    }
    wanted = {local for local in own if plain.get("attention_bias" if local.startswith("self_attn.") else "mlp_bias")}
    if own - wanted:
        raise BadInput(f"{name}: DeciLM has no biases in {', '.join(sorted(own - wanted))}; prune with compensate=false")
    shapes, widths = [attention(model, index) for index in count], [n_neurons(model, index) for index in count]
    if len({shape.n_heads for shape in shapes}) > 1:
        found = "+".join(str(shape.n_heads) for shape in shapes)
        raise BadInput(
            f"{name}: DeciLM has one number of query heads for all blocks, here they have {found}; prune units=neurons"
        )
    if filled := sum(padded(width) - width for width in widths):
        log.warning("%s: DeciLM counts neurons in multiples of %d, %d zero ones fill them up", name, _MULTIPLE, filled)
    blocks = [_entry(shape.n_heads // shape.n_groups, padded(w), model) for shape, w in zip(shapes, widths, strict=True)]
    return plain | {
        "architectures": ["DeciLMForCausalLM"], "model_type": "nemotron-nas", "block_configs": blocks,
        "auto_map": {"AutoConfig": "configuration_decilm.DeciLMConfig"}, "num_attention_heads": shapes[0].n_heads,
        "num_key_value_heads": None, "intermediate_size": None, "head_dim": shapes[0].head_dim,
    }  # fmt: skip


def _entry(queries_per_group: int, width: int, model: Skeleton) -> dict[str, Any]:
    none = {"no_op": False, "replace_with_linear": False}
    multiple = 3 * width / (2 * model.checkpoint.config.hidden_size)
    return {"attention": {"n_heads_in_group": queries_per_group, **none}, "ffn": {"ffn_mult": multiple, **none}}


def _block(model: Skeleton, index: int) -> dict[str, Tensor]:
    tensors, neurons = dense.dense_block(model, index), model.arch.neurons
    missing = padded(n_neurons(model, index)) - n_neurons(model, index)
    for local in neurons.sources:
        name = model.module_name(index, local)
        tensors[f"{name}.weight"] = torch.nn.functional.pad(tensors[f"{name}.weight"], (0, 0, 0, missing))
        if f"{name}.bias" in tensors:
            tensors[f"{name}.bias"] = torch.nn.functional.pad(tensors[f"{name}.bias"], (0, missing))
    name = f"{model.module_name(index, neurons.reader)}.weight"
    tensors[name] = torch.nn.functional.pad(tensors[name], (0, missing))
    return tensors
