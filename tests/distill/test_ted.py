"""Filters are trained first, alone, to predict; then the student, to give what the teacher's filters let through."""

from __future__ import annotations

import copy

import pytest
import torch

from compress.distill.losses import forward_kl
from compress.distill.ted import TED, filtered
from compress.train import train
from compress.weights import Dense


def test_identical_models_and_filters_have_no_loss(batch, make_signal):
    signal = make_signal(1, n_states=4)
    aids = TED().aids((8, 8, 8, 8), (8, 8, 8, 8))
    assert TED(steps=10).loss(signal, signal, batch._replace(index=9, aids=aids)) == 0


def test_the_first_part_trains_filters_alone_and_the_second_not_the_teachers(batch, make_signal):
    step, teacher = TED(steps=10, filter_steps=0.5), make_signal(2, n_states=5)
    student = make_signal(1, n_states=3, width=6)
    student = student._replace(states=tuple(state.requires_grad_() for state in student.states))
    aids = step.aids((6, 6, 6), (8, 8, 8, 8, 8))
    assert isinstance(aids, torch.nn.ModuleList)
    step.loss(student, teacher, batch._replace(index=4, aids=aids)).backward()
    assert all(state.grad is None for state in student.states)
    assert all(parameter.grad is not None for parameter in aids.parameters())
    aids.zero_grad()
    step.loss(student, teacher, batch._replace(index=5, aids=aids)).backward()
    assert student.states[1].grad is not None and student.states[2].grad is not None
    assert all(parameter.grad is None for parameter in aids[1].parameters())
    assert all(parameter.grad is not None for parameter in aids[0].parameters())


def test_filters_meet_in_the_space_that_the_teachers_head_reads(batch, make_signal):
    step, student, teacher = TED(), make_signal(1, n_states=3, width=6), make_signal(2, n_states=5)
    ours, theirs = filtered(student, teacher, step.aids((6,) * 3, (8,) * 5), False)
    assert len(ours) == len(theirs) == 2
    assert all(a.shape == b.shape == (len(batch.targets), 8) for a, b in zip(ours, theirs, strict=True))


def test_the_second_part_adds_the_divergence(batch, make_signal):
    student, teacher = make_signal(1, n_states=3), make_signal(2, n_states=3)
    later = batch._replace(index=199, aids=TED().aids((8, 8, 8), (8, 8, 8)))
    expected = forward_kl(student.head(student.hidden), teacher.head(teacher.hidden)).mean()
    torch.testing.assert_close(TED(features=0.0).loss(student, teacher, later), expected)


def test_it_runs_in_the_loop(models, tmp_path):
    student = copy.deepcopy(models[0])
    weights = {name: Dense(module.weight.data) for name, module in student.model.named_modules(prefix="model")
               if name.endswith("_proj")}  # fmt: skip
    before = {name: weight.dense().clone() for name, weight in weights.items()}
    tokens = torch.randint(32, (40, 8), generator=torch.Generator().manual_seed(0))

    def fit(filter_steps: float):
        return train(
            copy.deepcopy(student), weights, models[1], tokens, TED(steps=6, batch_size=2, filter_steps=filter_steps),
            seed=0, device="cpu", directory=tmp_path / str(filter_steps), progress=lambda *call: None,
        ).weights  # fmt: skip

    moved = [any(not torch.equal(weight.dense(), before[name]) for name, weight in fit(share).items()) for share in (0.99, 0.5)]
    assert moved[1]
    with pytest.raises(ValueError, match="teacher"):
        TED().loss(models[0], None, tokens)
