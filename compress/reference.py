"""What the blocks of a model put out before it was compressed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from compress.skeleton import Skeleton

_ANOTHER_BASIS = 0.5  # of the energy of the embeddings; a rotation changes twice as much, rounding to few bits much less


class Reference:
    """Follows calibration windows through the blocks of a model as it is in its files.

    outputs: (n, length, d), at first what enters the model's first block, as ``skeleton.embed`` has just made it; after
    :meth:`advance` what that block puts out. batch: sequences at a time. inputs: of the same shape, to be filled with what
    entered that block, for :meth:`entering`; None: it is not kept.
    """

    def __init__(self, skeleton: Skeleton, outputs: Tensor, batch: int, inputs: Tensor | None = None):
        self.skeleton, self.outputs, self.batch, self.inputs = skeleton, outputs, batch, inputs
        self.calls = skeleton.block_arguments

    @torch.no_grad()
    def advance(self, index: int) -> None:
        """Go through block ``index``."""
        skeleton = self.skeleton
        skeleton.load_block(index, skeleton.read_weights(index))
        skeleton.block_arguments = self.calls
        if self.inputs is not None:
            self.inputs.copy_(self.outputs)
        for rows in self.outputs.split(self.batch):
            rows.copy_(skeleton.run_block(index, rows))
        skeleton.free_block(index)

    @contextmanager
    def entering(self, index: int, names: Sequence[str]) -> Iterator[Callable[[int], dict[str, Tensor]]]:
        """Within it, a function from the number of a batch to what enters those modules of block ``index``, through which
        :meth:`advance` has just gone, by name."""
        assert self.inputs is not None, "the inputs of blocks were not kept"
        seen: dict[str, Tensor] = {}
        batches = self.inputs.split(self.batch)
        module = self.skeleton.load_block(index, self.skeleton.read_weights(index))

        def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            return lambda _, inputs: seen.__setitem__(name, inputs[0])

        def run(number: int) -> dict[str, Tensor]:
            self.skeleton.block_arguments = self.calls
            self.skeleton.run_block(index, batches[number])
            return seen

        handles = [module.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
        try:
            yield run
        finally:
            for handle in handles:
                handle.remove()
            self.skeleton.free_block(index)


def incomparable(original: Skeleton, embedded: Tensor, model: Skeleton, own_embedded: Tensor) -> str | None:
    """Why the blocks of a model and of the original that it was made of have no comparable outputs; None: they do.

    embedded, own_embedded: (n, length, d), what enters the first blocks of the two on the same windows.
    """
    if len(original.blocks) != len(model.blocks):
        return f"which had {len(original.blocks)} blocks where {len(model.blocks)} are left"
    if embedded.shape != own_embedded.shape:
        return f"which had {embedded.shape[-1]} hidden channels where {own_embedded.shape[-1]} are left"
    first, own = embedded[0].double(), own_embedded[0].double()
    if (own - first).square().sum() > _ANOTHER_BASIS * first.square().sum():
        return "whose hidden channels had another basis"
    return None
