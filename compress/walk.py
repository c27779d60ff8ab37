"""Go through a model as it is, block by block, and look: what passes over whole models decide by."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from compress.block import Block
from compress.progress import Progress, silent
from compress.skeleton import Skeleton
from compress.stats import LinearStats
from compress.stream import Stream
from compress.writer import BlockStore

_TOKENS_OF_LOGITS = 1024  # whose logits are held at a time


class Walk(Stream):
    """The calibration windows on their way through the model, of which one block at a time is in memory.

    tokens: (n, length) windows. scratch: a directory to work in.
    """

    def __init__(self, skeleton: Skeleton, tokens: Tensor, scratch: Path, progress: Progress = silent):
        super().__init__(skeleton, [], tokens, BlockStore(scratch / "walk"), scratch, progress=progress)
        self.windows = tokens
        self.tokens = tokens

    def blocks(self) -> Iterator[tuple[Block, Tensor, Tensor]]:
        """(block, inputs, outputs) for every block in order; both (n, length, d), and valid until the next one is asked for.

        The block is filled and can be run; its statistics are gathered with :meth:`statistics`.
        """
        skeleton = self.skeleton
        with torch.no_grad():
            self._start_activations()
        assert self.activations is not None
        inputs = self.activations
        outputs = self._allocate(tuple(inputs.shape), inputs.dtype, "outputs")
        for index in range(len(skeleton.blocks)):
            self.progress(index, len(skeleton.blocks), f"measuring block {index + 1} of {len(skeleton.blocks)}")
            block = Block(skeleton, index, skeleton.read_weights(index), skeleton.read_others(index))
            self.advance(block, inputs, outputs)
            block.inputs = inputs
            yield block, inputs, outputs
            inputs, outputs = outputs, inputs
            skeleton.free_block(index)

    @torch.no_grad()
    def advance(self, block: Block, inputs: Tensor, outputs: Tensor) -> None:
        """Let the block make ``outputs`` of ``inputs``, (n, length, d), which may be the same tensor."""
        self.skeleton.block_arguments = self.calls
        for before, after in zip(inputs.split(self.batch), outputs.split(self.batch), strict=True):
            after.copy_(self.skeleton.run_block(block.index, before))

    def few(self, n_windows: int) -> Walk:
        """A walk of the first windows alone."""
        return Walk(self.skeleton, self.windows[:n_windows], self.scratch, self.progress)

    def room(self, count: int, like: Tensor, name: str) -> Tensor:
        """Uninitialised activations (count, n, length, d) of that many models; large ones lie on disk, under that name."""
        return self._allocate((count, *like.shape), like.dtype, name)

    @torch.no_grad()
    def losses(self, models: Tensor) -> list[float]:
        """The mean next-token loss, in nats, of each model whose last block puts out (n, length, d); models: (count, n, length,
        d). 0 for windows of one token, which predict nothing."""
        size = max(1, _TOKENS_OF_LOGITS // self.windows.shape[1])
        windows = self.windows.split(size)
        parts = [pair for outputs in models for pair in zip(windows, outputs.split(size), strict=True)]
        total = [0.0] * len(models)
        for number, logits in enumerate(self.skeleton.all_logits(parts)):
            targets = parts[number][0][:, 1:].to(logits.device)
            loss = cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), reduction="sum")
            total[number * len(models) // len(parts)] += float(loss)
        return [loss / max(1, self.windows[:, 1:].numel()) for loss in total]

    @torch.no_grad()
    def statistics(self, block: Block, wanted: Iterable[str], names: Iterable[str]) -> dict[str, LinearStats]:
        """Statistics of what enters the modules of those names inside the block, which may be norms too."""
        assert block.inputs is not None
        wanted, gathered = tuple(wanted), {}

        def hook(name: str):
            def see(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                if name not in gathered:
                    gathered[name] = LinearStats(inputs[0].shape[-1], wanted, self.skeleton.device)
                gathered[name].add(inputs[0])

            return see

        handles = [block.module.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
        try:
            for rows in block.batches(self.batch):
                block.run(rows)
        finally:
            for handle in handles:
                handle.remove()
        return {name: stats.finish() for name, stats in gathered.items()}
