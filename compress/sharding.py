"""Parameters that the processes of a run share out among themselves (FSDP2): each keeps a part of every one, of its gradient and
of its moments, and has a decoder block whole only while it computes with it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from compress.arch import architecture
from compress.errors import BadInput


def whole(tensor: Tensor) -> Tensor:
    """A tensor of which this process has a part, put together by all of them; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def as_shared(tensor: Tensor, like: Tensor) -> Tensor:
    """Of a whole tensor what this process has of ``like``, where that is shared out; else the tensor on its device."""
    if not isinstance(like, DTensor):
        return tensor.to(like.device)
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def decoder_blocks(model: Any) -> list[nn.Module]:
    """The decoder blocks of a causal language model."""
    return list(model.get_submodule(architecture(model.config.get_text_config().model_type).blocks))


@contextmanager
def sharded(root: nn.Module, n_processes: int, device: torch.device) -> Iterator[None]:
    """Share out the parameters of ``root`` by the decoder blocks of the models in it; what is in no block is whole from each
    forward pass of the root to the end of its backward pass.

    Parameters are others for a while: afterwards the same ones are back, with the values that these ended with, unless an error
    has broken off the work. Raises BadInput where blocks share parameters.
    """
    blocks = [block for model in root.children() if isinstance(model, PreTrainedModel) for block in decoder_blocks(model)]
    owned = [parameter for block in blocks for parameter in set(block.parameters())]
    if len(owned) > len(set(owned)):
        raise BadInput("FSDP cannot split what several decoder blocks share; launch with `accelerate launch --multi_gpu`")
    before = [(module, type(module), _tables(module)) for module in root.modules()]
    mesh = init_device_mesh(device.type, (n_processes,))
    split: list[Any] = [*blocks, root]
    for module in split:
        fully_shard(module, mesh=mesh)
    for _, _, tables in before:
        for parameter in tables["_parameters"].values():
            if parameter is not None:
                parameter.data = parameter.data.new_empty(0)
    try:
        yield
        with torch.no_grad():
            for module in split:
                assert isinstance(module, FSDPModule)
                module.reshard()
            for module, _, tables in before:
                for name, parameter in tables["_parameters"].items():
                    if parameter is not None and not parameter.numel():
                        parameter.data = whole(module._parameters[name].detach())  # type: ignore[union-attr]
    finally:
        for module, kind, tables in before:
            module.__class__ = kind
            for name in _tables(module).keys() - tables.keys():
                delattr(module, name)
            vars(module).update(tables)


def _tables(module: nn.Module) -> dict[str, Any]:
    """What torch keeps about a module: its parameters and hooks by name, as they are now, and the marks that it has."""
    own = {name: value for name, value in vars(module).items() if name.startswith("_")}
    return {name: copy.copy(value) if isinstance(value, dict) else value for name, value in own.items()}
