"""Architectures as data: where the decoder blocks are, which of their linear layers read the same input, and along which
edges factors can be moved without a change of the function.

Groups are listed in the order in which a block's forward reaches them. Everything else (attention masks, rotary tables,
sliding windows, tied heads) is the model's own code, which the engine runs as it is. A new family is one row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from compress.errors import BadInput
from compress.methods import did_you_mean


class Edge(NamedTuple):
    """An output whose channels are read by the inputs of other layers, channel by channel: a positive factor can be moved
    along it.

    source: a norm or a linear layer inside a block. readers: the linear layers that read it, and nothing else does.
    """

    source: str
    readers: tuple[str, ...]


class Channels(NamedTuple):
    """Channels inside a block that can only be removed from all of its layers together: the neurons of an MLP.

    sources: the linear layers that put them out; stacked: how many times over each does so, one stack after the other (2 where
    gate and up are one layer). reader: the layer that reads them. size: what their number is called in ``config.json``.
    """

    sources: tuple[str, ...]
    reader: str
    size: str = "intermediate_size"
    stacked: int = 1


class Heads(NamedTuple):
    """The linear layers of attention heads that are numbered apart: a key and a value head serve a group of query heads."""

    queries: str
    keys: str
    values: str
    reader: str


class Architecture(NamedTuple):
    """blocks: path of the block list in the causal-LM module. groups: names, inside a block, of the linear layers that
    share an input, in order of execution: the first makes queries and keys. norms: edges from norms. products: edges from
    linear layers, what lies between being linear in each channel, for positive factors at least. writers: the linear
    layers whose outputs are added to the residual stream; None: they are normed before, so that the stream cannot be
    rotated. embeddings: the tables whose rows are added up to start the stream. final_norm: the norm before the head.
    aliases: (the model's name, what files may call it) of a tensor. neurons: of the MLP. heads: of the attention; None: their
    number cannot be changed."""

    blocks: str
    groups: tuple[tuple[str, ...], ...]
    norms: tuple[Edge, ...]
    products: tuple[Edge, ...]
    writers: tuple[str, ...] | None
    embeddings: tuple[str, ...]
    final_norm: str
    neurons: Channels
    heads: Heads | None = None
    aliases: tuple[tuple[str, str], ...] = ()

    @property
    def linears(self) -> tuple[str, ...]:
        """Every compressible linear layer of a block."""
        return tuple(name for group in self.groups for name in group)


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
_GATED = Architecture(
    "model.layers",
    groups=(_QKV, ("self_attn.o_proj",), _GATE_UP, ("mlp.down_proj",)),
    norms=(Edge("input_layernorm", _QKV), Edge("post_attention_layernorm", _GATE_UP)),
    products=(Edge("self_attn.v_proj", ("self_attn.o_proj",)), Edge("mlp.up_proj", ("mlp.down_proj",))),
    writers=("self_attn.o_proj", "mlp.down_proj"),
    embeddings=("model.embed_tokens",),
    final_norm="model.norm",
    neurons=Channels(_GATE_UP, "mlp.down_proj"),
    heads=Heads(*_QKV, "self_attn.o_proj"),
)

ARCHITECTURES: dict[str, Architecture] = {
    "llama": _GATED,
    "mistral": _GATED,
    "qwen2": _GATED,
    "qwen3": _GATED,
    "gemma2": _GATED._replace(norms=(Edge("input_layernorm", _QKV), Edge("pre_feedforward_layernorm", _GATE_UP)), writers=None),
    "phi3": _GATED._replace(
        groups=(("self_attn.qkv_proj",), ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",)),
        norms=(Edge("input_layernorm", ("self_attn.qkv_proj",)), Edge("post_attention_layernorm", ("mlp.gate_up_proj",))),
        products=(),
        neurons=Channels(("mlp.gate_up_proj",), "mlp.down_proj", stacked=2),
        heads=None,
    ),
    "gpt2": Architecture(
        "transformer.h",
        groups=(("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)),
        norms=(Edge("ln_1", ("attn.c_attn",)), Edge("ln_2", ("mlp.c_fc",))),
        products=(),
        writers=("attn.c_proj", "mlp.c_proj"),
        embeddings=("transformer.wte", "transformer.wpe"),
        final_norm="transformer.ln_f",
        neurons=Channels(("mlp.c_fc",), "mlp.c_proj", "n_inner"),
    ),
    "opt": Architecture(
        "model.decoder.layers",
        groups=(_QKV, ("self_attn.out_proj",), ("fc1",), ("fc2",)),
        norms=(Edge("self_attn_layer_norm", _QKV), Edge("final_layer_norm", ("fc1",))),
        products=(Edge("self_attn.v_proj", ("self_attn.out_proj",)), Edge("fc1", ("fc2",))),  # a ReLU in between
        writers=("self_attn.out_proj", "fc2"),
        embeddings=("model.decoder.embed_tokens", "model.decoder.embed_positions"),
        final_norm="model.decoder.final_layer_norm",
        neurons=Channels(("fc1",), "fc2", "ffn_dim"),
    ),
    "gpt_neox": Architecture(
        "gpt_neox.layers",
        groups=(("attention.query_key_value",), ("attention.dense",), ("mlp.dense_h_to_4h",), ("mlp.dense_4h_to_h",)),
        norms=(
            Edge("input_layernorm", ("attention.query_key_value",)),
            Edge("post_attention_layernorm", ("mlp.dense_h_to_4h",)),
        ),
        products=(),
        writers=("attention.dense", "mlp.dense_4h_to_h"),
        embeddings=("gpt_neox.embed_in",),
        final_norm="gpt_neox.final_layer_norm",
        neurons=Channels(("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h"),
        aliases=(("lm_head.weight", "embed_out.weight"),),
    ),
}


def architecture(model_type: str, config: Mapping[str, Any] | None = None, *, has_experts: bool = False) -> Architecture:
    """The row of a ``config.model_type``, less what the model's own ``config.json`` rules out. Raises :class:`BadInput` for
    a family that has none."""
    if model_type not in ARCHITECTURES:
        raise BadInput(
            f"model type {model_type!r} is not supported{did_you_mean(model_type, ARCHITECTURES)}; "
            f"compress knows {', '.join(ARCHITECTURES)}. What is missing: its row (block path and input groups) in "
            "compress/arch.py" + ("; mixture-of-experts layers are not handled yet" if has_experts else "")
        )
    row, config = ARCHITECTURES[model_type], config or {}
    if model_type == "opt" and not config.get("do_layer_norm_before", True):  # its norms feed the residual stream
        row = row._replace(norms=(), writers=None)
    if model_type == "opt" and config.get("activation_function", "relu") != "relu":
        row = row._replace(products=tuple(edge for edge in row.products if edge.source != "fc1"))
    return row
