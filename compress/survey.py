"""Measure every layer before a stage, so that a budget can be shared out among them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.block import Block
from compress.errors import CompressError
from compress.passes import LinearPass, Needs, StreamPass
from compress.progress import Progress
from compress.skeleton import Skeleton
from compress.stats import LinearStats
from compress.stream import Stream
from compress.weights import Weight
from compress.writer import BlockStore, write_text

_EFFECT_SEQUENCES = 8  # windows on which a change of the block's output is measured


class Survey(Stream):
    """A stream that changes nothing: what its one pass finds of each layer, with inputs that no compression has touched."""

    def needs(self, step: StreamPass) -> Needs:
        assert step.surveys is not None
        return step.surveys

    @torch.no_grad()
    def find(self) -> dict[str, Any]:
        """The pass's measurements by full layer name."""
        ((step,),) = self.phases
        self.undisturbed = False  # nothing is compressed, and what enters a block is needed again
        n_blocks, found = len(self.skeleton.blocks), {}
        self._start_activations()
        for index in range(n_blocks):
            self.progress(index, n_blocks, f"measuring block {index + 1} of {n_blocks}")
            block = Block(self.skeleton, index, self.skeleton.read_weights(index), self.skeleton.read_others(index))
            gathered = self._collect(block, [step], self.skeleton.arch.groups)
            for group in self.skeleton.arch.groups if index not in self.skeleton.owners else ():
                for local in group:
                    if step.matches(block.name(local)):
                        own = self._with_fisher(block, local, gathered.get(group))
                        found[block.name(local)] = self._measure(step, block, local, own)
            self._propagate(index)
            self.skeleton.free_block(index)
        return found

    def _measure(self, step: StreamPass, block: Block, local: str, stats: LinearStats | None) -> Any:
        weight = block.weights[local]
        own = stats.only(self.needs(step).stats) if stats is not None else self._no_stats(weight.shape[1])

        @cache
        def run() -> tuple[Tensor, Tensor]:
            assert self.activations is not None, "the pass does not declare that its survey needs inputs"
            rows, self.skeleton.block_arguments = self.activations[:_EFFECT_SEQUENCES], self.calls
            return rows, block.run(rows)

        def effect(other: Weight) -> float:
            rows, outputs = run()
            block.set(local, other)
            change = (block.run(rows) - outputs).float().square().sum() / outputs.float().square().sum()
            block.set(local, weight)
            return float(change)

        return step.survey(weight.map(lambda tensor: tensor.to(self.skeleton.device)), own, effect)


def allocations(
    skeleton: Skeleton, passes: list[StreamPass], tokens: Tensor, directory: Path, progress: Progress
) -> dict[StreamPass, dict[str, LinearPass]]:
    """For each pass that surveys, what it allots to every layer. The findings are kept in ``directory`` for a rerun."""
    chosen = {}
    for number, step in enumerate(passes):
        if not step.surveys:
            continue
        file = directory / f"survey-{number}.json"
        if not file.exists():
            store = BlockStore(directory / "survey")
            found = Survey(skeleton, [step], tokens, store, directory, progress=progress).find()
            write_text(file, json.dumps(found))
        names = [
            tuple(skeleton.module_name(index, local) for local in group)
            for index in range(len(skeleton.blocks)) for group in skeleton.arch.groups
        ]  # fmt: skip
        try:
            chosen[step] = step.allocate(json.loads(file.read_text()), names)
        except ValueError as error:
            raise CompressError(f"{step.label()}: {error}") from None
    return chosen
