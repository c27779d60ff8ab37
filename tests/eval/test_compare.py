"""Two measured models beside one another: verdicts by paired differences, flips, bytes; and what does not compare."""

from __future__ import annotations

import math

import pytest

from compress.eval.compare import compare_models, task_cases
from compress.eval.metrics import Metrics, Protocol
from compress.eval.uncertainty import paired_difference

N = 40


def measured(make_metrics, label: str, wrong: set[int], bits: float = 1.0, size: int = 100, **more) -> Metrics:
    """A model that answers all but ``wrong`` of forty questions right."""
    right = tuple(0.0 if index in wrong else 1.0 for index in range(N))
    text = tuple(bits + 0.01 * index for index in range(10))
    outcomes = {"choice": right, "text": text}
    return make_metrics(label, size, sum(right) / N, bits_per_byte=sum(text) / 10, outcomes=outcomes, **more)


def test_verdicts_follow_the_paired_interval(make_metrics):
    a, b = measured(make_metrics, "a", {0, 1}), measured(make_metrics, "b", set(range(1, 13)), bits=0.9, size=50)
    found = compare_models(a, b)
    choice, text = found.tasks["choice"], found.tasks["text"]
    assert choice.verdict == "worse" and text.verdict == "better" and found.worse == ["choice"]
    assert choice.difference == paired_difference(b.outcomes["choice"], a.outcomes["choice"])
    assert choice.difference.mean == pytest.approx(b.tasks["choice"].value - a.tasks["choice"].value)
    assert (choice.flips.negative, choice.flips.positive, choice.flips.n) == (11, 1, N) and text.flips is None
    back = compare_models(b, a)
    assert back.tasks["choice"].verdict == "better" and back.tasks["choice"].flips.negative == 1
    assert [case.failed for case in found.cases()] == [True, False]


def test_words(make_metrics):
    a, b = measured(make_metrics, "one", {0, 1}), measured(make_metrics, "two", {1, 2, 3}, size=50)
    found = compare_models(a, b)
    lines = "\n".join(found.lines())
    assert found.tasks["choice"].verdict == "does not differ" and found.worse == []
    assert "A: one" in lines and "B: two" in lines and "does not differ (-0.025 [" in lines
    assert "2 right -> wrong, 1 wrong -> right of 40" in lines and "50.0% of A" in lines


def test_a_model_does_not_differ_from_itself(make_metrics):
    a = measured(make_metrics, "a", {3})
    assert {task.verdict for task in compare_models(a, a).tasks.values()} == {"does not differ"}


def test_other_documents_are_not_compared_one_by_one(make_metrics):
    a, b = measured(make_metrics, "a", {0}), measured(make_metrics, "b", {1})
    shorter = b.model_copy(update={"outcomes": {"choice": b.outcomes["choice"][:-1]}})
    found = compare_models(a, shorter)
    assert {task.verdict for task in found.tasks.values()} == {"not comparable"} and found.worse == []
    assert "not comparable document by document" in "\n".join(found.lines())


@pytest.mark.parametrize("ruined", [math.nan, math.inf])
def test_a_ruined_model_is_worse_and_never_one_that_does_not_differ(make_metrics, ruined):
    a, broken = measured(make_metrics, "a", {0}), measured(make_metrics, "b", {0}, bits=ruined)
    found = compare_models(a, broken)
    assert found.tasks["text"].verdict == "worse" and found.worse == ["text"]
    assert found.tasks["text"].difference is None and "worse" in "\n".join(found.lines())
    assert found.tasks["choice"].verdict == "does not differ"
    assert compare_models(broken, a).tasks["text"].verdict == "better"
    assert compare_models(broken, broken).tasks["text"].verdict == "not comparable"


def test_what_does_not_compare_at_all(make_metrics):
    a = measured(make_metrics, "a", {0})
    with pytest.raises(ValueError, match=r"differently \(limit\)"):
        compare_models(a, a.model_copy(update={"protocol": Protocol(limit=5)}))
    with pytest.raises(ValueError, match="no task in common"):
        compare_models(a, a.model_copy(update={"tasks": {}}))
    fewer = a.model_copy(update={"tasks": {"text": a.tasks["text"]}, "protocol": Protocol(versions={"torch": "1"})})
    assert "choice: measured of one model only" in compare_models(a, fewer).notes
    assert any("versions of torch" in note for note in compare_models(fewer, a).notes)
    assert any("different base models" in note for note in compare_models(a, a, same_base=False).notes)


def test_cases_of_a_run_say_whether_a_score_differs(make_metrics):
    base, point = measured(make_metrics, "base", {0}), measured(make_metrics, "a", {0, 1})
    difference = paired_difference(point.outcomes["choice"], base.outcomes["choice"])
    point = point.model_copy(update={"differences": {"choice": difference}})
    choice, text = task_cases(point, base)
    assert not choice.failed and "0.975 -> 0.95; does not differ from the base" in choice.told
    assert text.told.startswith("bits_per_byte: 1.045 -> 1.045")
    assert task_cases(base, None)[0].told == "acc_norm: 0.975"
