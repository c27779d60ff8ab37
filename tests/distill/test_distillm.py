"""The student's texts are kept, used again the more the later it is, and remembered by a run that resumes."""

from __future__ import annotations

import copy

import pytest
import torch

from compress.distill.distillm import DistiLLM
from compress.distill.losses import skew_kl
from compress.rollouts import LOG_CHANCES
from compress.train import train
from compress.train_pass import Batch
from compress.weights import Dense


def windows(index: int) -> Batch:
    return Batch(torch.randint(32, (2, 8), generator=torch.Generator().manual_seed(index)), index=index)


def test_texts_are_written_first_and_come_out_of_the_memory_later(rollouts):
    step = DistiLLM(student_text=1.0, steps=40, kept=6)
    fresh, replayed, seen = [], [], []
    for index in range(40):
        prepared = step.prepare(windows(index), rollouts)
        assert prepared.counted is not None and prepared.counted.sum() == 8
        if LOG_CHANCES in prepared.extras:
            fresh.append(index)
            seen.append(prepared.tokens)
        else:
            replayed.append(index)
            kept = torch.cat(seen)[-6:]
            assert all(any(torch.equal(row, text) for text in kept) for row in prepared.tokens)
        assert torch.equal(rollouts.memory["texts"], torch.cat(seen)[-6:])
    assert 0 in fresh and sum(fresh) / len(fresh) < sum(replayed) / len(replayed)


def test_the_students_share_rises_when_held_out_loss_does(rollouts):
    step = DistiLLM(student_text=0.2, tolerance=0.1)
    assert step.share(()) == 0.2
    losses = [3.0, 2.0, 2.05, 2.5, 2.4, 2.9]
    assert step.share(list(enumerate(losses))) == pytest.approx(0.4)
    assert step.share([(n, float(n)) for n in range(50)]) == 1.0
    assert not DistiLLM(student_text=0.0).prepare(windows(0), rollouts).extras and not rollouts.memory


def test_the_loss_is_the_mean_skewed_divergence(batch, make_signal):
    student, teacher = make_signal(1), make_signal(2)
    expected = skew_kl(student.head(student.hidden), teacher.head(teacher.hidden), alpha=0.2).mean()
    torch.testing.assert_close(DistiLLM(alpha=0.2).loss(student, teacher, batch), expected)
    assert DistiLLM().loss(student, student, batch) == 0


def test_an_interrupted_run_remembers(models, tmp_path):
    tokens = torch.randint(32, (40, 8), generator=torch.Generator().manual_seed(0))
    step = DistiLLM(steps=10, batch_size=2, learning_rate=1e-2, student_text=1.0)

    def fit(directory, stop: int | None = None) -> list[float]:
        student = copy.deepcopy(models[0])
        weights = {name: Dense(module.weight.data) for name, module in student.model.named_modules(prefix="model")
                   if name.endswith("_proj")}  # fmt: skip

        def progress(done: int, total: int, message: str) -> None:
            if done == stop:
                raise KeyboardInterrupt

        return train(student, weights, models[1], tokens, step, seed=0, device="cpu", directory=tmp_path / directory,
                     progress=progress, save_every=3).history  # fmt: skip

    expected = fit("whole")
    with pytest.raises(KeyboardInterrupt):
        fit("stopped", stop=8)
    assert fit("stopped") == expected
