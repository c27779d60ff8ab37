"""Evaluation against plain lm-eval, on the same models, tasks and limit.

    python benchmarks/evaluation.py DATA MODEL... [--limit 100] [--json FILE]

DATA holds ``eval/*_val.jsonl`` files (see ``benchmarks/tasks``). For each model it prints, task by task: whether every metric
equals that of ``lm_eval.simple_evaluate(model="hf")`` exactly; the time beyond lm-eval's own for the same requests; the largest
difference of a model read block by block; and perplexity beside a computation of its own in a few lines. lm-eval's own ARC-easy,
OpenBookQA and PIQA run unchanged, on files in their own columns that are made here.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from compress.calibration import load_tokenizer
from compress.checkpoint import Checkpoint
from compress.eval.fidelity import perplexity
from compress.eval.harness import OWN_SEEDS, check_tasks, evaluate
from compress.eval.streamed import StreamedModel
from compress.judge import load_model
from compress.recipe import Evaluation
from compress.skeleton import Skeleton

BUILT_IN = {"arc_easy": "arc", "openbookqa": "openbookqa", "piqa": "piqa"}


def built_in_data(source: Path, target: Path) -> None:
    """Write the rows of ``source/*_val.jsonl`` in the columns of lm-eval's own tasks."""
    letters = "ABCDEFGH"

    def arc(row: dict[str, Any], stem: str) -> dict[str, Any]:
        choices = [choice.removeprefix(" ") for choice in row["choices"]]
        found = {"choices": {"text": choices, "label": list(letters[: len(choices)])}, "answerKey": letters[row["gold"]]}
        return found | {stem: row.get("question", row["context"])}

    def piqa(row: dict[str, Any]) -> dict[str, Any]:
        first, second = (choice.removeprefix(" ") for choice in row["choices"])
        return {"goal": row["goal"], "sol1": first, "sol2": second, "label": row["gold"]}

    makers = {
        "arc_easy": ("test", lambda row: arc(row, "question")),
        "openbookqa": ("test", lambda row: arc(row, "question_stem")),
        "piqa": ("validation", piqa),
    }
    for task, (split, make) in makers.items():
        rows = [json.loads(line) for line in (source / f"{task}_val.jsonl").read_text().splitlines()]
        file = target / task / f"{split}.jsonl"
        file.parent.mkdir(parents=True)
        file.write_text("".join(json.dumps(make(row)) + "\n" for row in rows))


def task_files(target: Path, data: Path) -> list[str]:
    """Files that give lm-eval alone the same tasks on the same data: its own definitions with another data set."""
    import lm_eval

    own = Path(lm_eval.__file__).parent / "tasks"
    target.mkdir()
    for task, folder in BUILT_IN.items():
        files = {file.stem: str(file) for file in (data / task).glob("*.jsonl")}
        some = next(iter(files.values()))
        files |= {split: some for split in ("train", "validation", "test") if split not in files}
        kwargs = json.dumps({"data_files": files})
        lines = [f"include: {own / folder / task}.yaml", f"task: {task}", "dataset_path: json", "dataset_name: null"]
        (target / f"{task}.yaml").write_text("\n".join([*lines, f"dataset_kwargs: {kwargs}"]) + "\n")
    return list(BUILT_IN)


def plain(model: Path, files: Path, tasks: list[str], limit: int) -> tuple[dict[str, Any], float]:
    """lm-eval alone: its results and seconds, without finding its tasks and opening the model."""
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    lm = HFLM(pretrained=str(model), dtype="float32", device="cpu", batch_size=8)
    manager = TaskManager(include_path=str(files), include_defaults=False)
    start = time.perf_counter()
    results = evaluator.simple_evaluate(
        lm, tasks=tasks, task_manager=manager, limit=limit, bootstrap_iters=1000, log_samples=True
    )
    assert results is not None and OWN_SEEDS == (0, 1234, 1234, 1234)
    return results["results"], time.perf_counter() - start


def independent_perplexity(model: Any, windows: torch.Tensor) -> float:
    """exp of the mean loss of every token but each window's first, with nothing of the toolkit."""
    total = 0.0
    for window in windows:
        with torch.no_grad():
            logits = model(window[None]).logits[0].double()
        for position in range(len(window) - 1):
            total -= float(logits[position, window[position + 1]] - logits[position].logsumexp(0))
    return math.exp(total / (len(windows) * (windows.shape[1] - 1)))


def measure(model: Path, data: Path, limit: int, scratch: Path) -> dict[str, Any]:
    """All comparisons of one model."""
    if not (scratch / "data").exists():
        built_in_data(data, scratch / "data")
        task_files(scratch / "tasks", scratch / "data")
    tasks, checkpoint = list(BUILT_IN), Checkpoint.open(model)
    tokenizer = load_tokenizer(model, checkpoint.config.vocab_size)
    import lm_eval

    folders = tuple(str(Path(lm_eval.__file__).parent / "tasks" / folder) for folder in BUILT_IN.values())
    evaluation = Evaluation(tasks=tuple(tasks), include=folders, task_data=str(scratch / "data"), limit=limit)
    manager, resident = check_tasks(evaluation), load_model(model, torch.float32, "cpu")
    context = getattr(checkpoint.config, "max_position_embeddings", None)
    times, theirs, ours = [], {}, None
    for _ in range(3):  # in turn, so that a busy machine slows both
        theirs, seconds = plain(model, scratch / "tasks", tasks, limit)
        start = time.perf_counter()
        ours = evaluate(resident, tokenizer, evaluation, device="cpu", max_length=context, task_manager=manager)
        times.append((seconds, time.perf_counter() - start))
    assert ours is not None
    streamed = evaluate(
        StreamedModel(Skeleton(checkpoint)), tokenizer, evaluation, device="cpu", max_length=context, task_manager=manager
    )
    windows = torch.randint(checkpoint.config.vocab_size, (2, 64), generator=torch.Generator().manual_seed(0))
    independent = independent_perplexity(resident, windows)
    pairs = [
        (value, theirs[task][f"{metric},none"], streamed.scores[task].metrics[metric])
        for task, score in ours.scores.items() for metric, value in score.metrics.items()
    ]  # fmt: skip
    return {
        "model": model.name,
        "metrics": len(pairs),
        "equal_to_lm_eval": sum(value == other for value, other, _ in pairs),
        "overhead": min(own for _, own in times) / min(other for other, _ in times) - 1,
        "seconds": min(own for _, own in times),
        "largest_streamed_difference": max(abs(value - other) for value, _, other in pairs),
        "perplexity_difference": abs(perplexity(resident, windows).token_perplexity / independent - 1),
        "scores": {task: score.value for task, score in ours.scores.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        for model in arguments.models:
            found.append(measure(model, arguments.data, arguments.limit, Path(scratch)))
            print(json.dumps(found[-1]))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
