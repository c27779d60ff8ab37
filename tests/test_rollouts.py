"""What models write during training: what is given stays, what is drawn follows from the arguments, and its chances are right."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from compress.rollouts import LOG_CHANCES, Rollouts
from compress.train_pass import Batch

VOCABULARY = 32


@pytest.fixture(scope="module")
def models():
    made = []
    for seed, vocabulary in ((0, VOCABULARY), (1, VOCABULARY + 6)):  # padded
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=vocabulary, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.5, bos_token_id=0, eos_token_id=1,
        )  # fmt: skip
        made.append(AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval())
    return made


@pytest.fixture
def rollouts(models) -> Rollouts:
    return Rollouts(*models, seed=3, memory={})


@pytest.fixture
def batch() -> Batch:
    return Batch(torch.randint(VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(0)), index=5)


def chances_of(model, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    with torch.no_grad():
        return (model(tokens).logits[:, :-1, :VOCABULARY] / temperature).softmax(-1)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_chances_are_those_of_the_mixture(share, temperature, rollouts, batch, models):
    rewritten = rollouts.rewrite(batch, 0.25, temperature=temperature, teacher=share)
    student, teacher = (chances_of(model, rewritten.tokens, temperature) for model in models)
    mixture = (1 - share) * student + share * teacher
    expected = mixture.gather(2, rewritten.tokens[:, 1:, None])[..., 0].log()
    written = rewritten.counted[:, 1:]
    torch.testing.assert_close(rewritten.extras[LOG_CHANCES][:, 1:][written], expected[written], rtol=0, atol=1e-4)
    assert not rewritten.extras[LOG_CHANCES][~rewritten.counted].any()


def test_prompts_are_kept_and_only_what_is_written_counts(rollouts, batch):
    rewritten = rollouts.rewrite(batch, 0.5)
    assert torch.equal(rewritten.tokens[:, :6], batch.tokens[:, :6])
    assert not torch.equal(rewritten.tokens[:, 6:], batch.tokens[:, 6:])
    assert torch.equal(rewritten.counted, (torch.arange(12) >= 6).expand(3, -1))
    assert rewritten.index == 5 and len(rewritten.targets) == 18


def test_data_that_has_prompts_keeps_its_own(rollouts, batch, models):
    counted = torch.zeros_like(batch.tokens, dtype=torch.bool)
    counted[0, 3:8], counted[1, 7:], counted[2, 0:2] = True, True, True
    rewritten = rollouts.rewrite(batch._replace(counted=counted), 0.9)
    assert torch.equal(rewritten.tokens[~counted], batch.tokens[~counted])
    assert torch.equal(rewritten.tokens[:, 0], batch.tokens[:, 0])  # that nothing comes before
    expected = counted.clone()
    expected[:, 0] = False
    assert torch.equal(rewritten.counted, expected)
    chances = chances_of(models[0], rewritten.tokens).gather(2, rewritten.tokens[:, 1:, None])[..., 0].log()
    found, written = rewritten.extras[LOG_CHANCES][:, 1:], expected[:, 1:]
    torch.testing.assert_close(found[written], chances[written], rtol=0, atol=1e-4)


def test_what_is_drawn_follows_from_seed_step_and_text(rollouts, batch):
    state = torch.get_rng_state()
    first = rollouts.rewrite(batch, 0.1).tokens
    assert torch.equal(rollouts.rewrite(batch, 0.1).tokens, first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(rollouts.rewrite(batch._replace(index=6), 0.1).tokens, first)
    assert not torch.equal(rollouts._replace(seed=4).rewrite(batch, 0.1).tokens, first)
    other_tail = torch.cat([batch.tokens[:, :-1], batch.tokens[:, -1:] ^ 1], 1)
    assert not torch.equal(rollouts.rewrite(batch._replace(tokens=other_tail), 0.1).tokens, first)


def test_tokens_are_drawn_as_often_as_the_model_says(rollouts, models):
    batch = Batch(torch.full((4000, 2), 7))
    drawn = rollouts.rewrite(batch, 0.5).tokens[:, 1].bincount(minlength=VOCABULARY) / 4000
    assert (drawn - chances_of(models[0], batch.tokens[:1])[0, 0]).abs().max() < 0.03


def test_a_chance_is_uniform_and_a_function_of_the_step(rollouts):
    chances = torch.tensor([rollouts.chance(index) for index in range(400)])
    assert rollouts.chance(17) == float(chances[17]) and len(chances.unique()) > 390
    assert 0 <= chances.min() < 0.05 and 0.95 < chances.max() < 1 and abs(float(chances.mean()) - 0.5) < 0.06
