"""Architectures as data: where the decoder blocks are and which of their linear layers read the same input.

Groups are listed in the order in which a block's forward reaches them. Everything else (attention masks, rotary tables,
sliding windows, tied heads) is the model's own code, which the engine runs as it is. A new family is one row.
"""

from __future__ import annotations

from typing import NamedTuple

from compress.errors import BadInput
from compress.methods import did_you_mean


class Architecture(NamedTuple):
    """blocks: path of the block list in the causal-LM module. groups: names, inside a block, of the linear layers that
    share an input, in order of execution. aliases: (the model's name, what files may call it) of a tensor."""

    blocks: str
    groups: tuple[tuple[str, ...], ...]
    aliases: tuple[tuple[str, str], ...] = ()

    @property
    def linears(self) -> tuple[str, ...]:
        """Every compressible linear layer of a block."""
        return tuple(name for group in self.groups for name in group)


_GATED = Architecture(
    "model.layers",
    (
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    ),
)

ARCHITECTURES: dict[str, Architecture] = {
    "llama": _GATED,
    "mistral": _GATED,
    "qwen2": _GATED,
    "qwen3": _GATED,
    "gemma2": _GATED,
    "phi3": Architecture(
        "model.layers", (("self_attn.qkv_proj",), ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",))
    ),
    "gpt2": Architecture("transformer.h", (("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",))),
    "opt": Architecture(
        "model.decoder.layers",
        (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.out_proj",), ("fc1",), ("fc2",)),
    ),
    "gpt_neox": Architecture(
        "gpt_neox.layers",
        (("attention.query_key_value",), ("attention.dense",), ("mlp.dense_h_to_4h",), ("mlp.dense_4h_to_h",)),
        aliases=(("lm_head.weight", "embed_out.weight"),),
    ),
}


def architecture(model_type: str, *, has_experts: bool = False) -> Architecture:
    """The row of a ``config.model_type``. Raises :class:`BadInput` for a family that has none."""
    if model_type not in ARCHITECTURES:
        raise BadInput(
            f"model type {model_type!r} is not supported{did_you_mean(model_type, ARCHITECTURES)}; "
            f"compress knows {', '.join(ARCHITECTURES)}. What is missing: its row (block path and input groups) in "
            "compress/arch.py" + ("; mixture-of-experts layers are not handled yet" if has_experts else "")
        )
    return ARCHITECTURES[model_type]
