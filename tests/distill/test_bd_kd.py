"""Which divergence weighs more follows from which model is the surer one."""

from __future__ import annotations

import pytest
import torch

from compress.distill.bd_kd import BDKD, window_means
from compress.distill.losses import entropy, forward_kl, reverse_kl


def test_window_means(batch):
    values = torch.arange(len(batch.windows), dtype=torch.float32)
    for window in range(4):
        rows = batch.windows == window
        torch.testing.assert_close(window_means(values, batch.windows)[rows], values[rows].mean().expand(int(rows.sum())))


@pytest.mark.parametrize("sample", ["window", "token"])
def test_the_loss_is_the_weighted_sum(sample, batch, make_signal):
    student, teacher = make_signal(1), make_signal(2)
    ours, theirs = student.head(student.hidden), teacher.head(teacher.hidden)
    gap = entropy(theirs) - entropy(ours)
    share = torch.sigmoid(2 * (gap if sample == "token" else window_means(gap, batch.windows)))
    expected = (share * forward_kl(ours, theirs) + (1 - share) * reverse_kl(ours, theirs)).mean()
    torch.testing.assert_close(BDKD(sharpness=2, sample=sample, chunk=5).loss(student, teacher, batch), expected)
    assert BDKD(sample=sample).loss(student, student, batch) == 0


def test_a_teacher_that_is_less_sure_asks_for_forward_kl(batch, make_signal):
    sure, unsure = make_signal(1), make_signal(1)
    unsure = unsure._replace(hidden=unsure.hidden / 4)
    ours, theirs = sure.head(sure.hidden), unsure.head(unsure.hidden)
    sharp = BDKD(sharpness=1e6)
    torch.testing.assert_close(sharp.loss(sure, unsure, batch), forward_kl(ours, theirs).mean())
    torch.testing.assert_close(sharp.loss(unsure, sure, batch), reverse_kl(theirs, ours).mean())


def test_the_weight_takes_no_gradient(batch, make_signal):
    student, teacher = make_signal(1), make_signal(2)
    hidden = student.hidden.clone().requires_grad_()
    BDKD(sharpness=0).loss(student._replace(hidden=hidden), teacher, batch).backward()
    ours, theirs = student.head(hidden), teacher.head(teacher.hidden)
    (expected,) = torch.autograd.grad((forward_kl(ours, theirs) + reverse_kl(ours, theirs)).mean() / 2, hidden)
    torch.testing.assert_close(hidden.grad, expected)
