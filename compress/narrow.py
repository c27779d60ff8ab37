"""Remove channels from a model: neurons of the MLP, attention heads, hidden channels, and whatever must shrink with each.

Removing is choosing rows and columns, so masks, factors and the grids of whole rows stay what they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compress.errors import BadInput
from compress.skeleton import Skeleton
from compress.surgery import Surgery
from compress.weights import Dense, FloatQuantized, LowRank, Masked, Quantized, Sum, Weight


@dataclass(frozen=True)
class Kept:
    """What stays of a block: sorted indices, (count,) int64; None: everything.

    neurons: of the MLP. groups: of key and value heads. queries: of query heads, of every kept group the same number and of no
    other; None: all those of the kept groups. offsets: (d,) biases to add to the outputs of linear layers, by name.
    """

    neurons: Tensor | None = None
    groups: Tensor | None = None
    queries: Tensor | None = None
    offsets: dict[str, Tensor] | None = None


class Attention(NamedTuple):
    """Numbers of query heads and of key/value heads, and channels of each."""

    n_heads: int
    n_groups: int
    head_dim: int


def attention(model: Skeleton, index: int) -> Attention:
    """The heads of a block. Raises :class:`BadInput` for an architecture whose heads cannot be told apart."""
    heads, config = model.arch.heads, model.checkpoint.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if heads is None or not hasattr(config, "num_key_value_heads"):
        raise BadInput(
            f"the attention heads of {model.checkpoint.base_model_type} models cannot be removed one by one: their number is "
            "tied to the hidden size or to a fused layer. Neurons (units=neurons) and whole blocks can be"
        )
    return Attention(model.shape(index, heads.queries)[0] // head_dim, model.shape(index, heads.keys)[0] // head_dim, head_dim)


def n_neurons(model: Skeleton, index: int) -> int:
    """How many neurons a block's MLP has."""
    return model.shape(index, model.arch.neurons.reader)[1]


def narrow(weight: Weight, rows: Tensor | None = None, columns: Tensor | None = None) -> Weight:
    """The weight with only these outputs and inputs, in the same representation; None: all of them.

    Raises ValueError for a grid whose groups of inputs would be torn apart, and for representations without rows or columns.
    """
    if rows is None and columns is None:
        return weight
    if isinstance(weight, Masked):
        kept = _select(weight.kept, rows, columns)
        n_kept = None if weight.n_kept is None else weight.n_kept * kept.numel() // weight.kept.numel()  # a plan's guess
        return Masked(narrow(weight.inner, rows, columns), kept, n_kept)
    if isinstance(weight, Dense):
        return Dense(_select(weight.values, rows, columns))
    if isinstance(weight, LowRank):
        return LowRank(narrow(weight.down, None, columns), narrow(weight.up, rows, None))
    if isinstance(weight, Sum):
        return Sum(tuple(narrow(part, rows, columns) for part in weight.parts))
    if isinstance(weight, FloatQuantized) and weight.bits == 8:
        scale = weight.scale if len(weight.scale) == 1 else _select(weight.scale, rows, None)
        codes = _select(weight.codes.view(torch.uint8), rows, columns).view(weight.codes.dtype)
        return replace(weight, codes=codes, scale=scale)
    if isinstance(weight, Quantized) and (columns is None or weight.scale.shape[1] == 1):
        zero_point = None if weight.zero_point is None else _select(weight.zero_point, rows, None)
        codes = _select(weight.codes, rows, columns)
        return replace(weight, codes=codes, scale=_select(weight.scale, rows, None), zero_point=zero_point)
    raise ValueError(
        "its inputs share scales in groups, which removing some would tear apart; prune before quantizing, or quantize with "
        "group_size=-1 (one scale per output)"
    )


