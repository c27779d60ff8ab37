"""A model of meta tensors, as passes will leave it: what a plan is made from."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from compress.apply import outline
from compress.errors import BadInput
from compress.export import layers
from compress.passes import BlockPass, ModelPass, Pass, StreamPass
from compress.skeleton import Skeleton
from compress.train_pass import TrainPass
from compress.trainable import outline_trained
from compress.weights import Coded, Composed, Weight, opened, spec_of
from compress.weights.composed import unmasked


class Outline:
    """skeleton: the architecture as it is by now. weights: of each block's linear layers by local name, nothing of a block
    that shares another one's. others: its norms and biases. outer: tensors that belong to no block, less those in tables,
    which are on grids and listed by module. cache: how keys and values are rounded."""

    def __init__(self, skeleton: Skeleton):
        self.skeleton = skeleton
        count, checkpoint = range(len(skeleton.blocks)), skeleton.checkpoint
        self.weights = [{} if index in skeleton.owners else skeleton.read_weights(index, meta=True) for index in count]
        self.others = [self._others(index) for index in count]
        self.tables = skeleton.tables()
        names = [name for name in skeleton.outer_names() if name.removesuffix(".weight") not in self.tables]
        self.outer = {name: skeleton.outer_meta(name) for name in names}
        self.cache = checkpoint.cache_scheme

    def _others(self, index: int) -> dict[str, Tensor]:
        skeleton = self.skeleton
        names = zip(skeleton.other_names(index), skeleton.block_names(index), strict=True)
        return {local: skeleton.checkpoint.meta(skeleton.file_name(name)) for local, name in names}

    def linears(self) -> dict[str, Weight]:
        """The linear layers by full name."""
        return {
            self.skeleton.module_name(index, local): weight
            for index, block in enumerate(self.weights) for local, weight in block.items()
        }  # fmt: skip

    def apply(self, step: Pass) -> Iterator[tuple[str, Weight, Weight]]:
        """Let a pass do its work; yields (name, before, after) of the layers that it changes.

        Raises :class:`BadInput` where it cannot take a layer.
        """
        if isinstance(step, BlockPass) and self.skeleton.owners:
            raise BadInput(f"{step.label()} rewrites whole blocks, but some share their layers by now: write it before")
        if isinstance(step, ModelPass):
            self._check(step)
            self._operate(step)
            return
        for index, block in enumerate(self.weights):
            for local, before in block.items():
                name = self.skeleton.module_name(index, local)
                if isinstance(step, TrainPass) or (isinstance(step, StreamPass) and step.matches(name)):
                    try:
                        is_training = isinstance(step, TrainPass)
                        block[local] = outline_trained(step, name, opened(before)) if is_training else outline(step, before)
                    except ValueError as error:
                        raise BadInput(f"{step.label()} at {name}: {error}") from None
                    yield name, before, block[local]

    def _check(self, step: ModelPass) -> None:
        for name, weight in self.linears().items():
            try:
                step.outline(opened(weight))
            except ValueError as error:
                raise BadInput(f"{step.label()} at {name}: {error}") from None

    def _operate(self, step: ModelPass) -> None:
        old = self.skeleton
        surgery = step.surgery(old)
        self.skeleton = new = Skeleton(surgery.alter(old))
        weights, others = [], []
        for index, origin in enumerate(surgery.origins(old)):
            owner = old.owner(origin)
            biases = {name: self.others[owner][name] for name in old.bias_names(owner)}
            changed = self.weights[owner], biases | self.others[origin]
            if surgery.selects:
                try:
                    changed = surgery.operated(origin, *changed)
                except ValueError as error:
                    raise BadInput(f"{step.label()}: {error}") from None
            weights.append({} if index in new.owners else dict(changed[0]))
            others.append({name: changed[1][name] for name in new.other_names(index) if name in changed[1]})
        self.weights, self.others = weights, others
        if surgery.selects:
            self.outer = {name: tensor for name, tensor in surgery.outer(self.outer).items() if isinstance(tensor, Tensor)}
        tables = {name.removesuffix(".weight"): weight for name, weight in surgery.tables.items()}
        self.tables = self.tables | tables
        self.outer = {n: t for n, t in (self.outer | surgery.added).items() if n.removesuffix(".weight") not in self.tables}
        self.cache = surgery.cache or self.cache

    def is_reshaped(self, weights: dict[str, Weight]) -> bool:
        """Whether the artifact needs its own loader; weights: those of :meth:`linears` and tables, as they will be stored."""
        if self.skeleton.checkpoint.structure:
            return True
        prefix = self.skeleton.arch.blocks + "."
        locals_ = {name: name.removeprefix(prefix).partition(".")[2] for name in weights}
        return any(spec_of(weight, conv1d=self.skeleton.is_conv1d(locals_[name])) for name, weight in weights.items())

    def tensors(self, weights: dict[str, Weight]) -> tuple[int, list[str]]:
        """(bytes, names) of everything in the file; weights: as for :meth:`is_reshaped`."""
        prefix = self.skeleton.arch.blocks
        plain = self.outer | {f"{prefix}.{i}.{n}": t for i, block in enumerate(self.others) for n, t in block.items()}
        names = [*plain, *(name for module, weight in weights.items() for name in tensor_names(module, weight))]
        return sum(t.nbytes for t in plain.values()) + sum(weight.nbytes for weight in weights.values()), names


def tensor_names(module: str, weight: Weight) -> list[str]:
    """The names of a weight's tensors in a file."""
    weight = unmasked(weight)
    if isinstance(weight, Composed):
        parts = [name for key, part in weight.children().items() for name in tensor_names(f"{module}.{key}", part)]
        return [*(f"{module}.{name}" for name in weight.tensor_names), *parts]
    return [f"{module}.{name}" for name in (layers.tensor_names(weight) if isinstance(weight, Coded) else ["weight"])]
