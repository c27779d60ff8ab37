"""The one place that talks to lm-eval, so that numbers here are the numbers lm-eval prints.

The model is handed over already loaded: a compressed artifact may need its own loader, and the pipeline evaluates
models that it holds in memory anyway. Indexing lm-eval's built-in tasks takes many seconds, so they are only looked at
when a requested task is not among the local ones, and the resulting index can be passed on from one evaluation to the
next. lm-eval's own seeds are kept unless others are asked for, so that a plain ``lm_eval --model hf`` prints the same scores;
standard errors of perplexities, which lm-eval estimates by resampling 100,000 times, come from 1,000 here.
"""

from __future__ import annotations

import logging
import math
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from pydantic import BaseModel, ConfigDict, model_validator

from compress.eval.documents import Document, documents, is_mean, together
from compress.eval.local_data import local_data
from compress.eval.streamed import StreamedModel

if TYPE_CHECKING:
    import torch
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager
    from torch import nn

PREFERRED_METRICS = (
    *("acc_norm", "acc", "exact_match", "f1", "mcc", "pass@1", "bleu", "rouge1"),
    *("bits_per_byte", "byte_perplexity", "word_perplexity", "perplexity"),
)
BOOTSTRAP_ITERATIONS = 1000
OWN_SEEDS = (0, 1234, 1234, 1234)  # lm-eval's defaults, of: Python, numpy, torch, the choice of examples


class EvaluationSettings(Protocol):
    """What the harness reads of ``compress.recipe.Evaluation``.

    tasks: names of tasks, groups or tags, or patterns such as ``mmlu_*``. limit: documents per task (None: all). include:
    directories of task YAMLs, or such files, whose directory is then searched. batch_size: or "auto", the largest that
    fits. n_shot: examples in the prompt (None: what each task says). task_seed: None for lm-eval's own. task_data: a
    directory of data sets for tasks that would fetch theirs from the hub (:mod:`compress.eval.local_data`). log_samples:
    whether to hand out all that lm-eval logs of each document.
    """

    @property
    def tasks(self) -> tuple[str, ...]: ...
    @property
    def limit(self) -> int | None: ...
    @property
    def include(self) -> tuple[str, ...]: ...
    @property
    def batch_size(self) -> int | str: ...
    @property
    def n_shot(self) -> int | None: ...
    @property
    def task_seed(self) -> int | None: ...
    @property
    def task_data(self) -> str | None: ...
    @property
    def log_samples(self) -> bool: ...


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

    @model_validator(mode="after")
    def _has_its_primary(self) -> TaskScore:
        if self.primary not in self.metrics:
            raise ValueError(f"the primary metric {self.primary!r} is none of {', '.join(self.metrics) or 'no metrics'}")
        return self

    @property
    def value(self) -> float:
        """The primary metric."""
        return self.metrics[self.primary]

    @property
    def standard_error(self) -> float | None:
        """Of the primary metric; None where unknown."""
        return self.stderr.get(self.primary)


class Answers(NamedTuple):
    """What a model made of the tasks. documents: in order, of each score that is a mean over documents. samples: what lm-eval
    logs, by task, where it was asked for. lm: lm-eval's view of the model, for more questions."""

    scores: dict[str, TaskScore]
    documents: dict[str, list[Document]]
    samples: dict[str, list[dict[str, Any]]]
    lm: LM


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
    patterns = [name for name in evaluation.tasks if _is_pattern(name)]
    with _quiet(logging.ERROR):
        manager = TaskManager(include_path=directories, include_defaults=False)
        if patterns or not set(evaluation.tasks) <= set(manager.all_tasks):
            manager = TaskManager(include_path=directories, include_defaults=True)
    for name in evaluation.tasks:
        if name not in manager.all_tasks and not (name in patterns and manager.match_tasks([name])):
            nearest = get_close_matches(name, manager.all_tasks, n=3)
            hint = f"; did you mean {' or '.join(nearest)}?" if nearest else ""
            raise ValueError(f"unknown task {name!r}{hint}")
    return manager


def check_data(evaluation: EvaluationSettings, manager: TaskManager) -> None:
    """Open the local data of every task, before any compute; nothing to do where tasks read their own.

    Raises ValueError where there is no such directory, or a task's data are not in it.
    """
    if evaluation.task_data is not None:
        if not Path(evaluation.task_data).is_dir():
            raise ValueError(f"no such directory: {evaluation.task_data}")
        _load(evaluation, manager)