def _select(values: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    values = values if rows is None else values.index_select(0, rows.to(values.device))
    return values if columns is None else values.index_select(1, columns.to(values.device))


def narrowed(model: Skeleton, kept: Sequence[Kept], hidden: Tensor | None = None) -> Surgery:
    """The surgery that leaves ``kept`` of each block, and the channels ``hidden`` of the residual stream (None: all).

    Where every block keeps the same numbers, the result is an ordinary model of its architecture with smaller numbers in
    ``config.json``, unless transformers does not take them: its Llama wants a number of heads that divides the hidden size.
    Otherwise layers have shapes of their own, which the artifact's own loader makes.
    Raises :class:`BadInput` where the architecture does not allow it.
    """
    sliced = any(spec["kind"] == "shortcut" for spec in model.checkpoint.structure.values())
    if hidden is not None and (model.arch.writers is None or sliced or model.checkpoint.base_model_type == "opt"):
        raise BadInput(f"hidden channels of {model.checkpoint.base_model_type} models cannot be removed: {_WHY_NOT_HIDDEN}")
    kept = [kept[model.owner(index)] for index in range(len(kept))]
    shapes = {_shape(model, index, each) for index, each in enumerate(kept)}
    config = {} if hidden is None else _hidden_numbers(model, len(hidden))
    structure = {name: spec for name, spec in model.checkpoint.structure.items() if spec["kind"] != "shape"}
    alike = len(shapes) == 1 and not any(_has_own_biases(model, index, each) for index, each in enumerate(kept))
    if alike and _is_valid(model, numbers := config | _numbers(model, *shapes.pop())):
        config = numbers
    else:
        structure |= _own_shapes(model, kept, hidden)
    return Surgery(
        outer=lambda tensors: {name: _narrow_outer(model, name, tensor, hidden) for name, tensor in tensors.items()},
        block=lambda index, weights, others: _narrow_block(model, index, kept[index], hidden, weights, others),
        config=config, structure=structure, selects=True,
    )  # fmt: skip


def _is_valid(model: Skeleton, config: dict[str, Any]) -> bool:
    """Whether the architecture's configuration takes those numbers."""
    try:
        return bool(model.checkpoint.altered(config, {}).config)
    except BadInput:
        return False


def _has_own_biases(model: Skeleton, index: int, kept: Kept) -> bool:
    """Whether some layer of a block has, or is to have, a bias that others of its architecture lack."""
    structure, names = model.checkpoint.structure, model.arch.linears
    own = any(structure.get(model.module_name(index, local), {}).get("bias") for local in names)
    return own or any(f"{local}.bias" not in model.other_names(index) for local in kept.offsets or ())


_WHY_NOT_HIDDEN = "norms or embeddings stand where compress cannot follow the channels"


def cuts(model: Skeleton, index: int, kept: Kept, hidden: Tensor | None = None) -> dict[str, tuple[Tensor | None, Tensor | None]]:
    """(rows, columns) that stay of each linear layer that changes."""
    sides: dict[str, tuple[Tensor | None, Tensor | None]] = {}
    if kept.neurons is not None:
        neurons, size = model.arch.neurons, n_neurons(model, index)
        rows = torch.cat([kept.neurons + size * number for number in range(neurons.stacked)])
        sides |= dict.fromkeys(neurons.sources, (rows, None)) | {neurons.reader: (None, kept.neurons)}
    if kept.groups is not None or kept.queries is not None:
        shape, heads = attention(model, index), model.arch.heads
        assert heads is not None
        groups, queries = _heads(shape, kept)
        values, outputs = (_channels(found, shape.head_dim) for found in (groups, queries))
        sides |= {heads.queries: (outputs, None), heads.keys: (values, None), heads.values: (values, None)}
        sides[heads.reader] = (None, outputs)
    if hidden is not None:
        for writer in model.arch.writers or ():
            sides[writer] = (hidden, sides.get(writer, (None, None))[1])
        for reader in (reader for edge in model.arch.norms for reader in edge.readers):
            sides[reader] = (sides.get(reader, (None, None))[0], hidden)
    return sides


def _heads(shape: Attention, kept: Kept) -> tuple[Tensor, Tensor]:
    """Indices of the (key and value, query) heads that stay."""
    groups = torch.arange(shape.n_groups) if kept.groups is None else kept.groups
    queries = kept.queries
    if queries is None:
        size = shape.n_heads // shape.n_groups
        queries = (groups.unsqueeze(1) * size + torch.arange(size)).flatten()
    return groups, queries


def _channels(heads: Tensor, head_dim: int) -> Tensor:
    return (heads.unsqueeze(1) * head_dim + torch.arange(head_dim)).flatten()


def _shape(model: Skeleton, index: int, kept: Kept) -> tuple[int, Attention | None]:
    """Numbers of neurons and heads that a block will have; None: its heads are not touched."""
    width = n_neurons(model, index) if kept.neurons is None else len(kept.neurons)
    own_heads = any(spec["kind"] == "shape" for spec in model.checkpoint.structure.values())
    if kept.groups is None and kept.queries is None and not (own_heads and model.arch.heads):
        return width, None
    groups, queries = _heads(attention(model, index), kept)
    return width, Attention(len(queries), len(groups), attention(model, index).head_dim)


def _numbers(model: Skeleton, width: int, heads: Attention | None) -> dict[str, Any]:
    """Changes to ``config.json`` for one shape of all blocks."""
    config = {model.arch.neurons.size: width} if width != n_neurons(model, 0) or model.checkpoint.structure else {}
    if heads is not None:
        config |= {
            "num_attention_heads": heads.n_heads, "num_key_value_heads": heads.n_groups, "head_dim": heads.head_dim,
        }  # fmt: skip
    return config


def _hidden_numbers(model: Skeleton, size: int) -> dict[str, Any]:
    found = model.checkpoint.config
    key = getattr(found, "attribute_map", {}).get("hidden_size", "hidden_size")
    if model.arch.heads is None:
        raise BadInput(
            f"hidden channels of {model.checkpoint.base_model_type} models cannot be removed: the size of their heads follows "
            "from the hidden size"
        )
    return {key: size, "head_dim": attention(model, 0).head_dim}


def _own_shapes(model: Skeleton, kept: Sequence[Kept], hidden: Tensor | None) -> dict[str, dict[str, Any]]:
    """What ``compress_structure`` says of every layer that has a shape of its own in some block."""
    earlier = {local for name in model.checkpoint.structure for local in model.arch.linears if name.endswith(f".{local}")}
    touched = {local for index, each in enumerate(kept) for local in {*cuts(model, index, each), *(each.offsets or {})}}
    found = {}
    for index, each in enumerate(kept):
        sides = cuts(model, index, each, hidden)
        for local in sorted(touched | earlier) if index not in model.owners else ():
            n_outputs, n_inputs = model.shape(index, local)
            rows, columns = sides.get(local, (None, None))
            has_bias = f"{local}.bias" in model.other_names(index) or local in (each.offsets or {})
            found[model.module_name(index, local)] = {
                "kind": "shape", "out_features": n_outputs if rows is None else len(rows),
                "in_features": n_inputs if columns is None else len(columns), "bias": has_bias,
            }  # fmt: skip
            if model.arch.heads and local == model.arch.heads.queries:
                groups, queries = _heads(attention(model, index), each)
                found[model.module_name(index, local)]["queries_per_group"] = len(queries) // len(groups)
    return found


def _narrow_block(
    model: Skeleton, index: int, kept: Kept, hidden: Tensor | None, weights: dict[str, Weight], others: dict[str, Tensor]
) -> tuple[dict[str, Weight], dict[str, Tensor]]:
    sides = cuts(model, index, kept, hidden)
    new, biases = {}, dict(others)
    for local, weight in weights.items():
        rows, columns = sides.get(local, (None, None))
        offset = (kept.offsets or {}).get(local)
        if offset is not None:
            own = biases.get(f"{local}.bias")
            biases[f"{local}.bias"] = offset.to(weight.dtype) if own is None else (own.float() + offset).to(own.dtype)
        try:
            new[local] = narrow(weight, rows, columns)
        except ValueError as error:
            raise ValueError(f"{model.module_name(index, local)}: {error}") from None
        if rows is not None and f"{local}.bias" in biases:
            biases[f"{local}.bias"] = _select(biases[f"{local}.bias"], rows, None)
    for edge in model.arch.norms if hidden is not None else ():
        for name in (f"{edge.source}.weight", f"{edge.source}.bias"):
            if name in biases:
                biases[name] = _select(biases[name], hidden, None)
    return new, biases


def _narrow_outer(model: Skeleton, name: str, tensor: Tensor, hidden: Tensor | None) -> Tensor:
    """Embeddings and head lose columns, the final norm entries; anything else in there is no matter of the stream."""
    if hidden is None:
        return tensor
    return _select(tensor, hidden, None) if tensor.dim() == 1 else _select(tensor, None, hidden)
