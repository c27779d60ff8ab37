"""Section 3.5's checks: weights are a softmax over each window, and uniform at high temperature."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from compress.distill.losses import forward_kl
from compress.distill.tsld import TSLD, window_softmax


def test_weights_sum_to_one_in_every_window(batch):
    values = torch.randn(len(batch.windows), generator=torch.Generator().manual_seed(0)) * 5
    weights = window_softmax(values, batch.windows)
    for window in range(4):
        torch.testing.assert_close(weights[batch.windows == window], values[batch.windows == window].softmax(0))


def test_the_loss_weighs_what_the_teacher_finds_hard(batch, make_signal):
    student, teacher = make_signal(1), make_signal(2)
    logits = teacher.head(teacher.hidden)
    losses = F.cross_entropy(logits, batch.targets, reduction="none") / 10
    divergences = forward_kl(student.head(student.hidden), logits)
    expected = sum((losses[rows].softmax(0) * divergences[rows]).sum() for rows in map(batch.windows.__eq__, range(4))) / 4
    torch.testing.assert_close(TSLD(chunk=7).loss(student, teacher, batch), expected)
    assert TSLD().loss(student, student, batch) == 0


def test_at_high_temperature_it_is_ordinary_distillation(batch, make_signal):
    student, teacher, whole = make_signal(1), make_signal(2), batch._replace(counted=None)
    rows = torch.arange(len(whole.targets)) % len(batch.targets)
    student, teacher = (one._replace(hidden=one.hidden[rows]) for one in (student, teacher))
    expected = forward_kl(student.head(student.hidden), teacher.head(teacher.hidden)).mean()
    torch.testing.assert_close(TSLD(confidence_temperature=1e6).loss(student, teacher, whole), expected)
