"""Write a model in other bases of its residual stream: what writes to the stream and what reads it change, its function stays.

A basis is a matrix (d, size) with orthonormal columns, float64: the stream x becomes x @ basis. Norms lose their gains to what
reads them, since only then does a norm of a root mean square not see a rotation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from compress.errors import BadInput
from compress.passes import ModelPass
from compress.skeleton import Skeleton
from compress.weights import Dense, LowRank, Weight

_ON_A_GRID = "{method} would leave the embedding's grid: put {method} before embeddings"
_FLAT = 1e-5  # a gain this much smaller than the largest cannot be divided by


def check_weight(step: ModelPass, weight: Weight) -> Weight:
    """The weight itself; raises ValueError where a rotation would fill zeros or leave a grid."""
    if weight.mask is not None or not _is_floating(weight):
        raise ValueError(f"a rotation would fill the zeros of a mask and leave a grid: put {step.method()} before such passes")
    return weight


def check_model(step: ModelPass, model: Skeleton) -> None:
    """Raise :class:`BadInput` for models whose residual stream has only the basis that it has."""
    arch, config, method = model.arch, model.checkpoint.config, step.method()
    if model.tables():
        raise BadInput(_ON_A_GRID.format(method=method))
    if model.owners:
        why = "blocks that share their layers have norms of their own, which cannot all be fused into them"
        raise BadInput(f"{method}: {why}: put {method} before the pass that shares them")
    if arch.writers is None:
        raise BadInput(f"{method}: {config.model_type} norms each layer's output before it is added, so it cannot be rotated")
    if model.model.get_output_embeddings().weight.shape[1] != stream_size(model) or not getattr(
        config, "do_layer_norm_before", True
    ):
        raise BadInput(f"{method}: this model projects its embeddings or norms after its layers, so it cannot be rotated")


def check_outer(step: ModelPass, model: Skeleton, tensors: dict[str, Tensor]) -> None:
    """Raise :class:`BadInput` where a plan, which no file is made for, has the embedding on a grid by now."""
    if not all(f"{table}.weight" in tensors for table in model.arch.embeddings):
        raise BadInput(_ON_A_GRID.format(method=step.method()))


def stream_size(model: Skeleton) -> int:
    """Channels of the residual stream."""
    return len(model.model.get_submodule(model.arch.final_norm).weight)


def is_centred(model: Skeleton) -> bool:
    """Whether the model's norms subtract a mean, which a rotation must keep then."""
    return "LayerNorm" in type(model.model.get_submodule(model.arch.final_norm)).__name__


def head_matrix(model: Skeleton) -> str:
    """Name of the head's matrix, also where it is tied."""
    head = model.model.get_output_embeddings()
    return f"{next(name for name, module in model.model.named_modules() if module is head)}.weight"


def adder(model: Skeleton, place: int) -> str:
    """The module of a block whose output is added to what enters its norm number ``place``: attention, or the MLP."""
    assert model.arch.writers is not None
    return model.arch.writers[place].rpartition(".")[0]


def shortcut_name(model: Skeleton, place: int) -> str:
    """What a residual connection between bases (``loader.Shortcut``) is called in a block."""
    return f"{adder(model, place).rpartition('.')[2]}_shortcut"


def shortcut_ranks(model: Skeleton, index: int) -> list[int]:
    """Of each residual connection of a block, how many columns its factor has; 0: it leaves the stream alone."""
    names = [model.module_name(index, shortcut_name(model, place)) for place in range(len(model.arch.norms))]
    return [model.checkpoint.structure.get(name, {}).get("rank", 0) for name in names]


def shortcut_factors(model: Skeleton, index: int) -> list[str]:
    """Names, inside a block, of those factors, (size, rank), in order; empty where the block has none."""
    return [f"{shortcut_name(model, place)}.factor" for place, rank in enumerate(shortcut_ranks(model, index)) if rank]


def resized_config(model: Skeleton, size: int) -> dict[str, Any]:
    """Changes to ``config.json`` for another size of the stream: heads keep theirs, which would else follow from it."""
    config = model.checkpoint.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {"hidden_size": size, "head_dim": head_dim}


def takes_size(model: Skeleton, size: int) -> bool:
    """Whether the architecture has models of that size; Llama's own configuration asks for a multiple of the number of heads."""
    try:
        return model.checkpoint.altered(resized_config(model, size), {}).config is not None
    except BadInput:
        return False


