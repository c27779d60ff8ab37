"""Text that the models write while one of them is trained on it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel


class Rollouts(NamedTuple):
    """The models of a training run, as writers. seed: of the run; every step's texts follow from it and the step's index."""

    student: PreTrainedModel
    teacher: PreTrainedModel | None
    seed: int

    @torch.no_grad()
    def write(self, writer: PreTrainedModel, prompts: Tensor, n_new: int, index: int, temperature: float = 1.0) -> Tensor:
        """Continue prompts (n, length) int64 by ``n_new`` sampled tokens: (n, length + n_new). index: of the step."""
        generator = torch.Generator(prompts.device).manual_seed(self.seed * 1_000_003 + index)
        tokens, cache = prompts, None
        for _ in range(n_new):
            entering = tokens if cache is None else tokens[:, -1:]
            output = writer(input_ids=entering, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
            chances = (output.logits[:, -1].float() / temperature).softmax(-1)
            tokens = torch.cat([tokens, torch.multinomial(chances, 1, generator=generator)], 1)
        return tokens
