"""Flips: documents that one of two models answers right and the other wrong (Echterhoff et al., MUSCLE, 2407.09435).

Two models of equal accuracy may answer quite different questions right; what users notice is the negative flips, the
questions that went well before. The change of accuracy is the share of positive flips minus that of negative ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

from compress.eval.documents import Document

N_EXAMPLES = 12
PROMPT_CHARACTERS = 600


class FlipExample(BaseModel):
    """A document that flipped. index: its place in the task. prompt: the end of it, at most 600 characters. choices: of a
    multiple choice, else none. before, after: the base's answer and this model's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    index: int
    kind: Literal["negative", "positive"]
    prompt: str
    choices: tuple[str, ...] = ()
    gold: str
    before: str
    after: str


class Flips(BaseModel):
    """Answers of a model beside its base's. n: documents. negative: those the base had right and this model has wrong;
    positive: the other way round. p_value: of McNemar's exact test that both kinds are equally likely. examples: the
    first 12 of each kind."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    n: int
    negative: int
    positive: int
    p_value: float
    examples: tuple[FlipExample, ...] = ()


def mcnemar(negative: int, positive: int) -> float:
    """The exact two-sided p-value (0..1] of so uneven a split of flips, were both kinds equally likely; 1 without flips."""
    n, term, tail = negative + positive, 1, 0
    for k in range(min(negative, positive) + 1):
        tail += term  # C(n, k), in whole numbers: thousands of flips overflow no float
        term = term * (n - k) // (k + 1)
    return min(1.0, 2 * tail / 2**n)


def count_flips(before: Sequence[float], after: Sequence[float]) -> Flips | None:
    """Compare two models' outcomes, document by document; None where any is neither right (1) nor wrong (0), or there is none."""
    pairs = list(zip(before, after, strict=True))
    if not pairs or any(outcome not in (0.0, 1.0) for pair in pairs for outcome in pair):
        return None
    negative, positive = (sum(pair == kind for pair in pairs) for kind in ((1.0, 0.0), (0.0, 1.0)))
    return Flips(n=len(pairs), negative=negative, positive=positive, p_value=mcnemar(negative, positive))


def flips(before: Sequence[Document], after: Sequence[Document], n_examples: int = N_EXAMPLES) -> Flips | None:
    """Compare two models' answers to the same documents, in the same order.

    n_examples: of each kind, the first. None where an outcome is neither right (1) nor wrong (0). Raises ValueError
    where the documents are not the same ones.
    """
    if [(one.index, one.gold) for one in before] != [(other.index, other.gold) for other in after]:
        raise ValueError("the two models answered different documents")
    counted = count_flips([document.outcome for document in before], [document.outcome for document in after])
    if counted is None:
        return None
    pairs = list(zip(before, after, strict=True))
    negative = [pair for pair in pairs if pair[0].outcome > pair[1].outcome]
    positive = [pair for pair in pairs if pair[0].outcome < pair[1].outcome]
    examples = [_example("negative", *pair) for pair in negative[:n_examples]]
    examples += [_example("positive", *pair) for pair in positive[:n_examples]]
    return counted.model_copy(update={"examples": tuple(examples)})


def _example(kind: Literal["negative", "positive"], before: Document, after: Document) -> FlipExample:
    return FlipExample(
        index=after.index, kind=kind, prompt=after.prompt[-PROMPT_CHARACTERS:], choices=after.choices, gold=after.gold,
        before=before.answer, after=after.answer,
    )  # fmt: skip
