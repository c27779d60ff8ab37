"""A decoder block while passes work on it: its weights, norms, statistics and activations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from compress.arch import Edge
from compress.loader import LowRankLinear
from compress.skeleton import Skeleton
from compress.stats import LinearStats
from compress.weights import Composed, Dense, LowRank, Masked, SparsePart, Sum, Weight, leaves, opened
from compress.weights.composed import unmasked


class Block:
    """What a :class:`compress.passes.BlockPass` is given, and what the engine writes afterwards.

    index: which block of the model. weights: what each linear layer has become, by its name inside the block. before: what
    it was at the start of the stage, in the block's present scaling. others: norms and biases by name, as they will be
    stored. stats: by layer name, those of its group's input; only what the pass declared. inputs: (n, length, d)
    activations that enter the block, where the pass needs them; targets: (n, length, d), the block's reference outputs,
    where it needs these.
    """

    def __init__(self, skeleton: Skeleton, index: int, weights: dict[str, Weight], others: dict[str, Tensor]):
        self.skeleton, self.index, self.others = skeleton, index, others
        self.weights = {local: skeleton.settled(weight) for local, weight in weights.items()}
        self.before = dict(weights)
        self.applied: dict[str, list[str]] = {local: [] for local in weights}
        self.stats: dict[str, LinearStats] = {}
        self.inputs: Tensor | None = None
        self.targets: Tensor | None = None
        self.selected: frozenset[str] = frozenset()
        self.module: nn.Module = skeleton.load_block(index, self.weights, others)

    def name(self, local: str) -> str:
        """Full name of a linear layer."""
        return self.skeleton.module_name(self.skeleton.owner(self.index), local)

    # matrices

    def matrices(self, weights: Mapping[str, Weight] | None = None) -> dict[str, Weight]:
        """The matrices of the layers that the pass selects, by module name inside the block: a layer itself, or the
        factors of a low-rank one and the dense or quantized parts of a sum. weights: of all layers, None: the block's."""
        return {
            name: weight
            for local, whole in (weights or self.weights).items() if local in self.selected
            for name, weight in leaves(local, whole) if not isinstance(unmasked(weight), Composed)
        }  # fmt: skip

    def open_bitmasks(self) -> None:
        """Turn bitmasks of the selected layers into masked matrices."""
        for local in self.selected:
            if (weight := opened(self.weights[local])) is not self.weights[local]:
                self.set(local, weight)

    def open_grids(self) -> None:
        """Turn grids of the selected layers that no plain module holds into plain matrices of the same values."""
        for local in self.selected:
            for name, leaf in leaves(local, self.weights[local]):
                if isinstance(unmasked(leaf), Composed) and not isinstance(unmasked(leaf), SparsePart):
                    dense = Dense(leaf.dense())
                    self.replace(name, dense if leaf.mask is None else Masked(dense, leaf.mask))

    def replace(self, name: str, weight: Weight) -> None:
        """Give a matrix of :meth:`matrices` another value; the block computes with it from then on."""
        local = next(own for own in self.weights if name == own or name.startswith(own + "."))
        path = name.removeprefix(local).strip(".")
        self.set(local, _replaced(self.weights[local], path, weight))

    def set(self, local: str, weight: Weight) -> None:
        """Give a whole layer another weight."""
        self.weights[local] = self.skeleton.settled(weight)
        self.skeleton.install(self.module, local, self.weights[local])

    def entries(self, local: str) -> dict[str, Weight]:
        """The matrices of a layer that read its input, by module name: itself, the first factor of a low-rank one, the parts
        of a sum."""
        return dict(_entries(local, self.weights[local]))

    # function-preserving moves

    def edges(self, kind: str) -> list[Edge]:
        """Edges (``"norms"`` or ``"products"``) along which a scale can be moved now: the pass selects the linear layers at
        both ends, these hold floating-point matrices, and the channels of both ends correspond one to one."""
        arch = self.skeleton.arch
        return [edge for edge in getattr(arch, kind) if self._movable(edge)]

    def _movable(self, edge: Edge) -> bool:
        linears = [local for local in (*edge.readers, edge.source) if local in self.weights]
        if not self.selected.issuperset(linears) or not all(map(_is_floating, (self.weights[local] for local in linears))):
            return False
        if edge.source in self.weights:
            n_channels = self.weights[edge.source].shape[0]
        else:  # some norms have no weight
            n_channels = len(self.others.get(f"{edge.source}.weight", ()))
        return n_channels == self.weights[edge.readers[0]].shape[1]

    def fold(self, edge: Edge, scale: Tensor) -> None:
        """Divide the source's output channels by scale (channels,) and multiply its readers' inputs by it; the block's
        function stays, up to the rounding of what is stored. Statistics follow. What a norm is really divided by, its
        weight being rounded as well, is what the readers are multiplied by.

        Raises ValueError for a scale that is not positive and finite.
        """
        scale = scale.float()
        if not bool(((scale > 0) & scale.isfinite()).all()):
            raise ValueError(f"the scale to move from {edge.source} is not positive and finite")
        if edge.source in self.weights:
            self._rescale(edge.source, rows=1 / scale)
        else:
            scale = self._rescale_norm(edge.source, scale)
        if f"{edge.source}.bias" in self.others:
            self.set_other(f"{edge.source}.bias", self.others[f"{edge.source}.bias"].float() / scale.cpu())
        for reader in edge.readers:
            self._rescale(reader, columns=scale)
        if edge.readers[0] in self.stats:
            shared = self.stats[edge.readers[0]]
            self.stats |= dict.fromkeys(edge.readers, shared.scaled(scale.to(shared.device)))

    def folded(self, scales: Mapping[Edge, Tensor]) -> tuple[dict[str, Weight], dict[str, Tensor]]:
        """What :meth:`fold` would make of the block along those edges: all linear layers, and the norms and biases that
        change, before they are rounded to their stored dtypes. Gradients flow from the scales into all of them."""
        weights, others = dict(self.weights), {}
        for edge, scale in scales.items():
            if edge.source in weights:
                weights[edge.source] = rescaled(weights[edge.source], rows=1 / scale)
            else:
                name = f"{edge.source}.weight"
                offset = int(self.skeleton.norm_adds_one(self.module.get_submodule(edge.source)))
                others[name] = (self.others[name].to(scale) + offset) / scale - offset
            if (bias := f"{edge.source}.bias") in self.others:
                others[bias] = self.others[bias].to(scale) / scale
            for reader in edge.readers:
                weights[reader] = rescaled(weights[reader], columns=scale)
        return weights, others

    def _rescale(self, local: str, rows: Tensor | None = None, columns: Tensor | None = None) -> None:
        self.set(local, rescaled(self.weights[local], rows, columns))
        before = self.before[local]
        self.before[local] = rescaled(before if _is_floating(before) else Dense(before.dense()), rows, columns)

    def _rescale_norm(self, norm: str, scale: Tensor) -> Tensor:
        name, scale = f"{norm}.weight", scale.cpu()
        offset = int(self.skeleton.norm_adds_one(self.module.get_submodule(norm)))
        before = self.others[name].float() + offset
        self.set_other(name, before / scale - offset)
        after = self.others[name].float() + offset
        return torch.where(after * before > 0, before / after, scale)

    def set_other(self, name: str, value: Tensor) -> None:
        """Give a norm or bias of the block another value, which is rounded to its stored dtype."""
        self.others[name] = value.to(self.others[name])
        self.skeleton.set_other(self.module, name, self.others[name])

    # running

    def batches(self, size: int) -> Iterator[Tensor]:
        """The inputs, ``size`` sequences at a time."""
        assert self.inputs is not None, "the pass does not declare that it needs inputs"
        yield from self.inputs.split(size)

    def run(self, rows: Tensor, replaced: Mapping[str, Tensor] | None = None) -> Tensor:
        """The block's outputs (n, length, d) for inputs of that shape.

        replaced: matrices (out, in) by module name (see :meth:`matrices`), and norms or biases by tensor name, to compute
        with instead of the block's own; gradients flow into them.
        """
        return self.skeleton.run_block(self.index, rows, self._state(replaced or {}))

    def _state(self, replaced: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors by their names in the block's modules, for those of :meth:`run`."""
        state: dict[str, Tensor] = {}
        for name, value in replaced.items():
            if name in self.others:
                state[self._tensor_name(name)] = value.to(self.skeleton.dtype)
            else:
                conv1d = type(self.module.get_submodule(name)).__name__ == "Conv1D"
                state[f"{name}.weight"] = (value.T.contiguous() if conv1d else value).to(self.skeleton.dtype)
        return state

    def _tensor_name(self, name: str) -> str:
        """Where the block's modules hold a norm or a bias: the bias of a low-rank layer lies on its last factor."""
        owner, _, leaf = name.rpartition(".")
        while leaf == "bias" and isinstance(self.module.get_submodule(owner), LowRankLinear):
            owner += ".up"
        return f"{owner}.{leaf}"

    def layer_inputs(self, names: Iterable[str], rows: Tensor, replaced: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """What enters the modules of those names when the block runs on ``rows``, with ``replaced`` as in :meth:`run`."""
        seen: dict[str, Tensor] = {}

        def hook(name: str) -> Callable[..., None]:
            return lambda _, arguments: seen.__setitem__(name, arguments[0])

        handles = [self.module.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
        try:
            self.run(rows, replaced)
        finally:
            for handle in handles:
                handle.remove()
        return seen

    def isolate(self, path: str, rows: Tensor) -> Callable[[Mapping[str, Tensor]], Tensor]:
        """Run the block on ``rows``, and return a function that runs its submodule ``path`` alone on what entered it then,
        again and again: from matrices to compute with, as in :meth:`run`, to the submodule's outputs."""
        module, calls = self.module.get_submodule(path), []
        handle = module.register_forward_pre_hook(lambda _, *arguments: calls.append(arguments), with_kwargs=True)
        try:
            self.run(rows)
        finally:
            handle.remove()

        def again(replaced: Mapping[str, Tensor]) -> Tensor:
            state = {name.removeprefix(path + "."): value for name, value in self._state(replaced).items()}
            output = torch.func.functional_call(module, state, *calls[0])
            return output[0] if isinstance(output, tuple) else output

        return again


def _entries(name: str, weight: Weight) -> Iterator[tuple[str, Weight]]:
    inner = unmasked(weight)
    if isinstance(inner, LowRank):
        yield from _entries(f"{name}.down", inner.down)
    elif isinstance(inner, Sum):
        for key, part in inner.children().items():
            yield from _entries(f"{name}.{key}", part)
    else:
        yield name, weight


def _is_floating(weight: Weight) -> bool:
    """Whether :func:`rescaled` takes it."""
    inner = unmasked(weight)
    if isinstance(inner, LowRank | Sum):
        return all(map(_is_floating, inner.children().values()))
    return isinstance(inner, Dense)


def rescaled(weight: Weight, rows: Tensor | None = None, columns: Tensor | None = None) -> Weight:
    """diag(rows) @ weight @ diag(columns) in the same representation and dtype; rows: (out,), columns: (in,).

    Raises TypeError for a grid, whose scales belong to groups and not to single inputs.
    """
    if isinstance(weight, Dense):
        values = weight.values.float()
        values = values if rows is None else values * rows.to(values.device).unsqueeze(1)
        values = values if columns is None else values * columns.to(values.device)
        return Dense(values.to(weight.dtype))
    if isinstance(weight, Masked):
        return Masked(rescaled(weight.inner, rows, columns), weight.kept)
    if isinstance(weight, LowRank):
        return LowRank(rescaled(weight.down, None, columns), rescaled(weight.up, rows, None))
    if isinstance(weight, Sum):
        return Sum(tuple(rescaled(part, rows, columns) for part in weight.parts))
    raise TypeError(f"a {type(weight).__name__} weight cannot be rescaled by channel")


def _replaced(weight: Weight, path: str, leaf: Weight) -> Weight:
    if not path:
        return leaf
    inner = unmasked(weight)
    assert isinstance(inner, Composed)
    children = inner.children()
    name = next(key for key in children if path == key or path.startswith(key + "."))
    children[name] = _replaced(children[name], path.removeprefix(name).strip("."), leaf)
    return type(inner).assemble(inner.shape, inner.sizes(), inner.tensors(), children)
