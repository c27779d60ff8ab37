"""Architectures as llama.cpp has them: how its tensors differ from the checkpoint's, and what its metadata must say.

Tensor names come from the ``gguf`` package's own table. What is left is data: a row says what llama.cpp takes for granted
of a configuration (anything else is refused), which rows of a matrix it has in another order, and which values it has
scaled or shifted.
"""

from __future__ import annotations

import logging
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compress.errors import BadInput

log = logging.getLogger(__name__)

_SILU = {"hidden_act": ("silu", "swish")}
_ALL = ("sliding_attention",)  # where a window is set and no layer is named, all have it
_YARN = {"beta_fast": 32, "beta_slow": 1, "truncate": True}
_GEMMA2_27B_LAYERS = 46  # llama.cpp tells this model, whose attention is scaled by another rule, by its depth


class Row(NamedTuple):
    """name: llama.cpp's of the architecture. assumes: the configuration's values that it takes for granted. ropes: the
    rotary scalings that it computes. pairs: linear layers whose rotary halves it has interleaved; thirds: those whose rows
    it has by query, key and value first, then by head. norm_shift: added to every norm's weight. windows: whether it
    computes sliding attention. own_head: whether it wants an output matrix even where that is tied. square: whether heads
    must add up to the hidden size. partial: whether it can rotate a part of each head only. epsilon: the configuration's
    name of the norms' epsilon."""

    name: str
    assumes: dict[str, tuple] = _SILU
    ropes: tuple[str, ...] = ("default", "linear", "yarn")
    pairs: tuple[str, ...] = ()
    thirds: tuple[str, ...] = ()
    norm_shift: float = 0.0
    windows: bool = False
    own_head: bool = False
    square: bool = False
    partial: bool = False
    epsilon: str = "rms_norm_eps"


_LLAMA = Row("llama", ropes=("default", "linear", "yarn", "llama3"), pairs=("self_attn.q_proj", "self_attn.k_proj"))

ROWS: dict[str, Row] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": Row("qwen2", square=True),
    "qwen3": Row("qwen3", assumes={**_SILU, "attention_bias": (False,)}),
    "gemma2": Row(
        "gemma2",
        assumes={"hidden_activation": ("gelu_pytorch_tanh",), "attention_bias": (False,), "tie_word_embeddings": (True,)},
        ropes=("default",), norm_shift=1.0, windows=True,
    ),
    "phi3": Row("phi3", ropes=("default", "longrope"), square=True, partial=True),
    "gpt2": Row(
        "gpt2",
        assumes={
            "activation_function": ("gelu_new", "gelu_pytorch_tanh"), "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,),
        },
        ropes=(), square=True, epsilon="layer_norm_epsilon",
    ),
    "gpt_neox": Row(
        "gptneox",
        assumes={"hidden_act": ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh"), "attention_bias": (True,)},
        thirds=("attention.query_key_value",), own_head=True, square=True, partial=True, epsilon="layer_norm_eps",
    ),
}  # fmt: skip


def row_of(model_type: str, config: Any) -> Row:
    """The row of an architecture. Raises :class:`BadInput` where llama.cpp has none, or computes something else."""
    if model_type not in ROWS:
        raise BadInput(f"model type {model_type!r} has no GGUF form here; export as gguf: {', '.join(ROWS)}")
    row = ROWS[model_type]
    for key, admitted in row.assumes.items():
        if (value := getattr(config, key, admitted[0])) not in admitted:
            raise BadInput(
                f"config.json: {key} is {value!r}, for which llama.cpp has no form of {model_type} (it computes {admitted[0]!r})"
            )
    if row.square and head_size(config) * config.num_attention_heads != config.hidden_size:
        raise BadInput(
            f"config.json: {config.num_attention_heads} heads of {head_size(config)} do not add up to hidden_size "
            f"{config.hidden_size}, which llama.cpp requires of {model_type}"
        )
    rope = rope_of(config)
    kind = rope.get("rope_type", "default")
    for key, only in _YARN.items() if kind == "yarn" else ():
        if rope.get(key) not in (None, only):
            raise BadInput(f"config.json: llama.cpp computes yarn with {key} {only}, the model wants {rope[key]}")
    if row.ropes and kind not in row.ropes:
        raise BadInput(
            f"config.json: rope_type {kind!r} of {model_type} is not computed by llama.cpp (it has {', '.join(row.ropes)})"
        )
    if rotary_size(config) != head_size(config) and row.ropes and not row.partial:
        raise BadInput(f"config.json: llama.cpp rotates whole heads of {model_type}, the model {rotary_size(config)} components")
    if row.windows and None in (config.attn_logit_softcapping, config.final_logit_softcapping):
        raise BadInput(f"config.json: llama.cpp has no form of {model_type} without soft-capped logits")
    return row


