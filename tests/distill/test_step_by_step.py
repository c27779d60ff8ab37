"""Labels and rationales are two tasks with means of their own, from rows to the loss."""

from __future__ import annotations

import json

import pytest
import torch

from compress.calibration import read_text, windows
from compress.distill.fine_tune import FineTune
from compress.distill.losses import cross_entropy
from compress.distill.step_by_step import StepByStep
from compress.errors import BadInput
from compress.texts import Record

ROWS = [
    {"prompt": "ba be?", "rationale": "be is before bi", "label": "bi", "answer": "Bi ", "expected": "bi"},
    {"prompt": "da de?", "rationale": "de is fa", "label": "fa", "answer": "fa", "expected": "di"},
]


def test_a_row_is_two_records_and_a_wrong_answer_none(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, ROWS)))
    records = list(read_text(str(file))[0])
    assert [isinstance(record, Record) and record.task for record in records] == [0, 1]
    texts = ["".join(turn.text for turn in record.turns) for record in records if isinstance(record, Record)]
    assert texts == ["[label] ba be? bi", "[rationale] ba be? be is before bi"]
    file.write_text(json.dumps(ROWS[1]))
    with pytest.raises(BadInput, match="no row has the answer"):
        read_text(str(file))


def test_windows_know_the_task_of_every_token(tmp_path, tokenizer):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(ROWS[0]))
    texts, source = read_text(str(file))
    made = windows(tokenizer, texts, source, n=4, length=64, seed=0, at_most=True)
    assert made.tasks is not None and made.counted is not None and made.tasks.shape == made.tokens.shape
    said = {task: tokenizer.decode(made.tokens[made.counted & (made.tasks == task)]) for task in (0, 1)}
    assert said == {0: " bi</s>", 1: tokenizer.decode(tokenizer(" be is before bi")["input_ids"]) + "</s>"}


def test_the_loss_has_two_means(batch, make_signal):
    student = make_signal(1)
    tasks = (torch.arange(10) % 3 == 0).to(torch.int8).expand(4, 10)
    losses = cross_entropy(student.head(student.hidden), batch.targets)
    rationale = batch.at_predicted(tasks) == 1
    expected = 0.3 * losses[~rationale].mean() + 0.7 * losses[rationale].mean()
    torch.testing.assert_close(StepByStep(alpha=0.3, chunk=5).loss(student, None, batch._replace(tasks=tasks)), expected)
    only_labels = batch._replace(tasks=torch.zeros(4, 10, dtype=torch.int8))
    for plain in (batch, only_labels):
        assert StepByStep(alpha=0.3).loss(student, None, plain) == FineTune().loss(student, None, plain)
    torch.testing.assert_close(
        StepByStep(alpha=1.0).loss(student, None, batch._replace(tasks=tasks)), losses[~rationale].mean()
    )  # which is fine-tuning on the labels
