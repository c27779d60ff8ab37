"""Put weights into modules: what a reader of the artifact would compute with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from compress.activations import round_inputs
from compress.loader import LowRankLinear
from compress.weights import Coded, Composed, Weight
from compress.weights.composed import unmasked


def fill_linear(module: nn.Module, weight: Weight, device: torch.device | str, dtype: torch.dtype) -> None:
    """Set a linear module's tensors to what a reader of the artifact would compute with, and let it round its inputs so."""
    weight = unmasked(weight)
    if isinstance(weight, Composed):
        for name, tensor in weight.tensors().items():
            value = tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)
            assign(module, name, value, name in module._parameters)
        for name, part in weight.children().items():
            fill_linear(module.get_submodule(name), part, device, dtype)
        return
    on_device = weight.map(lambda tensor: tensor.to(device))
    values = on_device.dense(dtype)
    values = values.T if type(module).__name__ == "Conv1D" else values
    # In the layout of a file, so that a block computes the same bits whether it was just compressed or is read back.
    assign(module, "weight", values.contiguous(), True)
    round_inputs(module, weight.inputs if isinstance(weight, Coded) else None)
    compute_by(module, on_device.layer(dtype) if isinstance(on_device, Coded) else None)


def compute_by(module: Any, function: Callable[[Tensor, Tensor | None], Tensor] | None) -> None:
    """Let a linear module compute ``function(inputs, bias)`` while it has the matrix that it has now; None: let it be."""
    module.__dict__.pop("forward", None)
    if function is not None:
        matrix, own = module.weight, module.forward
        module.forward = lambda x: function(x, module.bias) if module.weight is matrix else own(x)


def bias_holder(module: Any) -> Any:
    """The module that adds a layer's bias: of a low-rank layer its last factor."""
    return bias_holder(module.up) if isinstance(module, LowRankLinear) else module


def assign(module: nn.Module, name: str, tensor: Tensor, is_parameter: bool) -> None:
    """Give a module a parameter, without gradients, or a buffer; name: perhaps of a module inside it."""
    parent_name, _, leaf = name.rpartition(".")
    parent = module.get_submodule(parent_name)
    if is_parameter:
        setattr(parent, leaf, tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False))
    else:
        parent._buffers[leaf] = tensor
