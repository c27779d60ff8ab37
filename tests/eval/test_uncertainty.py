"""Paired intervals and calibration error: known cases, and what they must never say."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.eval.uncertainty import calibration_error, paired_difference


def test_equal_models_do_not_differ_and_a_seed_repeats() -> None:
    same = paired_difference([1, 0, 1], [1, 0, 1])
    assert (same.mean, same.low, same.high, same.differs) == (0, 0, 0, False)
    rng = np.random.default_rng(0)
    new, old = rng.random(50).tolist(), rng.random(50).tolist()
    assert paired_difference(new, old, seed=3) == paired_difference(new, old, seed=3)


def test_the_interval_is_the_normal_one_where_there_are_many_documents() -> None:
    rng = np.random.default_rng(1)
    gaps = rng.normal(0.1, 1.0, 2000)
    found = paired_difference(gaps.tolist(), [0.0] * len(gaps))
    error = gaps.std() / np.sqrt(len(gaps))
    assert found.mean == pytest.approx(gaps.mean())
    assert found.low == pytest.approx(gaps.mean() - 1.96 * error, abs=0.15 * error)
    assert found.high == pytest.approx(gaps.mean() + 1.96 * error, abs=0.15 * error)
    assert found.differs


def test_weights_are_those_of_the_metric() -> None:
    found = paired_difference([2.0, 1.0], [1.0, 1.0], [3.0, 1.0])
    assert found.mean == pytest.approx(0.75)
    assert (found.low, found.high) == (0.0, 1.0)


def test_few_documents_prove_nothing_and_the_exact_test_has_its_say() -> None:
    assert not paired_difference([0.0] * 5, [1.0] * 5).differs  # p = 2 / 2 ** 5
    assert paired_difference([0.0] * 6, [1.0] * 6).differs
    # 9 against 2: the bootstrap's interval leaves out 0, McNemar's p is 0.065.
    lopsided = paired_difference([1.0] * 9 + [0.0] * 91, [0.0] * 9 + [1.0] * 2 + [0.0] * 89)
    assert lopsided.low > 0 and not lopsided.differs


@pytest.mark.parametrize("outcome", [np.nan, np.inf])
def test_what_is_no_number_has_no_interval(outcome: float) -> None:
    with pytest.raises(ValueError, match="no finite numbers"):
        paired_difference([1.0, outcome], [1.0, 0.0])


def test_calibration_by_hand() -> None:
    assert calibration_error([1.0, 1.0], [True, True]) == 0
    assert calibration_error([1.0] * 4, [True, False, False, True]) == 0.5  # 1 - accuracy
    # Two bins of [0, 1/15) and [14/15, 1]: |0 - 0.05| and |0.5 - 0.95|, halves of all.
    assert calibration_error([0.05, 0.05, 0.95, 0.95], [False, False, True, False]) == pytest.approx((0.05 + 0.45) / 2)
    with pytest.raises(ValueError):
        calibration_error([], [])


@settings(max_examples=30)
@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=30))
def test_calibration_error_is_a_share(pairs: list[tuple[float, bool]]) -> None:
    confidences, right = zip(*pairs, strict=True)
    whole = abs(np.mean(right) - np.mean(confidences))  # gaps of bins cancel at most
    assert whole - 1e-9 <= calibration_error(confidences, right) <= 1
