"""What a model answered to each document of a task: the part of lm-eval's samples that comparisons need."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from compress.eval.files import write_whole


class Document(NamedTuple):
    """index: place in the task. prompt: all of it; of a multiple choice, what all choices have in common. choices: as the task
    has them. gold, answer: the right one and the model's own, in words. outcome: the primary metric of this document.
    weight: its weight in the metric. confidence: probability (0..1) that the model gives its likeliest choice, likelihoods
    of all choices adding up to 1 and none divided by a length; None without choices. likeliest_is_right: whether that choice
    is the right one."""

    index: int
    prompt: str
    choices: tuple[str, ...]
    gold: str
    answer: str
    outcome: float
    weight: float = 1.0
    confidence: float | None = None
    likeliest_is_right: bool | None = None

    @property
    def bare(self) -> Document:
        """Without prompt and choices: all that a later comparison needs of the base's answer."""
        return self._replace(prompt="", choices=())


def documents(task: Any, samples: Sequence[Mapping[str, Any]], primary: str) -> list[Document]:
    """The documents of a task in order, from the samples that lm-eval logs.

    task: lm-eval's own object. primary: the metric, with its filter after a comma where it is not "none". Empty for a metric
    that is no mean over documents, such as an F1 score.
    """
    metric, _, chosen_filter = primary.partition(",")
    found = []
    for sample in samples:
        if sample["filter"] != (chosen_filter or "none") or metric not in sample:
            continue
        value = _outcome(metric, sample[metric])
        if value is None:
            return []
        is_choice = task.OUTPUT_TYPE == "multiple_choice" and getattr(task, "doc_to_choice", None) is not None
        make = _chosen if is_choice else _written
        found.append(make(task, sample, metric)._replace(index=int(sample["doc_id"]), outcome=value[0], weight=value[1]))
    return found


def together(parts: Sequence[Sequence[Document]], score: float) -> list[Document]:
    """The documents of a group of tasks, numbered on, weighted so that their mean is the group's score: all alike, or all
    tasks alike. Empty where the score is neither."""
    for equal_tasks in (False, True):
        joined = [
            document._replace(weight=document.weight / len(part) if equal_tasks else document.weight)
            for part in parts for document in part
        ]  # fmt: skip
        if is_mean(joined, score):
            return [document._replace(index=index) for index, document in enumerate(joined)]
    return []


def is_mean(found: Sequence[Document], score: float) -> bool:
    """Whether the weighted mean of the outcomes is the score."""
    total = math.fsum(document.weight for document in found)
    summed = math.fsum(document.outcome * document.weight for document in found)
    return total > 0 and math.isclose(summed / total, score, rel_tol=1e-9, abs_tol=1e-12)


def save(path: Path, found: Mapping[str, Sequence[Document]]) -> Path:
    """Keep what comparisons need, one line a task; :func:`load` reads it back."""
    lines = [json.dumps([name, [document.bare for document in own]], ensure_ascii=False) for name, own in found.items()]
    return write_whole(path, "".join(f"{line}\n" for line in lines))


def load(path: Path) -> dict[str, list[Document]]:
    """What :func:`save` wrote. Raises OSError or ValueError where it is not there or not whole."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    try:
        return {name: [Document(*fields)._replace(choices=()) for fields in own] for name, own in rows}
    except TypeError as error:
        raise ValueError(f"{path}: {error}") from None


def _outcome(metric: str, value: Any) -> tuple[float, float] | None:
    """A document's metric and its weight in the mean; None for a part of something that is no mean."""
    if isinstance(value, bool | int | float | np.number):
        return float(value), 1.0
    if metric == "bits_per_byte" and isinstance(value, tuple | list):
        log_likelihood, n_bytes = value
        return -log_likelihood / (n_bytes * math.log(2)), float(n_bytes)
    return None


def _chosen(task: Any, sample: Mapping[str, Any], metric: str) -> Document:
    document = sample["doc"]
    choices = [str(choice) for choice in task.doc_to_choice(document)]
    # Mutual information asks for every choice a second time, without the context.
    likelihoods = np.array([answer[0] for answer in sample["filtered_resps"][: len(choices)]], dtype=np.float64)
    lengths = {"acc_norm": [len(choice) for choice in choices], "acc_bytes": [len(choice.encode()) for choice in choices]}
    answer = int(np.argmax(likelihoods / np.maximum(lengths.get(metric, [1]), 1)))
    gold = task.doc_to_text(document) if getattr(task, "multiple_input", False) else sample["target"]
    right = [choices.index(one) if one in choices else one for one in (gold if isinstance(gold, list) else [gold])]
    likeliest = int(np.argmax(likelihoods))
    probabilities = np.exp(likelihoods - likelihoods[likeliest])
    contexts = {arguments[0] for arguments in sample["arguments"][: len(choices)]}
    return Document(
        index=0, prompt=str(sample["arguments"][0][0 if len(contexts) == 1 else 1]), choices=tuple(choices),
        gold=" | ".join(choices[one] for one in right if isinstance(one, int) and 0 <= one < len(choices)),
        answer=choices[answer], outcome=0.0, confidence=float(1 / probabilities.sum()), likeliest_is_right=likeliest in right,
    )  # fmt: skip


def _written(task: Any, sample: Mapping[str, Any], metric: str) -> Document:
    answer = sample["filtered_resps"][0]
    arguments, target = sample["arguments"][0], sample["target"]
    if task.OUTPUT_TYPE == "loglikelihood":  # all that is known of the model's own words is whether they are the right ones
        answer = target if answer[1] else ""
    is_prompted = task.OUTPUT_TYPE in ("loglikelihood", "generate_until")
    return Document(
        index=0, prompt=str(arguments[0]) if is_prompted else "", choices=(), gold=str(target) if is_prompted else "",
        answer=str(answer) if is_prompted else "", outcome=0.0,
    )  # fmt: skip
