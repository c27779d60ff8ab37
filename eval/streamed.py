"""A model larger than memory, for measuring: all texts go through one block, then through the next.

What is in memory is one block, the activations of a portion of the texts, and the embeddings; the files are read once a
portion. Numbers are those of the model in memory up to the rounding of its sums.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from compress.skeleton import Skeleton

ACTIVATION_BYTES = 1 << 30


class StreamedModel:
    """A checkpoint that gives logits without ever being whole. activation_bytes: of a portion of texts; more texts than that
    read the model's files again."""

    def __init__(self, skeleton: Skeleton, activation_bytes: int = ACTIVATION_BYTES):
        self.skeleton, self.activation_bytes = skeleton, activation_bytes
        self.config: Any = skeleton.checkpoint.config
        self.device = skeleton.device

    def logits(self, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        """Logits (n, length, V), float32, of each batch of tokens (n, length), in order; batches may differ in length."""
        text_config = self.config.get_text_config()
        per_token = text_config.hidden_size * self.skeleton.dtype.itemsize
        portion: list[Tensor] = []
        size = 0
        for batch in batches:
            if portion and size + batch.numel() * per_token > self.activation_bytes:
                yield from self._through(portion)
                portion, size = [], 0
            portion.append(batch)
            size += batch.numel() * per_token
        if portion:
            yield from self._through(portion)

    @torch.no_grad()
    def _through(self, batches: list[Tensor]) -> Iterator[Tensor]:
        skeleton = self.skeleton
        hidden, calls = self._embed(batches)
        for index in range(len(skeleton.blocks)):
            skeleton.load_block(index, skeleton.read_weights(index))
            for number, batch in enumerate(batches):
                skeleton.block_arguments = calls[batch.shape[1]]
                hidden[number] = skeleton.run_block(index, hidden[number])
            skeleton.free_block(index)
        yield from skeleton.all_logits(zip(batches, hidden, strict=True))

    def _embed(self, batches: list[Tensor]) -> tuple[list[Tensor], dict[int, Any]]:
        """What enters the first block, and by length of the texts, how every block is called."""
        hidden: dict[int, Tensor] = {}
        calls: dict[int, Any] = {}
        for length in sorted({batch.shape[1] for batch in batches}):
            own = [number for number, batch in enumerate(batches) if batch.shape[1] == length]
            for number, entering in zip(own, self.skeleton.embed([batches[n] for n in own]), strict=True):
                hidden[number] = entering
            calls[length] = self.skeleton.block_arguments
        return [hidden[number] for number in range(len(batches))], calls
