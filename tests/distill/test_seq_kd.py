"""What the teacher writes is what is trained on, and nothing else of it is used."""

from __future__ import annotations

import torch

from compress.distill.losses import cross_entropy
from compress.distill.seq_kd import SeqKD


def test_the_teacher_goes_on_from_prompts(batch, rollouts, models):
    step = SeqKD(prompt=0.5)
    written = step.prepare(batch._replace(counted=None), rollouts)
    assert torch.equal(written.tokens[:, :5], batch.tokens[:, :5]) and not torch.equal(written.tokens, batch.tokens)
    assert written.counted is not None and written.counted[:, 5:].all() and not written.counted[:, :5].any()
    other_student = rollouts._replace(student=models[1])
    assert torch.equal(step.prepare(batch._replace(counted=None), other_student).tokens, written.tokens)


def test_near_zero_it_writes_the_likeliest(batch, rollouts, models):
    written = SeqKD(prompt=0.5, temperature=1e-4).prepare(batch._replace(counted=None), rollouts)
    likeliest = models[1](input_ids=written.tokens).logits.argmax(-1)
    assert torch.equal(written.tokens[:, 5:], likeliest[:, 4:-1])


def test_the_prompts_of_records_are_given(batch, rollouts):
    written = SeqKD().prepare(batch, rollouts)
    assert torch.equal(written.tokens[~batch.counted], batch.tokens[~batch.counted])


def test_the_loss_is_that_of_the_next_token(batch, make_signal):
    student = make_signal(1)
    expected = cross_entropy(student.head(student.hidden), batch.targets).mean()
    torch.testing.assert_close(SeqKD(chunk=5).loss(student, make_signal(2), batch), expected)
