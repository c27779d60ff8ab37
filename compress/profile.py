"""What a forward pass of a checkpoint does, read off its files without computing: layers with their stored bytes, KV cache."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from compress.checkpoint import Checkpoint
from compress.eval.roofline import Matrix, Profile
from compress.loader import linear_shape
from compress.manifest import Manifest
from compress.skeleton import Skeleton


def profile(checkpoint: Checkpoint, dtype: torch.dtype) -> Profile:
    """Layers of all blocks and the head of a checkpoint. dtype: of its KV cache, where that is not rounded."""
    skeleton = Skeleton(checkpoint)
    matrices = []
    for index in range(len(skeleton.blocks)):
        for local, weight in skeleton.read_weights(index, meta=True).items():
            n_outputs, n_inputs = skeleton.shape(index, local)
            matrices.append(Matrix(n_inputs, n_outputs, weight.numel, weight.nbytes))
    matrices.append(_head(skeleton))
    config = checkpoint.config.get_text_config()
    attention_heads, head_size = config.num_attention_heads, _head_size(config)
    scheme = checkpoint.cache_scheme
    bits = scheme["num_bits"] if scheme else 8 * dtype.itemsize
    return Profile(
        matrices=tuple(matrices),
        weight_bytes=checkpoint.nbytes,
        query_width=attention_heads * head_size,
        cache_bytes=2 * _key_value_heads(config) * head_size * bits / 8,
        windows=_windows(config, len(skeleton.blocks)),
        is_integer=bits <= 8 and _rounds_inputs(checkpoint),
    )


class Size(NamedTuple):
    """Numbers that a model computes with: those a token passes through; of these and their bytes, all outside embeddings and
    head. Factors count as what they are; removed weights that are stored as zeros count."""

    active_parameters: int
    non_embedding_parameters: int
    non_embedding_bytes: int


def size(checkpoint: Checkpoint) -> Size:
    """Of a mixture's experts, as many parameters count as a token is sent to, and the bytes of all."""
    skeleton = Skeleton(checkpoint)
    tables = {f"{name}.weight" for name in (*skeleton.arch.embeddings, *_heads(skeleton))}
    outer = {name: skeleton.outer_meta(name) for name in skeleton.outer_names()}
    embedded = sum(tensor.numel() for name, tensor in outer.items() if name in tables)
    others = [tensor for name, tensor in outer.items() if name not in tables]
    inside, nbytes = sum(tensor.numel() for tensor in others), sum(tensor.nbytes for tensor in others)
    share = _active_share(checkpoint.config.get_text_config())
    for index in range(len(skeleton.blocks)):
        weights = {} if index in skeleton.owners else skeleton.read_weights(index, meta=True)
        stored = [(name, weight.numel, weight.nbytes) for name, weight in weights.items()]
        for name in skeleton.block_names(index):
            tensor = checkpoint.meta(skeleton.file_name(name))
            stored.append((name, tensor.numel(), tensor.nbytes))
        inside += sum(int(n * share) if ".experts." in name else n for name, n, _ in stored)
        nbytes += sum(own for _, _, own in stored)
    return Size(embedded + inside, inside, nbytes)


def _active_share(config: Any) -> float:
    """The share of experts that a token is sent to."""
    chosen = getattr(config, "num_experts_per_tok", None)
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    known = next((found for name in names if (found := getattr(config, name, None))), None)
    return chosen / known if chosen and known else 1.0


def _head(skeleton: Skeleton) -> Matrix:
    n_outputs, n_inputs = linear_shape(skeleton.model.get_output_embeddings())
    names = (*_heads(skeleton), *skeleton.arch.embeddings)
    tables = skeleton.tables()
    if name := next((name for name in names if name in tables), None):
        nbytes = tables[name].nbytes
    else:
        own = next(f"{name}.weight" for name in names if f"{name}.weight" in skeleton.outer_names())
        nbytes = n_outputs * n_inputs * skeleton.outer_meta(own).element_size()
    return Matrix(n_inputs, n_outputs, n_outputs * n_inputs, nbytes)


def _heads(skeleton: Skeleton) -> list[str]:
    """Names of the head, also where it reads the embedding's matrix."""
    head = skeleton.model.get_output_embeddings()
    return [name for name, module in skeleton.model.named_modules() if module is head]


def _head_size(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _key_value_heads(config: Any) -> int:
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        return 1
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def _windows(config: Any, n_layers: int) -> tuple[int | None, ...]:
    """How far back each layer looks; None: to the beginning."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return (window if getattr(config, "use_sliding_window", True) else None,) * n_layers
    return tuple(window if kind == "sliding_attention" else None for kind in kinds[:n_layers])


def _rounds_inputs(checkpoint: Checkpoint) -> bool:
    manifest: Manifest | None = checkpoint.manifest
    records = manifest.modules.values() if manifest else ()
    return bool(records) and all(record.activations and (record.bits or 16) <= 8 for record in records)
