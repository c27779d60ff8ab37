"""The method's loss is Hinton's: T^2 times the mean forward KL."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from compress.distill.logit_kd import LogitKD
from compress.distill.losses import forward_kl
from compress.passes import Taxon
from compress.train_pass import Batch, Signal


def signal(seed: int, tokens: int = 10) -> Signal:
    torch.manual_seed(seed)
    return Signal(torch.randn(tokens, 4), nn.Linear(4, 12).requires_grad_(False))


def test_what_it_declares():
    assert LogitKD.method() == "logit_kd"
    assert LogitKD.needs.teacher and not LogitKD.needs.stats
    assert LogitKD.taxon is Taxon.WHITE_BOX
    assert LogitKD(steps=5, temperature=2.0).label() == "logit_kd:steps=5,temperature=2.0"


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_loss_is_the_mean_over_tokens_times_the_squared_temperature(temperature):
    student, teacher = signal(0), signal(1)
    loss = LogitKD(temperature=temperature, chunk=3).loss(student, teacher, Batch(torch.zeros(1, 11, dtype=torch.int64)))
    per_token = forward_kl(student.head(student.hidden), teacher.head(teacher.hidden), temperature)
    torch.testing.assert_close(loss, temperature**2 * per_token.mean())


def test_loss_is_zero_for_the_teacher_itself():
    assert LogitKD().loss(signal(0), signal(0), Batch(torch.zeros(1, 11, dtype=torch.int64))).abs() < 1e-6


def test_a_missing_teacher_is_refused():
    with pytest.raises(ValueError, match="teacher"):
        LogitKD().loss(signal(0), None, Batch(torch.zeros(1, 11, dtype=torch.int64)))


@pytest.mark.parametrize(
    "settings",
    [{"temperature": 0}, {"steps": 0}, {"learning_rate": 0}, {"warmup": 1.0}, {"length": 1}, {"gradient_clip": 0},
     {"batch_size": 6, "accumulate": 4}, {"trains": "all"}, {"lr": 1e-3}],
)  # fmt: skip
def test_settings_without_meaning_are_refused(settings):
    with pytest.raises(ValidationError):
        LogitKD(**settings)


def test_learning_rate_warms_up_and_falls():
    step = LogitKD(steps=10, warmup=0.2, learning_rate=1.0)
    rates = [step.learning_rate_at(index) for index in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[2:] == sorted(rates[2:], reverse=True) and 0 < rates[-1] < 0.05
    assert LogitKD(steps=1).learning_rate_at(0) == 1e-4
