"""The one place that talks to lm-eval, so that numbers here are the numbers lm-eval prints.

The model is handed over already loaded: a compressed artifact may need its own loader, and the pipeline evaluates
models that it holds in memory anyway. Indexing lm-eval's built-in tasks takes many seconds, so they are only looked at
when a requested task is not among the local ones, and the resulting index can be passed on from one evaluation to the
next.
"""

from __future__ import annotations

import logging
import math
import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    import torch
    from lm_eval.tasks import TaskManager
    from torch import nn

PREFERRED_METRICS = (
    *("acc_norm", "acc", "exact_match", "f1", "mcc", "pass@1", "bleu", "rouge1"),
    *("bits_per_byte", "byte_perplexity", "word_perplexity", "perplexity"),
)
BOOTSTRAP_ITERATIONS = 1000


class EvaluationSettings(Protocol):
    """What the harness reads of ``compress.recipe.Evaluation``.

    tasks: names of tasks, groups or tags. limit: documents per task (None: all). include: directories of task YAMLs, or
    such files, whose directory is then searched. n_shot: examples in the prompt (None: what each task says).
    """

    @property
    def tasks(self) -> tuple[str, ...]: ...
    @property
    def limit(self) -> int | None: ...
    @property
    def include(self) -> tuple[str, ...]: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def n_shot(self) -> int | None: ...
    @property
    def seed(self) -> int: ...


class TaskScore(BaseModel):
    """One task's numbers, in lm-eval's units and under its names (a filter other than "none" follows after a comma).

    stderr: standard error per metric, None where lm-eval has no estimate. primary: the metric that charts and recovery
    use. higher_is_better: of the primary metric. n_samples: documents scored.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    metrics: dict[str, float]
    stderr: dict[str, float | None]
    primary: str
    higher_is_better: bool
    n_samples: int

    @property
    def value(self) -> float:
        """The primary metric."""
        return self.metrics[self.primary]

    @property
    def standard_error(self) -> float | None:
        """Of the primary metric; None where unknown."""
        return self.stderr.get(self.primary)


def check_tasks(evaluation: EvaluationSettings) -> TaskManager:
    """Find every requested task, before any compute, and return the index for :func:`evaluate`.

    Reads YAML only: no data set is opened. Raises ValueError for a missing include path, an unknown task (with the
    nearest names) or no task at all.
    """
    from lm_eval.tasks import TaskManager

    if not evaluation.tasks:
        raise ValueError("no task to evaluate")
    directories: list[str | Path] = []
    for entry in map(Path, evaluation.include):
        if not entry.exists():
            raise ValueError(f"no such file or directory of tasks: {entry}")
        directories.append(entry if entry.is_dir() else entry.parent)
    with _quiet(logging.ERROR):
        manager = TaskManager(include_path=directories, include_defaults=False)
        if not set(evaluation.tasks) <= set(manager.all_tasks):
            manager = TaskManager(include_path=directories, include_defaults=True)
    for name in evaluation.tasks:
        if name not in manager.all_tasks:
            nearest = get_close_matches(name, manager.all_tasks, n=3)
            hint = f"; did you mean {' or '.join(nearest)}?" if nearest else ""
            raise ValueError(f"unknown task {name!r}{hint}")
    return manager


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    evaluation: EvaluationSettings,
    *,
    device: str | torch.device,
    max_length: int | None = None,
    task_manager: TaskManager | None = None,
) -> dict[str, TaskScore]:
    """Score a loaded causal language model on lm-eval tasks.

    max_length: tokens of context (None: the model's own limit). task_manager: from :func:`check_tasks`, to save a
    second indexing. A group gives one score where it defines an aggregate, else one for each of its tasks; a tag always
    the latter. Raises ValueError as :func:`check_tasks` does. Nothing is written to stdout.
    """
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM

    manager = task_manager or check_tasks(evaluation)
    # lm-eval and its metrics print; stdout belongs to the caller, who may be writing JSON there.
    with redirect_stdout(sys.stderr):
        _seed_everything(evaluation.seed)
        with _quiet(logging.ERROR):  # a preloaded model and defaulted metrics are warned about, and both are meant
            wrap: Any = HFLM
            model = model.to(device)
            lm = wrap(pretrained=model, tokenizer=tokenizer, batch_size=evaluation.batch_size, max_length=max_length)
            loaded = manager.load(list(evaluation.tasks))
        with _quiet(logging.WARNING):
            for task in loaded["tasks"].values():
                _set_shots(task, evaluation)
            # `simple_evaluate` does the same, but first shells out for the git commit and the whole environment.
            results = evaluator.evaluate(
                lm=lm,
                task_dict=loaded,
                limit=evaluation.limit,
                bootstrap_iters=BOOTSTRAP_ITERATIONS,
                log_samples=False,
            )
    if results is None:
        raise RuntimeError("lm-eval returned no results on this rank")
    return _scores(results, evaluation.tasks)


def _set_shots(task: Any, evaluation: EvaluationSettings) -> None:
    default = task.get_config("num_fewshot")
    # A task that fixes zero shots has a format that examples would break; lm-eval leaves it alone too.
    if default != 0 and (evaluation.n_shot is not None or default is None):
        task.set_config(key="num_fewshot", value=evaluation.n_shot or 0)
    task.set_fewshot_seed(seed=evaluation.seed)


def _scores(results: Mapping[str, Any], requested: tuple[str, ...]) -> dict[str, TaskScore]:
    rows = {
        name: score
        for name, row in results["results"].items()
        if (score := _score(row, results["higher_is_better"].get(name) or {})) is not None
    }
    scored_groups = {name for name in results["group_subtasks"] if name in rows and name in requested}
    inside = _descendants(scored_groups, results["group_subtasks"])
    groups = set(results["group_subtasks"])
    return {name: score for name, score in rows.items() if name in requested or (name not in inside and name not in groups)}


def _descendants(groups: set[str], children: Mapping[str, list[str]]) -> set[str]:
    found: set[str] = set()
    queue = list(groups)
    while queue:
        new = set(children.get(queue.pop(), ())) - found
        found |= new
        queue.extend(new)
    return found


def _score(row: Mapping[str, Any], higher_is_better: Mapping[str, bool | None]) -> TaskScore | None:
    metrics: dict[str, float] = {}
    stderr: dict[str, float | None] = {}
    for key, value in row.items():
        metric, comma, filter_name = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        name = metric if filter_name == "none" else key
        error = row.get(f"{metric}_stderr,{filter_name}")
        metrics[name] = float(value)
        stderr[name] = float(error) if isinstance(error, int | float) and math.isfinite(error) else None
    if not metrics:
        return None
    primary = min(metrics, key=_preference)  # the first of equals: lm-eval lists a task's main filter first
    direction = higher_is_better.get(primary.partition(",")[0])
    return TaskScore(
        metrics=metrics,
        stderr=stderr,
        primary=primary,
        higher_is_better=True if direction is None else direction,
        n_samples=int(row["sample_len"]),
    )


def _preference(name: str) -> int:
    metric = name.partition(",")[0]
    return PREFERRED_METRICS.index(metric) if metric in PREFERRED_METRICS else len(PREFERRED_METRICS)


def _seed_everything(seed: int) -> None:
    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


@contextmanager
def _quiet(level: int) -> Iterator[None]:
    """Hold the loggers of lm-eval and Hugging Face at ``level`` or above."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "transformers", "datasets")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(max(level, logger.level))
    try:
        yield
    finally:
        for logger, earlier in zip(loggers, before, strict=True):
            logger.setLevel(earlier)
