"""The training loop on tiny random models: what it lowers, and what it must not touch."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import nn
from torch.nn import functional as F
from transformers import GPT2Config

from compress.distill.logit_kd import LogitKD
from compress.errors import BadInput, CompressError
from compress.loader import LowRankLinear
from compress.passes import Needs
from compress.train import train
from compress.train_pass import TrainPass
from compress.trainable import TrainableLinear
from compress.weights import Dense, LowRank, assert_structure_kept, structure
from tests.training import (
    GPT2_SHAPE,
    assert_same_tensors,
    compressed,
    fit,
    fixed_parts,
    held_out_kl,
    low_rank,
    make,
    masked,
    quantized,
    silent,
    tensors_of,
    uneven,
)


@pytest.mark.parametrize("how", [masked, quantized, low_rank, lambda w: quantized(w).masked(masked(w).mask)],
                         ids=["masked", "quantized", "low_rank", "masked_quantized"])  # fmt: skip
def test_distillation_lowers_held_out_kl_and_keeps_structure(how, llama, tokens, tmp_path):
    student, weights = compressed(llama, how)
    teacher_before, frozen = tensors_of(llama), student.model.embed_tokens.weight.clone()
    before = held_out_kl(student, llama)
    result = fit(student, weights, llama, tokens, tmp_path)
    assert held_out_kl(student, llama) < 0.9 * before
    assert len(result.history) == 20 and result.history[-1] < result.history[0]
    for name, weight in result.weights.items():
        assert type(weight) is type(weights[name])
        assert_structure_kept(name, structure(weights[name]), weight)
        for ours, theirs in zip(fixed_parts(weight), fixed_parts(weights[name]), strict=True):
            assert torch.equal(ours, theirs), name
        if not isinstance(weight, LowRank):
            assert torch.equal(student.get_submodule(name).weight, weight.dense())
            assert not torch.equal(weight.dense(), weights[name].dense())
    assert torch.equal(student.model.embed_tokens.weight, frozen)
    assert_same_tensors(tensors_of(llama), teacher_before)


def test_low_rank_factors_are_written_back_with_their_bias(llama, tokens, tmp_path):
    student, weights = compressed(llama, low_rank)
    bias = student.model.layers[0].self_attn.q_proj.up.bias.clone()
    trained = fit(student, weights, llama, tokens, tmp_path, steps=3).weights["model.layers.0.self_attn.q_proj"]
    module = student.model.layers[0].self_attn.q_proj
    assert isinstance(trained, LowRank) and isinstance(module, LowRankLinear)
    assert torch.equal(module.down.weight, trained.down.dense()) and torch.equal(module.up.weight, trained.up.dense())
    assert not torch.equal(module.up.bias, bias)


def test_conv1d_models_are_trained(tokens, tmp_path):
    teacher = make(GPT2Config(**GPT2_SHAPE)).eval()
    student, weights = compressed(teacher, masked)
    before = held_out_kl(student.eval(), teacher)
    result = fit(student, weights, teacher, tokens, tmp_path)
    assert held_out_kl(student, teacher) < 0.9 * before
    for name, weight in result.weights.items():
        stored = student.get_submodule(name).weight
        assert stored.is_contiguous() and torch.equal(stored.T, weight.dense())
        assert_structure_kept(name, structure(weights[name]), weight)


def test_storage_dtypes_are_kept(llama, tokens, tmp_path):
    student, weights = compressed(llama, masked, torch.bfloat16)
    student.bfloat16()
    result = fit(student, weights, llama, tokens, tmp_path, steps=3)
    assert {weight.dtype for weight in result.weights.values()} == {torch.bfloat16}
    assert {value.dtype for value in student.parameters()} == {torch.bfloat16}
    for name, weight in result.weights.items():
        assert torch.equal(student.get_submodule(name).weight, weight.dense())


def test_the_teacher_itself_has_no_loss_and_stays(llama, tokens, tmp_path):
    student, weights = compressed(llama, Dense)
    result = fit(student, weights, llama, tokens, tmp_path, steps=5, learning_rate=1e-5)
    assert max(result.history) < 1e-5
    for name, weight in result.weights.items():
        assert (weight.dense() - weights[name].dense()).abs().max() < 1e-4


@pytest.mark.parametrize("trains", ["weights", "blocks", "everything"])
def test_what_is_trained(trains, llama, tokens, tmp_path):
    student, weights = compressed(llama, masked)
    before = tensors_of(student)
    fit(student, weights, llama, tokens, tmp_path, steps=2, trains=trains)
    moved = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
    linears = {f"{name}.weight" for name in weights}
    small = {name for name, value in before.items() if value.dim() == 1}
    assert moved == {"weights": linears, "blocks": linears | small, "everything": set(before)}[trains]


def test_parts_of_a_batch_add_up_to_the_batch(llama, tokens, tmp_path):
    whole, weights = compressed(llama, masked)
    parts = copy.deepcopy(whole)
    one = fit(whole, weights, llama, tokens, tmp_path / "whole", steps=3, learning_rate=1e-4)
    two = fit(parts, weights, llama, tokens, tmp_path / "parts", steps=3, learning_rate=1e-4, accumulate=2)
    torch.testing.assert_close(torch.tensor(one.history), torch.tensor(two.history), rtol=1e-4, atol=0)


def test_same_seed_same_bits_and_no_trace_in_the_process(llama, tokens, tmp_path):
    accelerate_states = (AcceleratorState, PartialState, GradientState)
    for state in accelerate_states:  # lm-eval, in an earlier test, makes an Accelerator too and leaves it
        state._shared_state.clear()
    Accelerator(cpu=True, mixed_precision="bf16")  # the caller's own, with other settings
    states = [dict(state._shared_state) for state in accelerate_states]
    random_state, environment = torch.get_rng_state(), dict(os.environ)
    students, results = [], []
    for run, seed in enumerate((0, 0, 1)):
        student, weights = compressed(llama, masked)
        flags = [value.requires_grad for value in student.parameters()]
        results.append(fit(student.train(), weights, llama, tokens, tmp_path / str(run), steps=4, seed=seed))
        students.append(student)
        assert student.training and flags == [value.requires_grad for value in student.parameters()]
        assert all(value.grad is None for value in student.parameters())
    assert_same_tensors(tensors_of(students[0]), tensors_of(students[1]))
    assert results[0].history == results[1].history != results[2].history
    assert torch.equal(torch.get_rng_state(), random_state) and dict(os.environ) == environment
    assert [dict(state._shared_state) for state in accelerate_states] == states
    for state in accelerate_states:
        state._shared_state.clear()


def test_a_loss_that_is_not_finite_names_the_step_and_a_remedy(llama, tokens, tmp_path):
    student, weights = compressed(llama, masked)
    with pytest.raises(CompressError, match=r"step \d+ of 20; try a smaller learning rate, such as learning_rate=1e\+28"):
        fit(student, weights, llama, tokens, tmp_path, learning_rate=1e29)
    assert not any(isinstance(module, TrainableLinear) for module in student.modules())


def test_bad_requests_are_refused_before_any_work(llama, tokens, tmp_path):
    student, weights = compressed(llama, masked)
    with pytest.raises(BadInput, match="teacher"):
        fit(student, weights, None, tokens, tmp_path)
    with pytest.raises(BadInput, match="tokens"):
        fit(student, weights, llama, tokens[:, :1], tmp_path)


def test_fewer_windows_than_a_batch_are_drawn_again(llama, tokens, tmp_path):
    """And none of them is held out."""
    student, weights = compressed(llama, masked)
    result = fit(student, weights, llama, tokens[:3], tmp_path, batch_size=8, steps=5)
    assert len(result.history) == 5 and result.history[-1] < result.history[0] and not result.held_out


class NextToken(TrainPass):
    """A loss without a teacher."""

    def loss(self, student, teacher, batch):
        assert teacher is None
        return F.cross_entropy(student.head(student.hidden), batch.targets)


def test_a_loss_without_a_teacher_is_that_of_the_next_token(llama, tokens, tmp_path):
    student, weights = compressed(llama, masked)
    with torch.no_grad():
        logits = student(tokens[:1]).logits
        expected = F.cross_entropy(logits[0, :-1], tokens[0, 1:])
    result = train(student, weights, None, tokens[:1], NextToken(steps=5, batch_size=1, learning_rate=1e-3, warmup=0.0),
                   seed=0, device="cpu", directory=Path(tmp_path), progress=silent)  # fmt: skip
    assert result.history[0] == pytest.approx(float(expected), rel=1e-5)
    assert result.history[-1] < result.history[0]


def test_only_the_named_layers_and_factors_are_trained(llama, tokens, tmp_path):
    student, weights = compressed(llama, low_rank)
    weights |= {name: Dense(llama.get_submodule(name).weight.data.clone()) for name in weights if name.endswith("k_proj")}
    for name in weights:
        if name.endswith("k_proj"):
            student.set_submodule(name, copy.deepcopy(llama.get_submodule(name)))

    def moved(**settings) -> set[str]:
        one, before = copy.deepcopy(student), tensors_of(student)
        fit(one, weights, llama, tokens, tmp_path / str(settings), steps=2, **settings)
        return {name for name, value in one.state_dict().items() if not torch.equal(value, before[name])}

    factored = {name for name in weights if not name.endswith("k_proj")}
    assert moved(trains="factors") == {f"{name}.{part}.weight" for name in factored for part in ("down", "up")}
    assert moved(trains="factors", targets="*.up") == {f"{name}.up.weight" for name in factored}
    assert moved(trains="weights", skip="*.down+*.up") == {f"{n}.weight" for n in weights if n.endswith("k_proj")}


class Half(TrainPass):
    """The next token, of the tokens that count, by way of a matrix of its own."""

    needs: ClassVar[Needs] = Needs(states=True)

    def aids(self, student_sizes, teacher_sizes):
        assert student_sizes == (64, 64, 64) and teacher_sizes == ()
        return nn.Linear(64, 64, bias=False)

    def loss(self, student, teacher, batch):
        assert torch.equal(batch.targets, batch.tokens[:, 16:].flatten())
        assert torch.equal(batch.windows, torch.arange(4).repeat_interleave(16))
        assert len(student.states) == 3 and len(student.hidden) == len(batch.targets)
        torch.testing.assert_close(student.states[-1], student.hidden)
        return F.cross_entropy(student.head(batch.aids(student.states[-1])), batch.targets)


def test_tokens_that_do_not_count_are_left_out_and_aids_are_trained(llama, tokens, tmp_path):
    student, weights = compressed(llama, masked)
    counted = torch.zeros_like(tokens, dtype=torch.bool)
    counted[:, 16:] = True
    result = train(student, weights, None, tokens, Half(steps=12, batch_size=4, learning_rate=1e-2), seed=0, device="cpu",
                   directory=tmp_path, progress=silent, counted=counted)  # fmt: skip
    assert result.history[-1] < result.history[0]


def test_uneven_parts_count_by_their_tokens(llama, tokens, tmp_path):
    results = []
    for accumulate in (1, 2, 4):
        student, weights = compressed(llama, masked)
        step = LogitKD(steps=4, batch_size=4, learning_rate=1e-3, accumulate=accumulate, evaluate_every=2)
        results.append(train(student, weights, llama, tokens, step, seed=0, device="cpu", progress=silent,
                             directory=tmp_path / str(accumulate), counted=uneven(tokens)))  # fmt: skip
    for other in results[1:]:
        torch.testing.assert_close(torch.tensor(other.history), torch.tensor(results[0].history), rtol=1e-4, atol=0)
        torch.testing.assert_close(torch.tensor(other.held_out), torch.tensor(results[0].held_out), rtol=1e-4, atol=0)
