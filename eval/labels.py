"""Where to write the labels of a scatter chart so that they can be read.

A small greedy search over positions around each point, with a few rounds of second thoughts. It uses no random numbers:
the same chart is laid out the same way every time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

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
    candidates = [_candidates(anchor, size, gap) for anchor, size in zip(anchors, sizes, strict=True)]
    fixed = []
    for boxes in candidates:
        near = [obstacle for obstacle in obstacles if obstacle.overlap(_hull(boxes))]
        fixed.append([_fixed_cost(box, rank, bounds, near) for rank, box in enumerate(boxes)])
    chosen = [boxes[0] for boxes in candidates]
    for _ in range(ROUNDS):
        before = list(chosen)
        for index, boxes in enumerate(candidates):
            others = [box for other, box in enumerate(chosen) if other != index]
            costs = [cost + 4 * sum(map(box.overlap, others)) for box, cost in zip(boxes, fixed[index], strict=True)]
            chosen[index] = boxes[costs.index(min(costs))]
        if chosen == before:
            break
    return chosen


def _fixed_cost(box: Box, rank: int, bounds: Box, obstacles: Sequence[Box]) -> float:
    """What a position costs whatever the other labels do; a far one is worth a little overlap, not much."""
    area = (box.right - box.left) * (box.top - box.bottom)
    return 20 * box.outside(bounds) + 3 * sum(map(box.overlap, obstacles)) + 0.004 * area * rank


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


def _hull(boxes: Sequence[Box]) -> Box:
    left, bottom, right, top = zip(*boxes, strict=True)
    return Box(min(left), min(bottom), max(right), max(top))


def _sign(value: float) -> float:
    return 0.0 if abs(value) < 1e-9 else math.copysign(1.0, value)