def head_size(config: Any) -> int:
    """Width of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def rope_of(config: Any) -> dict[str, Any]:
    """The rotary parameters; empty where positions are embedded instead."""
    return getattr(config, "rope_parameters", None) or {}


def row_order(row: Row, local: str, n_rows: int, config: Any) -> Tensor | None:
    """Where llama.cpp's rows (n_rows,) of a linear layer are in the checkpoint's, or None where the order is the same.

    local: the layer's name inside its block.
    """
    rows = torch.arange(n_rows)
    if local in row.pairs:  # checkpoints have a head's even rotary components first, then the odd ones
        return rows.reshape(-1, 2, head_size(config) // 2).transpose(1, 2).reshape(-1)
    if local in row.thirds:
        return rows.reshape(config.num_attention_heads, 3, -1).transpose(0, 1).reshape(-1)
    return None


def row_factor(row: Row, local: str, config: Any) -> float:
    """What a linear layer's weights are multiplied by, for llama.cpp to scale attention as the checkpoint does."""
    if row.name != "gemma2" or local != "self_attn.q_proj":
        return 1.0
    deep = config.num_hidden_layers == _GEMMA2_27B_LAYERS
    implied = config.hidden_size // config.num_attention_heads if deep else head_size(config)
    return math.sqrt(implied / config.query_pre_attn_scalar)


def context_length(row: Row, config: Any) -> int:
    """Tokens over which llama.cpp computes what the checkpoint does; a warning says where a window cuts them short."""
    window: int | None = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if window is None or row.windows or window >= config.max_position_embeddings or "sliding_attention" not in (kinds or _ALL):
        return config.max_position_embeddings
    log.warning(
        "the model attends to %d tokens back, and llama.cpp has no sliding window for %s: the file says a context of %d "
        "tokens, over which both compute the same",
        window, row.name, window,
    )  # fmt: skip
    return window


def add_metadata(writer: Any, row: Row, config: Any) -> None:
    """Write the model's sizes and constants into a ``gguf.GGUFWriter``."""
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(context_length(row, config))
    writer.add_embedding_length(config.hidden_size)
    intermediate = config.n_inner or 4 * config.n_embd if row.name == "gpt2" else config.intermediate_size
    writer.add_feed_forward_length(intermediate)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    writer.add_key_length(head_size(config))
    writer.add_value_length(head_size(config))
    writer.add_vocab_size(config.vocab_size)
    epsilon = getattr(config, row.epsilon)
    if row.epsilon == "rms_norm_eps":
        writer.add_layer_norm_rms_eps(epsilon)
    else:
        writer.add_layer_norm_eps(epsilon)
    if row.name == "gptneox":
        writer.add_parallel_residual(config.use_parallel_residual)
    if row.windows:
        writer.add_sliding_window(config.sliding_window)
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if row.ropes:
        _add_rope(writer, config)


def _add_rope(writer: Any, config: Any) -> None:
    from gguf import RopeScalingType
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = rope_of(config)
    writer.add_rope_dimension_count(rotary_size(config))
    writer.add_rope_freq_base(rope.get("rope_theta", 10000.0))
    kind, factor = rope.get("rope_type", "default"), rope.get("factor", 1.0)
    original = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType(kind))
        writer.add_rope_scaling_factor(factor)
    if kind in ("yarn", "longrope"):
        attention = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))[1]
        own = 1 + 0.1 * math.log(factor) if kind == "yarn" else 1.0  # llama.cpp multiplies it by what the file says
        writer.add_rope_scaling_orig_ctx_len(original or config.max_position_embeddings)
        writer.add_rope_scaling_attn_factors(attention / own)


def rotary_size(config: Any) -> int:
    """Components of a head that are rotated."""
    return int(head_size(config) * rope_of(config).get("partial_rotary_factor", 1.0))


def rope_tensors(config: Any) -> dict[str, Tensor]:
    """Factors (rotary components / 2,) by which llama.cpp divides rotary frequencies, by name; often none."""
    rope = rope_of(config)
    if rope.get("rope_type") == "longrope":
        return {f"rope_factors_{name}.weight": torch.tensor(rope[f"{name}_factor"]) for name in ("long", "short")}
    if rope.get("rope_type") != "llama3":
        return {}
    size, theta = rotary_size(config), rope["rope_theta"]
    lengths = 2 * math.pi * theta ** (torch.arange(0, size, 2, dtype=torch.float64) / size)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = ((rope["original_max_position_embeddings"] / lengths - low) / (high - low)).clamp(0, 1)
    return {"rope_freqs.weight": (1 / ((1 - smooth) / rope["factor"] + smooth)).float()}
