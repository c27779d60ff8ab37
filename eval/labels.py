"""Where to write the labels of a scatter chart so that they can be read.

A small greedy search over positions around each point, with a few rounds of second thoughts. It uses no random numbers:
the same chart is laid out the same way every time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

ROUNDS = 4
RADII = (1.0, 2.2, 4.0, 6.5, 9.5)
"""Distances between a point's edge and its label, in units of ``gap``."""
DIRECTIONS = (0, 45, 315, 90, 270, 180, 135, 225, 20, 340, 70, 290, 110, 250, 160, 200)
"""Degrees, best first: right of the point reads most naturally."""


class Box(NamedTuple):
    """An upright rectangle; y grows upwards."""

    left: float
    bottom: float
    right: float
    top: float

    def overlap(self, other: Box) -> float:
        """Area shared with another box."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.top, other.top) - max(self.bottom, other.bottom)
        return width * height if width > 0 and height > 0 else 0.0

    def outside(self, bounds: Box) -> float:
        """Area that lies beyond ``bounds``."""
        return (self.right - self.left) * (self.top - self.bottom) - self.overlap(bounds)


def place_labels(
    anchors: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    bounds: Box,
    obstacles: Sequence[Box],
    gap: float,
) -> list[Box]:
    """Choose a box for each label, near its anchor and over as little else as possible.

    anchors: the points' centres. sizes: (width, height) of the labels. obstacles: what labels should not cover, the
    points included. gap: distance between a point's centre and the nearest label. All in one unit, that of the boxes
    returned.
    """
    if not anchors:
        return []
    candidates = [_candidates(anchor, size, gap) for anchor, size in zip(anchors, sizes, strict=True)]
    boxes = np.array(candidates, dtype=np.float64)  # (n_labels, n_candidates, 4)
    fixed = [_fixed_costs(some, bounds, np.array(obstacles, dtype=np.float64).reshape(-1, 4)) for some in boxes]
    chosen = np.zeros(len(boxes), dtype=int)
    for _ in range(ROUNDS):
        before = chosen.copy()
        for index, some in enumerate(boxes):
            others = np.delete(np.arange(len(boxes)), index)
            shared = _overlaps(some, boxes[others, chosen[others]]).sum(1)
            chosen[index] = int(np.argmin(fixed[index] + 4 * shared))
        if (chosen == before).all():
            break
    return [some[choice] for some, choice in zip(candidates, chosen, strict=True)]


def _fixed_costs(boxes: np.ndarray, bounds: Box, obstacles: np.ndarray) -> np.ndarray:
    """What each position costs whatever the other labels do; a far one is worth a little overlap, not much."""
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    outside = area - _overlaps(boxes, np.array([bounds]))[:, 0]
    return 20 * outside + 3 * _overlaps(boxes, obstacles).sum(1) + 0.004 * area * np.arange(len(boxes))


def _overlaps(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(n, m) areas that n boxes share with m others."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    return np.clip(high - low, 0, None).prod(-1)


def _candidates(anchor: tuple[float, float], size: tuple[float, float], gap: float) -> list[Box]:
    width, height = size
    boxes = []
    for radius in RADII:
        for degrees in DIRECTIONS:
            cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
            # The box touches the circle with its nearest side or corner, whichever way it lies.
            x = anchor[0] + cosine * gap * radius + width / 2 * _sign(cosine)
            y = anchor[1] + sine * gap * radius + height / 2 * _sign(sine)
            boxes.append(Box(x - width / 2, y - height / 2, x + width / 2, y + height / 2))
    return boxes


def _sign(value: float) -> float:
    return 0.0 if abs(value) < 1e-9 else math.copysign(1.0, value)
