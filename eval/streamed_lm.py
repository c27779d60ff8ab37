"""lm-eval's view of a model that is read block by block: every request of a task goes through a block together."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch.nn.functional import log_softmax, pad

from compress.eval.streamed import StreamedModel

TOKENS_PER_BATCH = 1024  # whose logits are in memory at a time
LENGTH_STEP = 32  # texts are filled up to multiples of it: as many calling conventions of blocks are kept


class StreamedLM(HFLM):
    """``--model hf`` in all that concerns tokens, and scores given texts; it does not write."""

    def __init__(self, model: StreamedModel, tokenizer: Any, max_length: int | None):
        wrap: Any = super().__init__
        wrap(pretrained=model.skeleton.model, tokenizer=tokenizer, batch_size=1 << 30, max_length=max_length)
        self.streamed, self._device = model, model.device
        self.limit: int = self.max_length  # pyright: ignore[reportAttributeAccessIssue]

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None) -> Any:
        """(log-likelihood, whether greedy decoding would give it) of each (texts, context tokens, continuation tokens)."""
        rows: dict[tuple[int, ...], list[int]] = defaultdict(list)  # texts that differ in what is predicted last run once
        for number, (_, context, continuation) in enumerate(requests):
            rows[tuple((context + continuation)[-(self.limit + 1) : -1])].append(number)
        batches = _batches(sorted(rows, key=len, reverse=True), self.limit)
        tokens = [_padded(batch, self.limit) for batch in batches]
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for batch, logits in zip(batches, self.streamed.logits(tokens), strict=True):
            for text, own in zip(batch, logits, strict=True):
                for number in rows[text]:
                    continuation = torch.tensor(requests[number][2], device=own.device)
                    scores = log_softmax(own[len(text) - len(continuation) : len(text)], dim=-1)
                    likelihood = float(scores.gather(-1, continuation[:, None]).sum())
                    found[number] = (likelihood, bool((scores.argmax(-1) == continuation).all()))
        return found

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
        """Refused: it would take a pass over the files for every token."""
        raise NotImplementedError("a model that is read block by block does not write text")


def _length(text: tuple[int, ...], limit: int) -> int:
    return max(len(text), min(-(-len(text) // LENGTH_STEP) * LENGTH_STEP, limit))


def _batches(texts: list[tuple[int, ...]], limit: int) -> list[list[tuple[int, ...]]]:
    """Texts, longest first, in batches of one padded length."""
    found: list[list[tuple[int, ...]]] = []
    for text in texts:
        length = _length(text, limit)
        if not found or _length(found[-1][0], limit) != length or (len(found[-1]) + 1) * length > TOKENS_PER_BATCH:
            found.append([])
        found[-1].append(text)
    return found


def _padded(batch: list[tuple[int, ...]], limit: int) -> torch.Tensor:
    """(n, length) tokens, filled up on the right, where causal attention never looks back from."""
    length = _length(batch[0], limit)
    return torch.stack([pad(torch.tensor(text, dtype=torch.int64), (0, length - len(text))) for text in batch])
