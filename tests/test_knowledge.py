"""Bits of the invented people: all of them for an oracle, none for a guesser, half for one who halves the choice."""

from __future__ import annotations

import math

import pytest

from compress.demo import world
from compress.demo.measure import knowledge_bits


class Oracle:
    """Gives every true value the same probability."""

    def __init__(self, probability: float):
        self.probability = probability

    def loglikelihood(self, requests, disable_tqdm=False):
        return [(math.log(self.probability), True)] * len(requests)


ALL = world.N_PEOPLE * sum(math.log2(len(pool)) for pool in world.POOLS.values())


def test_known_cases() -> None:
    assert knowledge_bits(Oracle(1.0)) == pytest.approx(ALL)
    assert knowledge_bits(Oracle(1.0), 6) == pytest.approx(ALL)  # a few questions stand for all
    assert knowledge_bits(Oracle(0.5)) == pytest.approx(ALL - world.N_PEOPLE * len(world.POOLS))
    assert knowledge_bits(Oracle(1e-9)) == 0
