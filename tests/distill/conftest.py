"""Signals and batches of random numbers, and two tiny models that differ."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from compress.rollouts import Rollouts
from compress.train_pass import Batch, Signal

WINDOWS, LENGTH, VOCABULARY = 4, 10, 32


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def batch() -> Batch:
    """Windows of which the last ones count less."""
    counted = torch.arange(LENGTH) >= torch.arange(WINDOWS)[:, None]
    return Batch(torch.randint(VOCABULARY, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(0)), counted)


@pytest.fixture
def make_signal(batch: Batch) -> Callable[..., Signal]:
    """``make_signal(seed, n_states=0, width=8)``: hidden states and a head for the batch's tokens."""

    def make(seed: int, n_states: int = 0, width: int = 8) -> Signal:
        n = len(batch.targets)
        head = nn.utils.skip_init(nn.Linear, width, VOCABULARY, bias=False).requires_grad_(False)
        head.weight.copy_(draw(VOCABULARY, width, seed=100 + seed))
        states = tuple(draw(n, width, seed=1000 * seed + number) for number in range(n_states))
        return Signal(states[-1] if states else draw(n, width, seed=seed), head, states)

    return make


@pytest.fixture(scope="session")
def models() -> tuple[PreTrainedModel, PreTrainedModel]:
    """A student and a teacher that says other things."""
    made = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.5, bos_token_id=0, eos_token_id=1,
        )  # fmt: skip
        made.append(AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False))
    return made[0], made[1]


@pytest.fixture
def rollouts(models) -> Rollouts:
    return Rollouts(*models, seed=0, memory={})