def evaluate(
    model: nn.Module | StreamedModel,
    tokenizer: Any,
    evaluation: EvaluationSettings,
    *,
    device: str | torch.device,
    max_length: int | None = None,
    task_manager: TaskManager | None = None,
) -> Answers:
    """Score a loaded causal language model on lm-eval tasks.

    max_length: tokens of context (None: the model's own limit). task_manager: from :func:`check_tasks`, to save a
    second indexing. A group gives one score where it defines an aggregate, else one for each of its tasks; a tag always
    the latter. Raises ValueError as :func:`check_tasks` does, for missing local data, and for tasks that have a streamed
    model write text. Nothing is written to stdout.
    """
    from lm_eval import evaluator

    manager = task_manager or check_tasks(evaluation)
    # lm-eval and its metrics print; stdout belongs to the caller, who may be writing JSON there.
    with redirect_stdout(sys.stderr):
        _seed_everything(evaluation.task_seed)
        lm = language_model(model, tokenizer, evaluation.batch_size, device, max_length)
        loaded = _load(evaluation, manager)
        if isinstance(model, StreamedModel):
            _refuse_writing(loaded["tasks"])
        with _quiet(logging.WARNING):
            # `simple_evaluate` does the same, but first shells out for the git commit and the whole environment.
            results: Any = evaluator.evaluate(
                lm=lm,
                task_dict=loaded,
                limit=evaluation.limit,
                bootstrap_iters=BOOTSTRAP_ITERATIONS,
                log_samples=True,
            )
    if results is None:
        raise RuntimeError("lm-eval returned no results on this rank")
    scores = _scores(results, _requested(evaluation.tasks, manager))
    samples = results["samples"] if evaluation.log_samples else {}
    return Answers(scores, _documents(results, scores, loaded["tasks"]), samples, lm)


def language_model(
    model: nn.Module | StreamedModel, tokenizer: Any, batch_size: int | str, device: str | torch.device, max_length: int | None
) -> LM:
    """lm-eval's view of a model: ``--model hf`` around one that is loaded, or one that goes block by block."""
    with _quiet(logging.ERROR):  # a preloaded model and defaulted metrics are warned about, and both are meant
        if isinstance(model, StreamedModel):
            from compress.eval.streamed_lm import StreamedLM

            stream: Any = StreamedLM
            return stream(model, tokenizer, max_length)
        from lm_eval.models.huggingface import HFLM

        wrap: Any = HFLM
        return wrap(pretrained=model.to(device), tokenizer=tokenizer, batch_size=batch_size, max_length=max_length)


def _load(evaluation: EvaluationSettings, manager: TaskManager) -> Any:
    """The requested tasks, with their data, ready to run."""
    names = _requested(evaluation.tasks, manager)
    with _quiet(logging.ERROR), redirect_stdout(sys.stderr), local_data(evaluation.task_data):
        try:
            loaded = manager.load(list(names))
        except (OSError, ValueError):  # these say what is wrong
            raise
        except Exception as error:  # of templates, of libraries that read data: an empty file is a bare StopIteration
            told = f"{type(error).__name__}: {error}".removesuffix(": ")
            raise ValueError(f"{', '.join(names)}: a task or its data cannot be read, or are empty ({told})") from error
    with _quiet(logging.WARNING):
        for name, task in loaded["tasks"].items():
            _set_shots(task, evaluation)
            wanted, sampler = task.get_config("num_fewshot"), getattr(task, "sampler", None)
            if evaluation.task_data is not None and wanted and sampler is not None and not len(sampler.df):
                split = task.config.fewshot_split or task.config.training_split
                raise ValueError(f"the task {name} puts {wanted} examples into the prompt, but its split {split!r} is not there")
    return loaded


def _refuse_writing(tasks: Mapping[str, Any]) -> None:
    writing = [name for name, task in tasks.items() if str(task.OUTPUT_TYPE).startswith(("generate", "multiple_turn"))]
    if writing:
        raise ValueError(
            f"{', '.join(writing)}: the model would write text, and reading it block by block takes a pass over its files for "
            "every token; choose tasks that score given texts, or evaluate where the model fits into memory"
        )


def _is_pattern(name: str) -> bool:
    return any(sign in name for sign in "*?[")


def _requested(tasks: Sequence[str], manager: TaskManager) -> tuple[str, ...]:
    """Names, patterns resolved. Only tasks match patterns: groups would have theirs run twice."""
    names = [
        match
        for name in tasks
        for match in (sorted(set(manager.match_tasks([name])) & set(manager.all_subtasks)) if _is_pattern(name) else [name])
    ]
    return tuple(dict.fromkeys(names))


def _set_shots(task: Any, evaluation: EvaluationSettings) -> None:
    default = task.get_config("num_fewshot")
    # A task that fixes zero shots has a format that examples would break; lm-eval leaves it alone too.
    if default != 0 and (evaluation.n_shot is not None or default is None):
        task.set_config(key="num_fewshot", value=evaluation.n_shot or 0)
    seed = evaluation.task_seed
    task.set_fewshot_seed(seed=OWN_SEEDS[3] if seed is None else seed)


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


def _documents(
    results: Mapping[str, Any], scores: Mapping[str, TaskScore], tasks: Mapping[str, Any]
) -> dict[str, list[Document]]:
    """Documents of every score that is their mean; those of a group follow each other task by task."""
    children, found = results["group_subtasks"], {}
    for name, score in scores.items():
        if name in tasks:
            own = documents(tasks[name], results["samples"][name], score.primary)
            own = own if is_mean(own, score.value) else []
        else:
            leaves = [leaf for leaf in tasks if leaf in _descendants({name}, children)]
            parts = [documents(tasks[leaf], results["samples"][leaf], score.primary) for leaf in leaves]
            own = together(parts, score.value)
        if own:
            found[name] = own
    return found


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


def _seed_everything(seed: int | None) -> None:
    import numpy
    import torch

    of_python, of_numpy, of_torch, _ = OWN_SEEDS if seed is None else (seed,) * 4
    random.seed(of_python)
    numpy.random.seed(of_numpy)
    torch.manual_seed(of_torch)


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
