"""Rounding of what enters a linear layer or a KV cache, just as compressed-tensors does it in an opened artifact's forward."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

Inputs = Literal["int8", "int4", "fp8"]
"""How inputs are rounded: to 8- or 4-bit integers, or to 8-bit floats (e4m3), with one scale per token."""

_LARGEST_FLOAT = 448.0
_HANDLE = "_input_rounding"
CACHE_SCALES = {"k": "k_scale", "v": "v_scale"}
"""Names, in an attention module, of the scales of keys and values that are not worked out anew for every token."""


class Range(NamedTuple):
    """The numbers of a symmetric grid with steps of one: integers of some bits, or 8-bit floats."""

    bits: int
    is_float: bool

    @property
    def half(self) -> float:
        """What the largest magnitude becomes: half the distance of the extreme codes."""
        return _LARGEST_FLOAT if self.is_float else 2 ** (self.bits - 1) - 0.5

    def nearest(self, x: Tensor) -> Tensor:
        """The nearest of its numbers."""
        if self.is_float:
            return x.clamp(-self.half, self.half).to(torch.float8_e4m3fn).to(x.dtype)
        return x.clamp(-self.half - 0.5, self.half - 0.5).round()


class _Round(torch.autograd.Function):
    """Rounds forwards, and lets gradients pass straight through: x + (rounded - x) would not give the same bits."""

    @staticmethod
    def forward(context: Any, x: Tensor, numbers: Range, scale: Tensor | None, dims: tuple[int, ...]) -> Tensor:
        if scale is None:
            scale = x.abs().amax(dims, keepdim=True) / numbers.half
            scale = torch.where(scale == 0, torch.finfo(scale.dtype).eps, scale)
        return numbers.nearest(x / scale) * scale

    @staticmethod
    def backward(context: Any, *gradients: Any) -> Any:
        return gradients[0], None, None, None


def rounded(x: Tensor, kind: Inputs) -> Tensor:
    """x (batch, length, d) with every token rounded; computed in x's dtype. Gradients pass as if nothing had been done."""
    # Of inputs without a batch dimension, the library scales all tokens together.
    return _Round.apply(x, Range(int(kind[-1]), kind == "fp8"), None, tuple(range(2, x.ndim)))  # type: ignore[no-any-return]


def round_inputs(module: nn.Module, kind: Inputs | None) -> None:
    """Let a module round its first argument from now on; None: no longer."""
    if handle := module.__dict__.pop(_HANDLE, None):
        handle.remove()
    if kind is not None:
        hook = module.register_forward_pre_hook(lambda _, arguments: (rounded(arguments[0], kind), *arguments[1:]))
        module.__dict__[_HANDLE] = hook


class _Cache:
    """Stands before a model's KV cache, or for one: changes what comes in, and passes it on."""

    def __init__(self, inner: Any, change: Callable[[str, Tensor], Tensor]):
        self.inner, self.change = inner, change

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["inner"], name)

    def update(self, keys: Tensor, values: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        keys, values = self.change("k", keys), self.change("v", values)
        return (keys, values) if self.inner is None else self.inner.update(keys, values, *arguments, **options)


def intercept(attention: nn.Module, change: Callable[[str, Tensor], Tensor]) -> RemovableHandle:
    """Let ``change("k" or "v", x)``, x (batch, heads, length, head_dim), see and replace the keys, after rotary embedding,
    and the values of an attention module."""
    names = inspect.signature(attention.forward).parameters
    option = next(name for name in ("cache", "past_key_values", "past_key_value") if name in names)

    def hook(_: nn.Module, arguments: tuple, options: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return arguments, {**options, option: _Cache(options.get(option), change)}

    return attention.register_forward_pre_hook(hook, with_kwargs=True)


def cached_attention(block: nn.Module) -> list[str]:
    """Names, inside a block, of the attention modules whose keys and values compressed-tensors knows how to round."""
    from compressed_tensors.quantization.lifecycle.initialize import is_cached_attention_module

    return [name for name, module in block.named_modules() if is_cached_attention_module(module)]


def round_cache(block: nn.Module, scheme: dict[str, Any]) -> None:
    """Let a block's attention round keys and values as that compressed-tensors scheme says; scales that are not worked out
    anew for every token become its buffers ``k_scale`` and ``v_scale``, on the meta device for now."""
    numbers, dynamic = Range(scheme["num_bits"], scheme["type"] == "float"), bool(scheme["dynamic"])
    for name in cached_attention(block):
        attention: Any = block.get_submodule(name)
        for scale in CACHE_SCALES.values() if not dynamic else ():
            attention.register_buffer(scale, torch.empty(1, device="meta"))

        def change(which: str, x: Tensor, attention: Any = attention) -> Tensor:
            scale = None if dynamic else getattr(attention, CACHE_SCALES[which])
            return _Round.apply(x, numbers, scale, (-1,))  # type: ignore[no-any-return]

        intercept(attention, change)
