"""lm-eval's own task definitions, unchanged, on local files: found in every layout, refused with the list of places."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import lm_eval
import pytest

from compress.eval.harness import check_data, check_tasks, evaluate

ROWS = [
    {
        "id": str(index), "question": f"Which is {word}?", "answerKey": "ABCD"[index % 4],
        "choices": {"text": ["the red dog", "the cat", "a bird", "the river"], "label": ["A", "B", "C", "D"]},
    }
    for index, word in enumerate(["red", "green", "blue", "near", "under", "over"])
]  # fmt: skip


def own_tasks(name: str) -> str:
    return str(Path(lm_eval.__file__).parent / "tasks" / name)


def write(file: Path, rows: list[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".parquet":
        from datasets import Dataset

        Dataset.from_list(rows).to_parquet(str(file))
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def arc(settings):
    """The built-in ARC-easy, on data to come."""
    return replace(settings, tasks=("arc_easy",), include=(own_tasks("arc"),))


@pytest.mark.parametrize(
    "place",
    [
        "arc_easy/test.jsonl", "arc_easy.jsonl", "ai2_arc/ARC-Easy/test.json", "allenai/ai2_arc/ARC-Easy/test.parquet",
        "ai2_arc/ARC-Easy/data/test-00000-of-00001.parquet",
    ],
)  # fmt: skip
def test_each_layout_is_found(place, arc, tmp_path):
    write(tmp_path / place, ROWS)
    check_data(replace(arc, task_data=str(tmp_path)), check_tasks(arc))


def test_a_built_in_task_runs_offline_with_the_numbers_of_lm_eval(arc, tmp_path, model, model_directory, tokenizer):
    write(tmp_path / "arc_easy" / "test.jsonl", ROWS)
    write(tmp_path / "arc_easy" / "train.jsonl", ROWS[:4])
    local = replace(arc, task_data=str(tmp_path), n_shot=2, log_samples=True)
    found = evaluate(model, tokenizer, local, device="cpu")
    expected = plainly(model_directory, tmp_path / "arc_easy", n_shot=2)
    assert found.scores["arc_easy"].metrics == {
        key: expected["results"]["arc_easy"][f"{key},none"] for key in ("acc", "acc_norm")
    }
    samples = expected["samples"]["arc_easy"]
    assert [s["prompt_hash"] for s in found.samples["arc_easy"]] == [s["prompt_hash"] for s in samples]
    for document, sample in zip(found.documents["arc_easy"], samples, strict=True):
        assert document.outcome == sample["acc_norm"] and document.choices == tuple(ROWS[0]["choices"]["text"])
        assert document.gold == document.choices[sample["target"]]
        assert document.prompt.endswith(f"Question: {sample['doc']['question']}\nAnswer:")
        assert (document.answer == document.gold) == bool(document.outcome)
        assert document.likeliest_is_right == bool(sample["acc"]) and 0.25 <= document.confidence <= 1


def plainly(model_directory, data, n_shot):
    """lm-eval alone, in a task file that includes its own one and reads the same data."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    files = {"train": str(data / "train.jsonl"), "validation": str(data / "test.jsonl"), "test": str(data / "test.jsonl")}
    content = f"""
include: {own_tasks("arc")}/arc_easy.yaml
task: arc_easy
dataset_path: json
dataset_name: null
dataset_kwargs: {json.dumps({"data_files": files})}
"""
    (data / "tasks").mkdir()
    (data / "tasks" / "arc_easy.yaml").write_text(content)
    return simple_evaluate(
        model="hf", model_args={"pretrained": str(model_directory), "dtype": "float32"}, batch_size=4, device="cpu",
        tasks=["arc_easy"], task_manager=TaskManager(include_path=str(data / "tasks"), include_defaults=False),
        num_fewshot=n_shot, bootstrap_iters=1000,
    )  # fmt: skip


def test_two_configurations_of_a_data_set_are_never_mixed_up(arc, tmp_path):
    write(tmp_path / "ai2_arc" / "ARC-Easy" / "test.jsonl", ROWS)
    write(tmp_path / "ai2_arc" / "test.jsonl", ROWS)
    challenge = replace(arc, tasks=("arc_challenge",), task_data=str(tmp_path))
    with pytest.raises(ValueError, match=r"no local data for the task arc_challenge(.|\n)*ai2_arc/ARC-Challenge/test"):
        check_data(challenge, check_tasks(challenge))


def test_missing_examples_are_named_before_compute(arc, tmp_path):
    write(tmp_path / "arc_easy.jsonl", ROWS)
    local = replace(arc, task_data=str(tmp_path), n_shot=3)
    with pytest.raises(ValueError, match="puts 3 examples into the prompt, but its split 'train' is not there"):
        check_data(local, check_tasks(local))


def test_tasks_that_name_their_files_are_left_alone(settings, model, tokenizer, tmp_path):
    here = evaluate(model, tokenizer, replace(settings, task_data=str(tmp_path)), device="cpu")
    assert here.scores == evaluate(model, tokenizer, settings, device="cpu").scores


def test_the_ready_tasks_load_and_score_each_shape_of_file(settings, model, tokenizer, tmp_path):
    choice = {"context": "Question: red?\nAnswer:", "choices": [" the dog", " a cat"], "gold": 1}
    contexts = {"contexts": ["the red dog", "the red cat"], "continuation": " sleeps.", "gold": 0}
    write(tmp_path / "arc_easy_val.jsonl", [choice] * 2)
    write(tmp_path / "winogrande_val.jsonl", [contexts] * 2)
    write(tmp_path / "blimp_100per.jsonl", [{"good": "the dog runs", "bad": "the dog run"}] * 2)
    folder = Path(__file__).parents[2] / "benchmarks" / "tasks"
    tasks = ("local_arc_easy", "local_winogrande", "local_blimp")
    found = evaluate(
        model, tokenizer, replace(settings, tasks=tasks, include=(str(folder),), task_data=str(tmp_path)), device="cpu"
    )
    assert set(found.scores) == set(tasks)
    easy, schema, pair = (found.documents[task][0] for task in tasks)
    assert (easy.prompt, easy.choices, easy.gold) == (choice["context"], (" the dog", " a cat"), " a cat")
    assert schema.choices == tuple(contexts["contexts"]) and schema.gold == contexts["contexts"][0]
    assert pair.choices == ("the dog runs", "the dog run") and pair.gold == "the dog runs"
