"""How sure a difference is, and how sure a model is of itself: paired bootstrap intervals and calibration error.

Two models answer the same documents, so their difference is measured document by document: what makes a document hard
for both cancels, and far smaller differences show than two separate standard errors would admit.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict

from compress.eval.flips import mcnemar

RESAMPLES = 2_000
_CELLS = 1 << 20  # drawn at a time
LEVEL = 0.95
FEWEST = 6  # with fewer unequal documents, even all of them on one side are no rare event: 2 / 2**5 > 0.05
N_BINS = 15


class Difference(BaseModel):
    """This model's primary metric minus the base's, over the same documents.

    low, high: 95 % paired bootstrap interval. differs: whether the interval leaves out 0 and the documents are enough to
    say so: at least six on which the models differ and, where answers are right or wrong, McNemar's exact p below 0.05.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    mean: float
    low: float
    high: float
    differs: bool


def paired_difference(
    new: Sequence[float], old: Sequence[float], weights: Sequence[float] | None = None, *, seed: int = 0
) -> Difference:
    """Compare two models' outcomes, document by document.

    new, old: one number a document, in the same order. weights: of the documents in the metric (None: equal ones). The
    documents are drawn 2,000 times with replacement; equal seeds give equal intervals. Raises ValueError where the
    lengths differ, there is nothing to compare, or an outcome is infinite or not a number.
    """
    weight = np.ones(len(new)) if weights is None else np.asarray(weights, dtype=np.float64)
    if not len(new) == len(old) == len(weight) or not len(new):
        raise ValueError(f"{len(new)}, {len(old)} and {len(weight)} numbers cannot be compared one by one")
    gaps = np.asarray(new, dtype=np.float64) - np.asarray(old, dtype=np.float64)
    if not np.isfinite(gaps).all():
        raise ValueError("outcomes that are no finite numbers cannot be compared")
    draws = np.random.default_rng(seed)
    rows = max(1, _CELLS // len(gaps))
    means: list[np.ndarray] = []
    for start in range(0, RESAMPLES, rows):
        drawn = draws.integers(len(gaps), size=(min(rows, RESAMPLES - start), len(gaps)))
        means.append((gaps * weight)[drawn].sum(1) / weight[drawn].sum(1))
    low, high = np.quantile(np.concatenate(means), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    excludes_zero = low > 0 or high < 0
    return Difference(
        mean=float(gaps @ weight / weight.sum()), low=float(low), high=float(high),
        differs=bool(excludes_zero and np.count_nonzero(gaps) >= FEWEST and _exact_test_agrees(gaps)),
    )  # fmt: skip


def _exact_test_agrees(gaps: np.ndarray) -> bool:
    if not np.isin(gaps, (-1.0, 0.0, 1.0)).all():
        return True
    return mcnemar(int((gaps < 0).sum()), int((gaps > 0).sum())) < 1 - LEVEL


def calibration_error(confidences: Sequence[float], right: Sequence[bool], n_bins: int = N_BINS) -> float:
    """The expected calibration error: how far confidence and accuracy lie apart, over bins of equal width (0..1).

    confidences: the probability that a model gives its own answer, each in [0, 1]. right: whether the answer was.
    Raises ValueError where the lengths differ or there is nothing to compare.
    """
    if len(confidences) != len(right) or not len(right):
        raise ValueError(f"{len(confidences)} confidences do not go with {len(right)} answers")
    confidence, correct = np.asarray(confidences, dtype=np.float64), np.asarray(right, dtype=np.float64)
    bins = np.minimum((confidence * n_bins).astype(int), n_bins - 1)
    gaps = np.bincount(bins, correct - confidence, n_bins)  # of a bin: its size times (accuracy - mean confidence)
    return float(np.abs(gaps).sum() / len(correct))
