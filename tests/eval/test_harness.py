"""The harness gives lm-eval's own numbers, quietly, and refuses an unknown task before any compute."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from dataclasses import replace

import pytest

from compress.eval.harness import TaskScore, check_tasks, evaluate


def reference(model_directory, settings, **more):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    return simple_evaluate(
        model="hf",
        model_args={"pretrained": str(model_directory), "dtype": "float32"},
        tasks=list(settings.tasks),
        task_manager=TaskManager(include_path=list(settings.include), include_defaults=False),
        batch_size=settings.batch_size,
        device="cpu",
        bootstrap_iters=1000,
        log_samples=False,
        **more,
    )["results"]


@pytest.mark.parametrize("options", [{"limit": None, "n_shot": None}, {"limit": 10, "n_shot": 2}])
def test_numbers_are_those_of_lm_eval_on_the_same_directory(options, model_directory, model, tokenizer, settings):
    settings = replace(settings, **options)
    scores = evaluate(model, tokenizer, settings, device="cpu").scores
    rows = reference(model_directory, settings, limit=settings.limit, num_fewshot=settings.n_shot)
    assert set(scores) == {"tiny_choice", "tiny_pages"}
    for name, score in scores.items():
        for metric, value in score.metrics.items():
            assert value == rows[name][f"{metric},none"]
            error = rows[name][f"{metric}_stderr,none"]
            assert score.stderr[metric] == (None if error == "N/A" else error)
    assert scores["tiny_choice"].primary == "acc_norm"
    assert scores["tiny_choice"].higher_is_better
    assert scores["tiny_choice"].n_samples == (settings.limit or 15)
    assert scores["tiny_pages"].primary == "bits_per_byte"
    assert not scores["tiny_pages"].higher_is_better


def test_repeats_exactly_and_keeps_stdout_clean(model, tokenizer, settings, capfd):
    manager = check_tasks(settings)
    loggers = [logging.getLogger(name) for name in ("lm_eval", "transformers", "datasets")]
    levels = [logger.level for logger in loggers]
    first = evaluate(model, tokenizer, settings, device="cpu", task_manager=manager)
    again = evaluate(model, tokenizer, settings, device="cpu", task_manager=manager)
    assert (first.scores, first.documents) == (again.scores, again.documents)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "fatal" not in captured.err
    assert [logger.level for logger in loggers] == levels


def test_a_group_gives_its_aggregate_only(model, tokenizer, settings):
    scores = evaluate(model, tokenizer, replace(settings, tasks=("tiny_group",)), device="cpu").scores
    assert set(scores) == {"tiny_group"}
    assert set(scores["tiny_group"].metrics) == {"acc"}
    assert scores["tiny_group"].n_samples == 15


def test_an_included_file_stands_for_its_directory(settings):
    file = f"{settings.include[0]}/tiny_pages.yaml"
    assert "tiny_pages" in check_tasks(replace(settings, tasks=("tiny_pages",), include=(file,))).all_tasks


def test_an_unknown_task_is_refused_with_a_suggestion(settings, monkeypatch):
    from lm_eval import tasks

    local = tasks.TaskManager

    def without_defaults(include_path, include_defaults):
        return local(include_path=include_path, include_defaults=False)  # indexing the built-ins takes many seconds

    monkeypatch.setattr(tasks, "TaskManager", without_defaults)
    with pytest.raises(ValueError, match=r"unknown task 'tiny_choise'; did you mean tiny_choice"):
        check_tasks(replace(settings, tasks=("tiny_pages", "tiny_choise")))
    with pytest.raises(ValueError, match="no such file or directory"):
        check_tasks(replace(settings, include=("nowhere/at/all",)))
    with pytest.raises(ValueError, match="no task"):
        check_tasks(replace(settings, tasks=()))


def test_scores_survive_json():
    score = TaskScore(
        metrics={"perplexity": float("inf")},
        stderr={"perplexity": None},
        primary="perplexity",
        higher_is_better=False,
        n_samples=1,
    )
    assert TaskScore.model_validate_json(score.model_dump_json()) == score


@pytest.mark.slow
def test_numbers_are_those_of_the_command_line_of_lm_eval(model_directory, model, tokenizer, settings, tmp_path):
    options = ["--model_args", f"pretrained={model_directory},dtype=float32", "--tasks", ",".join(settings.tasks)]
    options += ["--include_path", settings.include[0], "--num_fewshot", "2", "--limit", "10", "--batch_size", "4"]
    options += ["--device", "cpu", "--output_path", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "lm_eval", "run", "--model", "hf", *options], check=True, capture_output=True)
    (file,) = tmp_path.rglob("results*.json")
    rows = json.loads(file.read_text())["results"]
    scores = evaluate(model, tokenizer, replace(settings, n_shot=2, limit=10), device="cpu").scores
    for name, score in scores.items():
        assert score.metrics == {key: rows[name][f"{key},none"] for key in score.metrics}


@pytest.mark.parametrize("rows", ["", '{"choices": ["a"], "answer": 0}\n'])
def test_tasks_that_cannot_be_read_are_named(model, tokenizer, settings, tmp_path, rows):
    (tmp_path / "rows.jsonl").write_text(rows)
    (tmp_path / "odd.yaml").write_text(f"""
task: odd
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question.nowhere.else}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}]
""")
    odd = replace(settings, tasks=("odd",), include=(str(tmp_path),))
    with pytest.raises(ValueError, match="odd: a task or its data cannot be read, or are empty"):
        evaluate(model, tokenizer, odd, device="cpu")
