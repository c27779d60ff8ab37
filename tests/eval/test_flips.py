"""Flips and McNemar's test against cases worked by hand; the change of accuracy is the difference of the two kinds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.eval import documents
from compress.eval.documents import Document, is_mean, together
from compress.eval.flips import flips, mcnemar


def answered(outcomes: list[float]) -> list[Document]:
    return [
        Document(index, f"question {index}", ("yes", "no"), "yes", "yes" if outcome else "no", outcome)
        for index, outcome in enumerate(outcomes)
    ]


def test_counts_and_examples_of_a_case_worked_by_hand() -> None:
    found = flips(answered([1, 1, 1, 0, 0, 1]), answered([1, 0, 0, 1, 0, 0]))
    assert found is not None
    assert (found.n, found.negative, found.positive) == (6, 3, 1)
    assert found.p_value == pytest.approx(2 * (1 + 4) / 16)  # C(4, 0) + C(4, 1), of 2 ** 4
    assert [(one.index, one.kind) for one in found.examples] == [
        (1, "negative"),
        (2, "negative"),
        (5, "negative"),
        (3, "positive"),
    ]
    first = found.examples[0]
    assert (first.prompt, first.choices, first.gold, first.before, first.after) == (
        "question 1",
        ("yes", "no"),
        "yes",
        "yes",
        "no",
    )


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_accuracy_changes_by_positive_minus_negative_flips(pairs: list[tuple[bool, bool]]) -> None:
    before, after = [answered([float(side) for side in sides]) for sides in zip(*pairs, strict=True)]
    found = flips(before, after)
    assert found is not None
    change = sum(new for _, new in pairs) - sum(old for old, _ in pairs)
    assert change == found.positive - found.negative
    assert 0 < found.p_value <= 1 and found.p_value == mcnemar(found.positive, found.negative)


def test_the_exact_test_by_hand_and_at_sizes_that_overflow_floats() -> None:
    assert mcnemar(0, 0) == 1
    assert mcnemar(0, 6) == 2 / 2**6
    assert mcnemar(5, 5) == 1
    assert mcnemar(1, 9) == pytest.approx(2 * (1 + 10) / 2**10)
    assert mcnemar(2000, 2000) == 1 and 0 < mcnemar(1900, 2100) < 0.01


def test_prompts_are_cut_at_their_beginning_and_examples_are_few() -> None:
    before, after = answered([1.0] * 30), [d._replace(prompt="a" * 700 + "end") for d in answered([0.0] * 30)]
    found = flips(before, after)
    assert found is not None and len(found.examples) == 12
    assert len(found.examples[0].prompt) == 600 and found.examples[0].prompt.endswith("end")


def test_what_is_not_right_or_wrong_has_no_flips_and_other_documents_are_refused() -> None:
    assert flips(answered([0.5]), answered([1.0])) is None
    with pytest.raises(ValueError, match="different documents"):
        flips(answered([1.0, 0.0]), answered([1.0]))


def test_documents_come_back_from_their_file_without_prompts(tmp_path) -> None:
    whole = {"a": answered([1, 0]), "b": [Document(0, "é", (), "x", "y", 2.5, 30.0)]}
    path = documents.save(tmp_path / "deep" / "answers", whole)
    assert documents.load(path) == {name: [document.bare for document in own] for name, own in whole.items()}
    path.write_text("[1, [[2]]]\n")
    with pytest.raises(ValueError):
        documents.load(path)


def test_a_group_weighs_documents_or_tasks_alike_whichever_gives_its_score() -> None:
    parts = [answered([1, 1, 1, 0]), answered([0, 1])]
    by_size = together(parts, 4 / 6)
    assert [document.index for document in by_size] == list(range(6)) and {d.weight for d in by_size} == {1.0}
    by_task = together(parts, (3 / 4 + 1 / 2) / 2)
    assert is_mean(by_task, 0.625) and len({d.weight for d in by_task}) == 2
    assert together(parts, 0.1) == []
