"""On-policy batches are the student's, a share of them, and the loss is the divergence of what counts."""

from __future__ import annotations

import pytest
import torch

from compress.distill.gkd import GKD
from compress.distill.losses import jsd
from compress.rollouts import LOG_CHANCES


def test_a_share_of_the_batches_is_written_by_the_student(batch, rollouts):
    step = GKD(on_policy=0.3)
    prepared = [step.prepare(batch._replace(index=index, counted=None), rollouts) for index in range(60)]
    written = [one for one in prepared if LOG_CHANCES in one.extras]
    assert 8 <= len(written) <= 28
    assert all(torch.equal(one.tokens[:, :5], batch.tokens[:, :5]) for one in written)
    assert all(one.counted is not None and one.counted.sum() == 4 * 5 for one in written)
    assert all(torch.equal(one.tokens, batch.tokens) and one.counted is None for one in prepared if not one.extras)
    assert not GKD(on_policy=0).prepare(batch, rollouts).extras and GKD(on_policy=1).prepare(batch, rollouts).extras


def test_the_teacher_writes_the_others_where_it_is_asked_to(batch, rollouts, models):
    batch = batch._replace(counted=None)
    by_teacher = GKD(on_policy=0, seq_kd=True, temperature=1.0).prepare(batch, rollouts)
    swapped = rollouts._replace(student=models[1], teacher=models[0])
    assert torch.equal(by_teacher.tokens, GKD(on_policy=1, temperature=1.0).prepare(batch, swapped).tokens)


def test_the_loss_is_the_mean_divergence(batch, make_signal):
    student, teacher = make_signal(1), make_signal(2)
    expected = jsd(student.head(student.hidden), teacher.head(teacher.hidden), 0.9, 0.3).mean()
    torch.testing.assert_close(GKD(beta=0.3, chunk=5).loss(student, teacher, batch), expected)
    assert GKD().loss(student, student, batch) == 0
    with pytest.raises(ValueError, match="teacher"):
        GKD().loss(student, None, batch)
