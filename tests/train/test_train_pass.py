"""What a training pass says of its run: schedules, held-out windows, early stops, settings that disagree."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from compress.distill.logit_kd import LogitKD
from compress.errors import BadInput
from compress.train import train
from compress.train_pass import TrainPass
from tests.training import VOCABULARY, assert_same_tensors, compressed, fit, masked, silent, tensors_of


class Noted(TrainPass):
    """Takes note of what it is trained on, and of what it is measured on."""

    def loss(self, student, teacher, batch):
        seen[torch.is_grad_enabled()].update(batch.rows.tolist())
        assert torch.equal(batch.tokens, NOTED_TOKENS[batch.rows])
        return F.cross_entropy(student.head(student.hidden), batch.targets)


seen: dict[bool, set[int]] = {True: set(), False: set()}
NOTED_TOKENS = torch.randint(0, VOCABULARY, (40, 8), generator=torch.Generator().manual_seed(2))


def test_held_out_windows_are_never_trained_on(llama, tmp_path):
    chosen = []
    for seed in (0, 0, 1):
        for found in seen.values():
            found.clear()
        student, weights = compressed(llama, masked)
        step = Noted(steps=8, batch_size=4, hold_out=0.2, evaluate_every=3)
        result = train(student, weights, None, NOTED_TOKENS, step, seed=seed, device="cpu",
                       directory=tmp_path / str(len(chosen)), progress=silent)  # fmt: skip
        assert [done for done, _ in result.held_out] == [0, 3, 6, 8]
        assert len(seen[False]) == 8 and seen[True] | seen[False] == set(range(40)) and not seen[True] & seen[False]
        chosen.append(frozenset(seen[False]))
    assert chosen[0] == chosen[1] != chosen[2]
    assert step.n_held_out(7) == 0 and step.n_held_out(8) == 4 and Noted(hold_out=0).n_held_out(800) == 0


def test_early_stop_gives_back_the_best(llama, tokens, tmp_path):
    """A rate at which things get worse: the parameters of the start are the best, and come out."""
    student, weights = compressed(llama, masked)
    before = tensors_of(student)
    settings = {"learning_rate": 2.0, "warmup": 0.0, "steps": 20, "evaluate_every": 2, "patience": 2}
    messages: list[str] = []
    result = fit(student, weights, llama, tokens, tmp_path, progress=lambda *call: messages.append(call[2]), **settings)
    assert len(result.history) == 4 and [done for done, _ in result.held_out] == [0, 2, 4]
    assert result.n_steps == 0 and result.summary()["held_out_loss"] == result.held_out[0][1]
    assert_same_tensors(tensors_of(student), before)
    assert messages[-1] == f"loss {result.history[-1]:.4f}, held out {result.held_out[-1][1]:.4f}"

    again, _ = compressed(llama, masked)  # what has stopped goes on no more
    repeated = fit(again, weights, llama, tokens, tmp_path, **settings)
    assert repeated.history == result.history and repeated.held_out == result.held_out
    assert_same_tensors(tensors_of(again), before)


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "linear", "constant"])
def test_schedules_warm_up_to_the_peak_and_fall(schedule):
    step = LogitKD(steps=100, schedule=schedule, warmup=0.1, decay=0.25, learning_rate=2.0)
    rates = [step.learning_rate_at(index) for index in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (index + 1) for index in range(10)])
    assert rates[10] == 2.0 and all(later <= earlier for earlier, later in pairwise(rates[9:]))
    assert rates.count(2.0) == {"constant": 91, "wsd": 67}.get(schedule, 2)
    half, last = {"cosine": (1.0, 0.0006), "linear": (1.0, 0.0223), "wsd": (2.0, 0.08), "constant": (2.0, 2.0)}[schedule]
    assert rates[55] == pytest.approx(half) and rates[-1] == pytest.approx(last, rel=0.02)


def test_settings_that_disagree_are_refused(llama, tokens, tmp_path):
    for settings in ({"patience": 2, "hold_out": 0}, {"accumulate": 3}):
        with pytest.raises(ValueError, match=r"patience|accumulate"):
            LogitKD(**settings)
    student, weights = compressed(llama, masked)
    with pytest.raises(BadInput, match="too few to hold some out"):
        fit(student, weights, llama, tokens[:7], tmp_path, patience=1)