def resized_structure(model: Skeleton, size: int, ranks: Sequence[Sequence[int]]) -> dict[str, dict[str, Any]]:
    """What ``compress_structure`` is to say of a stream of that size: the shapes of earlier passes, and the shortcuts.

    ranks: for every block, how many columns the factor of each of its shortcuts has; 0: there is none.
    """
    arch, found = model.arch, {}
    readers = tuple(f".{reader}" for edge in arch.norms for reader in edge.readers)
    writers = tuple(f".{writer}" for writer in arch.writers or ())
    for name, spec in model.checkpoint.structure.items():
        changed = {"in_features": size} if name.endswith(readers) else {}
        changed |= {"out_features": size} if name.endswith(writers) else {}
        found |= {name: spec | changed} if spec["kind"] == "shape" else {}
    for index, of_block in enumerate(ranks):
        for place, rank in enumerate(of_block):
            spec = {"kind": "shortcut", "norm": arch.norms[place].source, "module": adder(model, place), "rank": rank}
            found |= {model.module_name(index, shortcut_name(model, place)): spec} if rank else {}
    return found


def turned_outer(
    model: Skeleton, tensors: dict[str, Tensor], first: Tensor, last: Tensor, scale: float = 1.0
) -> dict[str, Tensor]:
    """The tensors outside the blocks: embeddings write the stream in the basis ``first``; the head, which gets a matrix of its
    own and takes up the last norm's gain, reads it in ``last``. scale: what the stream is multiplied by on the way."""
    arch, new = model.arch, dict(tensors)
    head = head_matrix(model)
    matrix = tensors.get(head, tensors[f"{arch.embeddings[0]}.weight"])
    gain, moved = _fuse(model, arch.final_norm, tensors, last, model.model)
    new |= {f"{arch.final_norm}.{key}": value for key, value in moved.items()}
    new[head] = (matrix.double() * gain @ (last / scale)).to(matrix.dtype)
    for table in arch.embeddings:
        old = tensors[f"{table}.weight"]
        new[f"{table}.weight"] = (old.double() @ (first * scale)).to(old.dtype)
    return new


def turned_block(
    model: Skeleton, index: int, weights: dict[str, Weight], others: dict[str, Tensor], bases: Sequence[Tensor],
    scale: float = 1.0,
) -> tuple[dict[str, Weight], dict[str, Tensor]]:  # fmt: skip
    """A block's linear weights and other tensors. bases: one for each norm, and one for what leaves the block; shortcuts that
    the block has are right afterwards where all are the same. scale: as for :func:`turned_outer`."""
    arch, weights, new = model.arch, dict(weights), dict(others)
    for edge, basis in zip(arch.norms, bases[:-1], strict=True):
        gain, moved = _fuse(model, edge.source, others, basis, model.blocks[index])
        new |= {f"{edge.source}.{key}": value for key, value in moved.items()}
        for reader in edge.readers:
            weights[reader] = multiplied(weights[reader], right=gain.unsqueeze(1) * basis / scale)
    assert arch.writers is not None
    for writer, basis in zip(arch.writers, bases[1:], strict=True):
        turn_outputs(weights, new, writer, basis * scale)
    for name, basis in zip(shortcut_factors(model, index), bases, strict=False):
        new[name] = (basis.T @ others[name].double()).to(others[name].dtype)
    return weights, new


def multiplied(weight: Weight, left: Tensor | None = None, right: Tensor | None = None) -> Weight:
    """left @ weight @ right, in float64, in the weight's own dtype; of a low-rank weight its outer factors change."""
    if isinstance(weight, LowRank):
        return LowRank(multiplied(weight.down, None, right), multiplied(weight.up, left, None))
    assert isinstance(weight, Dense), "check_weight lets no other weight through"
    values = weight.values.double()
    values = values if left is None else left @ values
    values = values if right is None else values @ right
    return Dense(values.to(weight.dtype).contiguous())


def turn_outputs(weights: dict[str, Weight], others: dict[str, Tensor], name: str, basis: Tensor) -> None:
    """Change what a layer puts out, in place: y becomes y @ basis."""
    weights[name] = multiplied(weights[name], left=basis.T)
    if f"{name}.bias" in others:
        bias = others[f"{name}.bias"]
        others[f"{name}.bias"] = (bias.double() @ basis).to(bias.dtype)


def _is_floating(weight: Weight) -> bool:
    return isinstance(weight, Dense) or (isinstance(weight, LowRank) and _is_floating(weight.down) and _is_floating(weight.up))


def _fuse(model: Skeleton, norm: str, tensors: dict[str, Tensor], basis: Tensor, root: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The gain of a norm, (d,) float64, which its readers take up, and the norm's tensors without it, by their last names.

    An offset stays with the norm: divided by the gain, for the readers to multiply it again, and rotated.
    """
    stored = tensors[f"{norm}.weight"]
    plus_one = model.norm_adds_one(root.get_submodule(norm))
    gain, moved = stored.double() + plus_one, {"weight": stored.new_full((basis.shape[1],), 0.0 if plus_one else 1.0)}
    if (offset := tensors.get(f"{norm}.bias")) is not None:
        if bool(((gain.abs() < _FLAT * gain.abs().max()) & (offset != 0)).any()):
            raise ValueError(f"{norm}: a gain is zero where the offset is not, so the model cannot be rotated")
        moved["bias"] = (torch.where(gain == 0, 0, offset.double() / gain) @ basis).to(offset.dtype)
    return gain, moved
