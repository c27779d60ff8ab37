"""Layers that are trained in the representation that compression gave them: factors, kept values, scales of grids."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from compress.activations import rounded
from compress.sharding import as_shared, decoder_blocks, whole
from compress.train_pass import TrainPass
from compress.weights import Composed, LowRank, Weight
from compress.weights.composed import unmasked
from compress.weights.matrix import counted


class TrainableLinear(nn.Module):
    """A linear layer that computes with a representation of its matrix and trains float32 copies of its parameters.

    chosen: whether :meth:`take` has put other fixed parts (a mask, codes) in the place of those that it came with.
    """

    def __init__(self, weight: Weight, bias: Tensor | None, device: torch.device):
        super().__init__()
        self.original = weight
        # On the device is needed what is not trained (masks, codes); of the rest there are masters, and the old values stay.
        trained = {id(value) for value in weight.parameters().values()}
        self.frame = weight.map(lambda tensor: tensor if id(tensor) in trained else tensor.to(device))
        self.masters = nn.ParameterList([_master(value, device) for value in weight.parameters().values()])
        self.bias = None if bias is None else _master(bias, device)
        self.chosen = False

    @property
    def weight(self) -> Weight:
        """The representation around the masters themselves; around whole copies where processes have parts of these."""
        return self.frame.rebuild(dict(zip(self.frame.parameters(), map(whole, self.masters), strict=True)))

    @torch.no_grad()
    def take(self, weight: Weight) -> None:
        """Go on from another weight of the same form, such as :attr:`weight` around other fixed parts or other values."""
        masters = dict(zip(map(id, weight.parameters().values()), self.masters, strict=True))
        for value, master in zip(weight.parameters().values(), self.masters, strict=True):
            if value is not master:
                master.copy_(as_shared(value, master))
        # Without whole copies of what processes may have parts of.
        self.frame, self.chosen = weight.map(lambda tensor: masters.get(id(tensor), tensor)), True

    @property
    def fixed(self) -> list[Tensor]:
        """The tensors of the representation that are not trained, in the order of :meth:`Weight.map`."""
        found: list[Tensor] = []
        self._map_fixed(lambda tensor: found.append(tensor) or tensor)
        return found

    def restore(self, fixed: Sequence[Tensor]) -> None:
        """Go on from what :attr:`fixed` once was."""
        left = iter(fixed)
        self.frame, self.chosen = self._map_fixed(lambda tensor: next(left).to(tensor)), True

    def _map_fixed(self, function: Callable[[Tensor], Tensor]) -> Weight:
        trained = {id(value) for value in self.frame.parameters().values()}
        return self.frame.map(lambda tensor: tensor if id(tensor) in trained else function(tensor))

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        if inputs := getattr(unmasked(self.original), "inputs", None):
            x = rounded(x, inputs)
        bias = None if self.bias is None else self.bias.to(dtype)
        return F.linear(x, self.weight.dense(dtype), bias)

    def shares(self) -> list[tuple[str, nn.Parameter, float]]:
        """The name of each parameter of the representation, its master, and by which share of the learning rate that moves."""
        shares = self.original.shares()
        return [(name, master, shares[name]) for name, master in zip(self.original.parameters(), self.masters, strict=True)]

    @torch.no_grad()
    def trained(self) -> Weight:
        """The representation around the trained values, in the dtypes and on the devices of the original."""
        pairs = zip(self.original.parameters().items(), self.masters, strict=True)
        values = {name: master.detach().to(old) for (name, old), master in pairs}
        if not self.chosen:
            return self.original.rebuild(values)
        home = next(iter(values.values())).device
        return self._map_fixed(lambda tensor: tensor.to(home)).rebuild(values)


class TrainableFactors(nn.Module):
    """A low-rank layer, computed factor by factor; the factors are compressed matrices themselves."""

    def __init__(self, weight: LowRank, bias: Tensor | None, device: torch.device):
        super().__init__()
        self.down = trainable(weight.down, None, device)
        self.up = trainable(weight.up, bias, device)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))

    @property
    def bias(self) -> Tensor | None:
        return self.up.bias

    def trained(self) -> Weight:
        """The factors with their trained values."""
        return LowRank(self.down.trained(), self.up.trained())


def trainable(weight: Weight, bias: Tensor | None, device: torch.device) -> TrainableLinear | TrainableFactors:
    layer: Any = TrainableFactors if isinstance(weight, LowRank) else TrainableLinear
    return layer(weight, bias, device)


def trained_names(name: str, weight: Weight) -> Iterator[str]:
    """The names by which a training pass knows a linear layer: its own, or those of its factors."""
    if isinstance(weight, LowRank):
        yield from trained_names(f"{name}.down", weight.down)
        yield from trained_names(f"{name}.up", weight.up)
    else:
        yield name


def outline_trained(step: TrainPass, name: str, weight: Weight) -> Weight:
    """What a linear layer, a weight of meta tensors, will have become after training."""
    if isinstance(weight, LowRank):
        return LowRank(outline_trained(step, f"{name}.down", weight.down), outline_trained(step, f"{name}.up", weight.up))
    if not step.trains_layer(name):
        return weight
    outlined = step.outline(weight)
    return counted(outlined, weight, outlined)


def _master(value: Tensor, device: torch.device) -> nn.Parameter:
    return nn.Parameter(value.detach().to(device, torch.float32, copy=True).contiguous())


@contextmanager
def trainable_layers(
    student: nn.Module, weights: Mapping[str, Weight], device: torch.device
) -> Iterator[dict[str, TrainableLinear | TrainableFactors]]:
    """Put trainable layers in the places of the compressed ones; afterwards the student's own modules are back."""
    originals: dict[str, Any] = {name: student.get_submodule(name) for name in weights}
    layers = {name: trainable(weight, originals[name].bias, device) for name, weight in weights.items()}
    for name, layer in layers.items():
        student.set_submodule(name, layer)
    try:
        yield layers
    finally:
        for name, module in originals.items():
            student.set_submodule(name, module)


@contextmanager
def recomputed_blocks(model: Any) -> Iterator[None]:
    """Keep nothing of the model's decoder blocks for the backward pass but what enters them: they are then computed again.

    The library's own way works in training mode only.
    """
    blocks = decoder_blocks(model)
    own = [vars(block).get("forward") for block in blocks]
    for block in blocks:
        block.forward = _recomputed(block.forward)
    try:
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            del block.forward  # the class's own is there again
            if forward is not None:
                block.forward = forward


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return run


@torch.no_grad()
def write_back(module: Any, weight: Weight, bias: Tensor | None) -> None:
    """Give trained values to the tensors of the student's own module."""
    weight = unmasked(weight)
    if isinstance(weight, Composed):
        for key, value in weight.tensors().items():
            own = getattr(module, key)
            own.data = value.to(own)
        for name, part in weight.children().items():
            adds_bias = isinstance(weight, LowRank) and name == "up"
            write_back(module.get_submodule(name), part, bias if adds_bias else None)
    else:
        dense = weight.dense(module.weight.dtype)
        dense = dense.T if isinstance(module, Conv1D) else dense
        module.weight.data = dense.to(module.weight.device).clone(memory_format=torch.contiguous_format)
    if bias is not None and not isinstance(weight, LowRank):
        module.bias.data = bias.detach().to(module.bias)
