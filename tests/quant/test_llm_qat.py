"""LLM-QAT: the grid of every step is what is stored, the model writes its own text, and what it learns is what it says."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from compress.distill.losses import forward_kl
from compress.latent import Latent
from compress.manifest import Manifest
from compress.quant.llm_qat import LLMQAT
from compress.train_pass import Batch
from compress.weights import Dense, LowRank, Masked, Quantized

STEPS = {"steps": 30, "batch_size": 4, "learning_rate": 3e-3, "length": 24}


def begun(step: LLMQAT, weight):
    return step.adapt(weight, torch.Generator())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_levels_are_those_of_the_rows_largest_magnitude(bits):
    values = torch.randn(6, 500)
    weight = begun(LLMQAT(bits=bits), Dense(values)).final()
    assert isinstance(weight, Quantized) and weight.scale.shape == (6, 1)
    torch.testing.assert_close(weight.scale[:, 0], values.abs().amax(1) / (2 ** (bits - 1) - 0.5))
    assert all(len(row.unique()) <= 2**bits for row in weight.dense())
    assert (weight.dense() - values).abs().le(weight.scale * 0.5001).all()


def test_what_is_computed_with_is_what_will_be_stored():
    """To the bit, in the dtype of the file, wherever training has brought the values."""
    mask = torch.rand(8, 48) < 0.6
    first = Masked(Dense((torch.randn(8, 48) * mask).to(torch.bfloat16)), mask)
    step = LLMQAT(bits=3, group_size=16, symmetric=False)
    moved = begun(step, first).rebuild({"values": torch.randn(8, 48, requires_grad=True)})
    stored = step.settle(moved.rebuild({"values": moved.values.detach()}))
    assert isinstance(stored, Masked) and stored.kept.equal(mask) and stored.dtype == torch.bfloat16
    assert moved.dense(torch.float32).equal(stored.dense(torch.float32)) and not stored.dense()[~mask].any()
    moved.dense(torch.float32).sum().backward()
    assert moved.values.grad.equal(mask.float())


def test_factors_and_grids_are_trained_and_other_forms_stay():
    step = LLMQAT()
    grid = begun(step, Dense(torch.randn(4, 32))).final()
    assert isinstance(begun(step, grid), Latent)
    factors = begun(step, LowRank(Dense(torch.randn(4, 32)), Dense(torch.randn(16, 4))))
    assert isinstance(factors.down, Latent) and isinstance(step.settle(factors).up, Quantized)


def test_the_teacher_writes_greedily_first(batch, rollouts, models):
    step = LLMQAT()
    written = step.prepare(batch, rollouts)
    assert written.counted[:, 1:].all() and not written.counted[:, 0].any()
    assert step.prepare(batch, rollouts).tokens.equal(written.tokens)
    likeliest = models[1](input_ids=written.tokens).logits.argmax(-1)
    agree = written.tokens[:, 1:] == likeliest[:, :-1]
    assert agree[:, :3].all() and not agree[:, 5:].all()
    others = step.prepare(batch._replace(tokens=batch.tokens.flip(0)), rollouts).tokens
    assert not others[:, 0].equal(written.tokens[:, 0])  # what they begin with is drawn
    assert LLMQAT(data_free=False).prepare(batch, rollouts) is batch


def test_a_long_list_of_starts_covers_the_vocabulary(rollouts):
    tokens = torch.arange(400).view(200, 2) % 32
    assert len(LLMQAT().prepare(Batch(tokens), rollouts).tokens[:, 0].unique()) == 32


def test_the_loss_is_the_divergence_alone(batch, make_signal):
    student, teacher = make_signal(1), make_signal(2)
    expected = forward_kl(student.head(student.hidden), teacher.head(teacher.hidden)).mean()
    torch.testing.assert_close(LLMQAT(chunk=7).loss(student, teacher, batch), expected)
    assert LLMQAT().loss(student, student, batch) == 0
    assert LLMQAT(objective="tsld").loss(student, student, batch) == 0


@pytest.mark.parametrize("objective", ["kl", pytest.param("tsld", marks=pytest.mark.slow)])
def test_it_comes_closer_on_text_that_it_never_saw(objective, llama, run_stages, assert_reloads):
    artifact = run_stages(llama, [LLMQAT(bits=3, objective=objective, hold_out=0.2, **STEPS)])
    assert_reloads(artifact, atol=1e-5)
    held_out = Manifest.read(artifact).steps[-1].training["held_out"]
    assert held_out[-1][1] < 0.95 * held_out[0][1]


def test_weights_inputs_and_cache_together(llama, run_stages, assert_reloads):
    """W4A8KV8: an earlier pass says how the cache is rounded, and training computes with it."""
    chain = ["kv_cache:kind=int,dynamic=true", LLMQAT(activations="int8", hold_out=0.2, **STEPS | {"learning_rate": 3e-4})]
    artifact = run_stages(llama, chain)
    assert_reloads(artifact, atol=1e-4)
    held_out = Manifest.read(artifact).steps[-1].training["held_out"]
    assert held_out[-1][1] < held_out[0][1]


def test_settings_that_contradict():
    for wrong in ({"mse": True}, {"cache": 16}, {"full_range": True, "symmetric": False}):
        with pytest.raises(ValidationError):
            LLMQAT(**wrong)
    assert LLMQAT(data_free=False, objective="ce").needs.teacher is False
