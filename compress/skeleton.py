"""A model without weights, filled one block at a time.

The module tree is built on the meta device from the configuration alone. The model's *own* forward runs over blocks that
were replaced by probes: it makes the embeddings, masks and rotary tables that each block is to be called with, and later
the logits from the last block's output. So no architecture's forward is written again here, nor caught by an exception.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from compress.activations import CACHE_SCALES, round_cache
from compress.arch import Architecture
from compress.checkpoint import Checkpoint
from compress.errors import BadInput, explain
from compress.export import layers
from compress.filling import assign, bias_holder, compute_by, fill_linear
from compress.loader import linear_shape, reshape_module, restructure
from compress.weights import Weight, opened, spec_of
from compress.weights.composed import settled


class _Probe(nn.Module):
    """Stands in for a block: remembers how it was called and passes its input, or a given output, on."""

    def __init__(self, block: nn.Module):
        super().__init__()
        object.__setattr__(self, "block", block)  # not a child: its weights are none of the probe's business
        self.arguments: tuple[tuple, dict] = ((), {})
        self.seen: Tensor | None = None
        self.output: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "block"), name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.arguments, self.seen = (args, kwargs), hidden_states
        return hidden_states if self.output is None else self.output


class Skeleton:
    """A causal LM on the meta device. blocks: its decoder blocks. owners: of a block that computes with another one's linear
    layers, which one's, by index.
    mixed: whether the artifact that is being made of it will hold several schemes; None: as the checkpoint does."""

    def __init__(self, checkpoint: Checkpoint, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32):
        self.checkpoint, self.device, self.dtype = checkpoint, torch.device(device), dtype
        self.arch: Architecture = checkpoint.arch
        self.model: Any = build_empty(checkpoint)
        self.blocks: nn.ModuleList = self.model.get_submodule(self.arch.blocks)  # type: ignore[assignment]
        if not len(self.blocks):
            raise BadInput(f"{checkpoint.path / 'config.json'}: a model with no decoder blocks")
        self.owners = {
            int(name.rpartition(".")[2]): int(spec["of"].rpartition(".")[2])
            for name, spec in checkpoint.structure.items() if spec["kind"] == "shared"
        }  # fmt: skip
        self._conv1d = {n for n in self.arch.linears if type(self.blocks[0].get_submodule(n)).__name__ == "Conv1D"}
        if checkpoint.cache_scheme:
            for block in self.blocks:
                round_cache(block, checkpoint.cache_scheme)
        matrices = {f"{local}.weight" for local in self.arch.linears}
        self._block_names = [[name for name in block.state_dict() if name not in matrices] for block in self.blocks]
        self.block_arguments: list[tuple[tuple, dict]] = []
        self.mixed: bool | None = None
        self.tied = set(dict(self.model.named_parameters(remove_duplicate=False))) - set(dict(self.model.named_parameters()))

    def module_name(self, index: int, local: str) -> str:
        """Full name of a linear layer of a block, or of whatever else is in it."""
        return f"{self.arch.blocks}.{index}.{local}"

    def owner(self, index: int) -> int:
        """The block whose linear layers block ``index`` computes with: itself, unless it shares another one's."""
        return self.owners.get(index, index)

    def linear_names(self) -> list[str]:
        """Full names of all compressible linear layers, in order; shared ones once."""
        own = [index for index in range(len(self.blocks)) if index not in self.owners]
        return [self.module_name(index, local) for index in own for local in self.arch.linears]

    def is_conv1d(self, local: str) -> bool:
        """Whether the architecture itself stores that layer as (in, out)."""
        return local in self._conv1d

    def outer_names(self) -> list[str]:
        """Tensors that belong to no block: embeddings, final norm, head (left out where it is tied)."""
        prefix = self.arch.blocks + "."
        names = [name for name, _ in self.model.named_parameters() if not name.startswith(prefix)]
        persistent = self.model.state_dict()
        names += [name for name, _ in self.model.named_buffers() if name in persistent and not name.startswith(prefix)]
        return names

    def block_names(self, index: int, *, cache_scales: bool = True) -> list[str]:
        """Full names of a block's tensors outside its linear layers' matrices: norms and biases, and perhaps scales of a
        rounded KV cache."""
        names = [f"{self.arch.blocks}.{index}.{name}" for name in self._block_names[index]]
        return [name for name in names if cache_scales or not name.endswith(tuple(CACHE_SCALES.values()))]

    def own_tensors(self, index: int) -> dict[str, str]:
        """The file's names of the tensors that a block would have beside its matrices if it shared none, by full name: those of
        :meth:`block_names` without scales of a KV cache, and the biases of the layers that it shares."""
        names = self.block_names(index, cache_scales=False)
        found = {name: self.file_name(name) for name in names}
        for local in self.bias_names(self.owner(index)) if index in self.owners else ():
            found[self.module_name(index, local)] = self.file_name(self.module_name(self.owner(index), local))
        return found

    def bias_names(self, index: int) -> list[str]:
        """Names, inside a block, of the biases of its own linear layers."""
        return [f"{local}.bias" for local in self.arch.linears if f"{local}.bias" in self._block_names[index]]

    def file_name(self, name: str) -> str:
        """Where a block's bias is kept: that of a low-rank layer lies on its ``up`` factor."""
        module, _, leaf = name.rpartition(".")
        if leaf == "bias" and name not in self.checkpoint and f"{module}.up.bias" in self.checkpoint:
            return f"{module}.up.bias"
        return name

    def check(self) -> None:
        """Raise :class:`BadInput` where the checkpoint lacks tensors or has them in other shapes than its config says."""
        modules = set(self.linear_names()) | self.checkpoint.tables
        direct = set(self.outer_names()) | {self.file_name(n) for i in range(len(self.blocks)) for n in self.block_names(i)}
        self.checkpoint.check_complete({self.outer_source(n) for n in direct}, modules)
        for index in range(len(self.blocks)):
            for local in self.arch.linears:
                name = self.module_name(self.owner(index), local)
                expected = self.shape(index, local)
                weight = self.checkpoint.weight(name, expected, conv1d=self.is_conv1d(local), meta=True)
                if weight.shape != expected:
                    raise BadInput(f"{name}: the file holds a matrix of {weight.shape}, config.json asks for {expected}")
            self._check_block_shapes(index)
        for name in self.outer_names():
            self._check_shape(name, self._outer(name), self.outer_source(name))

    def _check_block_shapes(self, index: int) -> None:
        state = self.blocks[index].state_dict()
        for local, name in zip(self._block_names[index], self.block_names(index), strict=True):
            self._check_shape(name, state[local], self.file_name(name))

    def _check_shape(self, name: str, own: Tensor, source: str) -> None:
        found, wanted = tuple(self.checkpoint.meta(source).shape), tuple(own.shape)
        if found != wanted:
            raise BadInput(f"{name}: the file holds a tensor of {found}, config.json asks for {wanted}")

    def outer_source(self, name: str) -> str:
        """The file's tensor for an outer parameter; a tied embedding may be stored under its head's name only."""
        if name in self.checkpoint:
            return name
        shared = (other for other in sorted(self.tied) if self._outer(other) is self._outer(name) and other in self.checkpoint)
        return next(shared, name)

    def read_outer(self) -> dict[str, Tensor]:
        """The tensors that belong to no block, as the file holds them: a table on a grid by its codes."""
        names = [name for name in self.outer_names() if name.removesuffix(".weight") not in self.checkpoint.tables]
        found = {name: self.checkpoint.tensor(self.outer_source(name)) for name in names}
        for module in sorted(self.checkpoint.tables):
            found |= layers.tensors(module, self.checkpoint.weight(module, (0, 0)))
        return found

    def tables(self) -> dict[str, Weight]:
        """The matrices outside the blocks that are on grids, by module name, of meta tensors."""
        return {module: self.checkpoint.weight(module, (0, 0), meta=True) for module in sorted(self.checkpoint.tables)}

    def outer_meta(self, name: str) -> Tensor:
        """An outer tensor in its stored dtype, on the meta device."""
        like = self.outer_source(name) if self.outer_source(name) in self.checkpoint else f"{self.arch.embeddings[0]}.weight"
        return torch.empty(self._outer(name).shape, dtype=self.checkpoint.meta(like).dtype, device="meta")

    def tied_head(self) -> str | None:
        """The head's module name where it reads the embedding's matrix."""
        names = sorted(name.removesuffix(".weight") for name in self.tied if name.endswith(".weight"))
        return names[0] if names else None

    def shape(self, index: int, local: str) -> tuple[int, int]:
        """(out, in) of a linear layer of a block."""
        return linear_shape(self.blocks[self.owner(index)].get_submodule(local))

    def read_weights(self, index: int, *, meta: bool = False) -> dict[str, Weight]:
        """The linear weights of a block by local name, as the checkpoint holds them; meta: with meta tensors."""
        return {local: self.read_weight(index, local, meta=meta) for local in self.arch.linears}

    def read_weight(self, index: int, local: str, *, meta: bool = False) -> Weight:
        """One of :meth:`read_weights`."""
        name, shape = self.module_name(self.owner(index), local), self.shape(index, local)
        return self.checkpoint.weight(name, shape, conv1d=self.is_conv1d(local), meta=meta)

    def other_names(self, index: int) -> list[str]:
        """Names, inside a block, of its tensors outside the linear layers' matrices: norms and biases."""
        return self._block_names[index]

    def read_others(self, index: int) -> dict[str, Tensor]:
        """A block's norms, biases and the like by local name, as the checkpoint holds them."""
        prefix = f"{self.arch.blocks}.{index}."
        return {name: self.checkpoint.tensor(self.file_name(prefix + name)) for name in self._block_names[index]}

    def read_shared_biases(self, index: int) -> dict[str, Tensor]:
        """The biases of the linear layers that a block shares, by local name; none of a block that has layers of its own."""
        shared, owner = self.bias_names(self.owner(index)) if index in self.owners else [], self.owner(index)
        files = {name: self.file_name(self.module_name(owner, name)) for name in shared}
        return {name: self.checkpoint.tensor(file) for name, file in files.items() if file in self.checkpoint}  # not one to come

    def load_block(self, index: int, weights: dict[str, Weight], others: dict[str, Tensor] | None = None) -> nn.Module:
        """Fill block ``index`` with linear weights and others (by local name; None: the checkpoint's), ready to run."""
        block = self.blocks[index]
        owner = self.blocks[self.owner(index)]
        for local, weight in weights.items():
            self.install(owner, local, weight)
        for name, tensor in self.read_shared_biases(index).items():
            self.set_other(owner, name, tensor)
        for name, tensor in (self.read_others(index) if others is None else others).items():
            self.set_other(block, name, tensor)
        for name, buffer in block.named_buffers():
            if buffer.device != self.device and not buffer.is_meta:
                assign(block, name, buffer.to(self.device), False)
        return block.eval()

    def set_other(self, block: nn.Module, name: str, tensor: Tensor) -> None:
        """Give a norm, a bias or a buffer of a block its value."""
        tensor = tensor.to(self.device, self.dtype if tensor.is_floating_point() else tensor.dtype)
        owner, _, leaf = name.rpartition(".")
        module = bias_holder(block.get_submodule(owner)) if leaf == "bias" else block.get_submodule(owner)
        assign(module, leaf, tensor, leaf not in module._buffers)

    def norm_adds_one(self, norm: nn.Module) -> bool:
        """Whether that norm multiplies by one plus its weight, as Gemma's do."""
        return type(norm).__name__.startswith("Gemma")

    def install(self, block: nn.Module, local: str, weight: Weight) -> None:
        """Make the block's linear layer ``local`` compute with ``weight``; its bias is kept."""
        module: Any = block.get_submodule(local)
        own = getattr(module, "spec", None)
        spec = spec_of(weight, conv1d=type(module).__name__ == "Conv1D")
        if spec != own:
            bias = module.bias
            with torch.device("meta"):
                module = reshape_module(module, spec)
            if bias is not None:
                bias_holder(module).bias = bias
            block.set_submodule(local, module)
        fill_linear(module, weight, self.device, self.dtype)

    def materialise(self) -> dict[str, Weight]:
        """Fill the whole model, for training; returns its linear weights by full name, those of bitmasks as masked ones."""
        weights: dict[str, Weight] = {}
        for index in range(len(self.blocks)):
            own = {} if index in self.owners else {k: opened(weight) for k, weight in self.read_weights(index).items()}
            self.load_block(index, own)
            weights |= {self.module_name(index, local): weight for local, weight in own.items()}
        self._fill_outer()
        return weights

    def settled(self, weight: Weight) -> Weight:
        """The same weight as a part of the artifact that is being made."""
        return weight if self.mixed is None else settled(weight, self.mixed)

    def free_block(self, index: int) -> None:
        """Drop the block's tensors."""
        for block in {self.blocks[index], self.blocks[self.owner(index)]}:
            for module in block.modules():
                compute_by(module, None)
            block.to("meta")
        self.checkpoint.unmap()

    def _fill_outer(self) -> None:
        for name in self.outer_names():
            filled = self.checkpoint.tensor(self.outer_source(name), self.dtype).to(self.device)
            assign(self.model, name, filled, isinstance(self._outer(name), nn.Parameter))
        self.model.tie_weights()
        for name, buffer in self.model.named_buffers():
            if not buffer.is_meta and buffer.device != self.device:
                assign(self.model, name, buffer.to(self.device), False)

    @contextmanager
    def _probing(self) -> Iterator[list[_Probe]]:
        originals = list(self.blocks)
        probes = [_Probe(block) for block in originals]
        empty = {name: self._outer(name) for name in self.outer_names()}
        self._fill_outer()
        for index, probe in enumerate(probes):
            self.blocks[index] = probe
        try:
            yield probes
        finally:
            for index, block in enumerate(originals):
                self.blocks[index] = block
            for name, tensor in empty.items():
                assign(self.model, name, tensor, isinstance(tensor, nn.Parameter))
            self.model.tie_weights()

    def _outer(self, name: str) -> Tensor:
        module, _, leaf = name.rpartition(".")
        return getattr(self.model.get_submodule(module), leaf)

    @torch.no_grad()
    def embed(self, token_batches: Iterator[Tensor] | list[Tensor]) -> Iterator[Tensor]:
        """Inputs (batch, length, d) of block 0 for each batch of tokens; also learns how every block is to be called."""
        with self._probing() as probes:
            for number, tokens in enumerate(token_batches):
                tokens = tokens.to(self.device)
                if number == 0:  # of one sequence: masks and positions then broadcast over any batch
                    self.model.base_model(input_ids=tokens[:1], use_cache=False)
                    self.block_arguments = [probe.arguments for probe in probes]
                self.model.base_model(input_ids=tokens, use_cache=False)
                assert probes[0].seen is not None
                yield probes[0].seen

    def run_block(self, index: int, hidden: Tensor, state: dict[str, Tensor] | None = None) -> Tensor:
        """Outputs of block ``index`` for inputs (batch, length, d), called as the model itself calls it; state: tensors to
        use instead of the block's own, by name."""
        args, kwargs = self.block_arguments[index]
        hidden, block = hidden.to(self.device), self.blocks[index]
        output = torch.func.functional_call(block, state, (hidden, *args), kwargs) if state else block(hidden, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    @torch.no_grad()
    def logits(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """Logits (batch, length, V) from the last block's outputs, through the model's own final layers."""
        return next(self.all_logits([(tokens, hidden)])).cpu()

    @torch.no_grad()
    def all_logits(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[Tensor]:
        """:meth:`logits` of several (tokens, hidden), on the skeleton's device; the head is filled only once."""
        with self._probing() as probes:
            for tokens, hidden in batches:
                probes[-1].output = hidden.to(self.device)
                yield self.model(input_ids=tokens.to(self.device), use_cache=False).logits.float()

    def loss_slope(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """The gradient (batch, length, d) of the windows' next-token cross-entropies, each a mean over its tokens, with regard to
        the last block's outputs."""
        with self._probing() as probes, torch.enable_grad():
            probes[-1].output = hidden = hidden.detach().to(self.device).requires_grad_()
            tokens = tokens.to(self.device)
            logits = self.model(input_ids=tokens, use_cache=False).logits[:, :-1].float()
            losses = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
            (slope,) = torch.autograd.grad(losses.view(len(tokens), -1).mean(1).sum(), hidden)
        return slope.cpu()


def build_empty(checkpoint: Checkpoint) -> Any:
    """The causal-LM module of a checkpoint's architecture: parameters on the meta device, buffers real."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    try:
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(checkpoint.config, trust_remote_code=checkpoint.trust_remote_code)
            restructure(model, checkpoint.structure)
    except BadInput:
        raise
    except Exception as error:  # every kind of exception, depending on what is wrong with the configuration
        raise BadInput(f"{checkpoint.path}: transformers cannot build the model of its config.json: {explain(error)}") from None
    model.tie_weights()
    return model.eval()
