"""A training run that was interrupted goes on bit for bit."""

from __future__ import annotations

import copy

import pytest

from compress.trainable import TrainableLinear
from compress.training_state import STATE_FILE
from tests.training import assert_same_tensors, compressed, fit, low_rank, masked, tensors_of


@pytest.mark.parametrize("how", [masked, low_rank], ids=["masked", "low_rank"])
def test_an_interrupted_run_resumes_bit_for_bit(how, llama, tokens, tmp_path):
    undisturbed, weights = compressed(llama, how)
    interrupted, resumed = copy.deepcopy(undisturbed), copy.deepcopy(undisturbed)
    settings = {"steps": 12, "save_every": 4, "weight_decay": 0.1}
    expected = fit(undisturbed, weights, llama, tokens, tmp_path / "undisturbed", **settings)

    def stop_at_six(done: int, total: int, message: str) -> None:
        if done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(interrupted, weights, llama, tokens, tmp_path / "stopped", progress=stop_at_six, **settings)
    assert not any(isinstance(module, TrainableLinear) for module in interrupted.modules())
    seen: list[int] = []
    result = fit(resumed, weights, llama, tokens, tmp_path / "stopped",
                 progress=lambda done, total, message: seen.append(done), **settings)  # fmt: skip
    assert seen == [4, *range(5, 13)]
    assert result.history == expected.history
    assert_same_tensors(tensors_of(resumed), tensors_of(undisturbed))
    assert [path.name for path in (tmp_path / "stopped").iterdir()] == [STATE_FILE]


def test_a_finished_run_returns_at_once_and_other_settings_start_anew(llama, tokens, tmp_path, caplog):
    student, weights = compressed(llama, masked)
    first, second, third = student, copy.deepcopy(student), copy.deepcopy(student)
    expected = fit(first, weights, llama, tokens, tmp_path, steps=3)
    seen: list[str] = []
    again = fit(second, weights, llama, tokens, tmp_path, steps=3, progress=lambda *call: seen.append(call[2]))
    assert seen == ["resumed"] and again.history == expected.history
    assert_same_tensors(tensors_of(first), tensors_of(second))
    other = fit(third, weights, llama, tokens, tmp_path, steps=3, temperature=2.0)
    assert other.history != expected.history and "starts anew" in caplog.text


def test_an_early_stop_after_an_interruption_is_the_same(llama, tokens, tmp_path):
    settings = {"schedule": "constant", "learning_rate": 2e-2, "warmup": 0.2, "steps": 40, "save_every": 3}
    settings |= {"evaluate_every": 1, "patience": 1}
    undisturbed, weights = compressed(llama, masked)
    resumed = copy.deepcopy(undisturbed)
    expected = fit(undisturbed, weights, llama, tokens, tmp_path / "undisturbed", **settings)
    assert 0 < expected.n_steps < len(expected.history)

    def stop(done: int, total: int, message: str) -> None:
        if done == len(expected.history) - 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(copy.deepcopy(resumed), weights, llama, tokens, tmp_path / "stopped", progress=stop, **settings)
    found = fit(resumed, weights, llama, tokens, tmp_path / "stopped", **settings)
    assert (found.history, found.held_out, found.n_steps) == (expected.history, expected.held_out, expected.n_steps)
    assert_same_tensors(tensors_of(resumed), tensors_of(undisturbed))
