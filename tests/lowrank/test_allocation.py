"""Ranks from one budget: never exceeded, met to a rank, and as good as any other choice."""

from itertools import product
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from compress.budget import fill
from compress.lowrank.allocation import (
    RULES,
    Layer,
    by_energy,
    by_loss,
    by_sensitivity,
    by_threshold,
    by_type,
    least_loss,
    least_size,
    probed_ranks,
    ranks_that_save,
)
from compress.lowrank.svd import SVD
from compress.weights import Dense


class Case(NamedTuple):
    layers: list[Layer]
    ratio: float
    round_to: int

    @property
    def budget(self) -> int:
        return int(self.ratio * sum(layer.size for layer in self.layers))


def cost(layer: Layer, rank: int | None) -> int:
    return layer.size if rank is None else rank * sum(layer.shape)


def loss(layer: Layer, rank: int | None) -> float:
    return 0.0 if rank is None else float(layer.tails[rank])


def layer_of(shape: tuple[int, int], decay: float, kind: str = "", round_to: int = 1, seed: int = 0) -> Layer:
    draw = np.random.default_rng(seed)
    spectrum = np.sort(draw.random(min(shape)) * np.exp(-decay * np.arange(min(shape))))[::-1].copy()
    ranks = probed_ranks(*shape, round_to)
    layer = Layer(shape, spectrum, kind, ranks)
    return layer._replace(effects=[float(layer.tails[rank] * (1 + draw.random() / 10)) for rank in ranks])


@st.composite
def cases(draw, most: int = 40):
    round_to = draw(st.sampled_from([1, 1, 4, 8]))
    size, decay = st.integers(1, most), st.floats(0, 0.5)
    layers = [
        layer_of((draw(size), draw(size)), draw(decay), draw(st.sampled_from("ab")), round_to, seed)
        for seed in range(draw(st.integers(1, 8)))
    ]
    return Case(layers, draw(st.floats(0.05, 1)), round_to)


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=80, deadline=None)
@given(case=cases())
def test_the_budget_is_met_to_one_rank_and_never_exceeded(rule, case):
    layers, round_to = case.layers, case.round_to
    assume(sum(least_size(layer.shape, round_to) for layer in layers) <= case.budget)
    found = RULES[rule](layers, case.budget, round_to)
    left = case.budget - sum(cost(layer, rank) for layer, rank in zip(layers, found, strict=True))
    assert left >= 0
    for layer, rank in zip(layers, found, strict=True):
        ranks = ranks_that_save(*layer.shape, round_to)
        assert rank is None or rank in ranks
        larger = [other for other in ranks if rank is not None and other > rank]
        if rank is None or (rule == "threshold" and (not larger or larger[0] > min(layer.shape) // 2)):
            continue  # whole, or as large as it may be
        if rule == "sensitivity" and not larger:
            continue
        assert not larger or larger[0] * sum(layer.shape) - cost(layer, rank) > left, "another rank would have fitted"


@pytest.mark.parametrize("rule", RULES)
def test_a_budget_below_the_least_ranks_is_refused(rule):
    with pytest.raises(ValueError, match="budget"):
        RULES[rule]([layer_of((20, 30), 0.1)], 49, 1)


@pytest.mark.parametrize("rule", RULES)
def test_nothing_is_factored_where_all_may_stay(rule):
    layers = [layer_of((20, 30), 0.1, seed=seed) for seed in range(3)]
    assert RULES[rule](layers, 1800, 1) == [None] * 3


@given(cases())
def test_scale_does_not_matter(case):
    assume(sum(least_size(layer.shape, case.round_to) for layer in case.layers) <= case.budget)
    larger = [layer._replace(spectrum=layer.spectrum * 1024.0) for layer in case.layers]
    for rule in (by_energy, by_loss):
        assert rule(case.layers, case.budget, case.round_to) == rule(larger, case.budget, case.round_to)


@settings(max_examples=60, deadline=None)
@given(cases(most=9))
def test_least_loss_is_near_what_trying_everything_finds(case):
    layers = case.layers[:3]
    budget = int(case.ratio * sum(layer.size for layer in layers))
    assume(sum(least_size(layer.shape) for layer in layers) <= budget)
    choices = [[*ranks_that_save(*layer.shape), None] for layer in layers]
    best = min(
        sum(map(loss, layers, ranks)) for ranks in product(*choices) if sum(map(cost, layers, ranks)) <= budget
    )  # fmt: skip
    found = least_loss([layer.shape for layer in layers], [layer.tails for layer in layers], budget)
    one_rank = max(
        (loss(layer, rank) - loss(layer, rank + 1) for layer, rank in zip(layers, found, strict=True) if rank), default=0
    )
    assert sum(map(loss, layers, found)) <= best + one_rank + 0.35 * (best + 1e-12)


def test_least_loss_without_wholes_is_one_price_for_all():
    layers = [layer_of((200, 300), decay, seed=seed) for seed, decay in enumerate((0.02, 0.05, 0.2))]
    found = by_loss([layer._replace(ranks=()) for layer in layers], 20_000)
    assert None not in found
    taken = [layer.spectrum[rank - 1] / layer.spectrum.sum() for layer, rank in zip(layers, found, strict=True)]
    left = [layer.spectrum[rank] / layer.spectrum.sum() for layer, rank in zip(layers, found, strict=True)]
    assert min(taken) >= max(left), "no rank that was left out is worth more than one that was taken"


def test_a_layer_that_pays_stays_whole_and_is_counted_so():
    flat, steep = layer_of((32, 32), 0.0), layer_of((32, 32), 2.0)
    found = by_loss([flat._replace(ranks=()), steep._replace(ranks=())], 1024 + 256)
    assert found == [None, 4]


def test_energy_keeps_one_share():
    layers = [layer_of((200, 300), decay, seed=seed) for seed, decay in enumerate((0.02, 0.05, 0.2))]
    kept = [1 - loss(layer, rank) for layer, rank in zip(layers, by_energy(layers, 40_000), strict=True)]
    assert max(kept) - min(kept) < 0.05


def test_loss_weighs_layers_by_what_was_measured():
    first, second = (layer_of((100, 100), 0.05)._replace(ranks=[20], effects=[effect]) for effect in (1.0, 0.01))
    ranks = by_loss([first, second], 8_000)
    assert cost(first, ranks[0]) > 2 * cost(second, ranks[1])


def test_sensitivity_follows_measurements_that_are_not_convex():
    layer = Layer((40, 40), np.array([]), "", [1, 5, 10, 19], [1.0, 0.9, 0.95, 0.01])
    other = layer._replace(effects=[0.5, 0.1, 0.09, 0.08])
    ranks = by_sensitivity([layer, other], 2000)
    assert ranks[0] is None and ranks[1] is not None and ranks[1] >= 4


def test_types_share_alike_and_more_is_left_where_more_would_be_lost():
    layers = [layer_of((120, 120), decay, kind, seed=seed) for seed, (decay, kind) in enumerate(product((0.0, 0.1, 0.3), "ab"))]
    found = by_type(layers, int(0.5 * sum(layer.size for layer in layers)))
    for kind in "ab":
        kept = [cost(layer, rank) for layer, rank in zip(layers, found, strict=True) if layer.type == kind]
        assert kept == sorted(kept, reverse=True) and kept[0] > kept[-1]
        assert sum(kept) == pytest.approx(0.5 * 3 * 120 * 120, rel=0.03)


@pytest.mark.parametrize("logarithms, counted", [((5, 8), (5, 8)), ((-1, 2), (3, 6))])
def test_the_share_removed_goes_as_the_inverse_logarithm_of_the_loss(logarithms, counted):
    """In the loss's own unit, unless that is so large that logarithms are near zero, or negative."""
    shape, ratio = (400, 400), 0.6
    flat = [np.full(400, np.exp(2 * logarithm) / (400 - int(ratio * 200))) for logarithm in logarithms]
    layers = [Layer(shape, spectrum, "q_proj") for spectrum in flat]
    found = by_type(layers, int(ratio * 2 * 400 * 400))
    removed = [1 - cost(layer, rank) / layer.size for layer, rank in zip(layers, found, strict=True)]
    assert removed[0] / removed[1] == pytest.approx(counted[1] / counted[0], rel=0.03)
    assert sum(removed) == pytest.approx(0.8, abs=0.01)


def test_one_threshold_and_non_low_rank_components_stay_whole():
    steep, flat = layer_of((60, 100), 0.4), layer_of((60, 100), 0.0, seed=1)
    shares = []
    for budget in (3_000, 8_000, 11_500):
        ranks = by_threshold([steep, flat], budget)
        shares.append([cost(layer, rank) for layer, rank in zip((steep, flat), ranks, strict=True)])
        assert all(rank is None or rank <= 30 for rank in ranks)
        normalised = [np.sqrt(layer.spectrum) for layer in (steep, flat)]
        normalised = [(values - values[-1]) / (values[0] - values[-1]) for values in normalised]
        if None not in ranks and max(ranks) < 30:
            assert min(v[r - 1] for v, r in zip(normalised, ranks, strict=True)) >= max(
                v[r] for v, r in zip(normalised, ranks, strict=True)
            )  # fmt: skip
    assert shares == sorted(shares) and [own[1] for own in shares] == sorted(own[1] for own in shares)
    assert by_threshold([steep, flat], 9_000)[1] is None


def test_parts_are_handed_out_in_order():
    costs = [np.array([1, 1, 1]), np.array([2, 2]), np.array([1, 9, 1])]
    priorities = [np.array([9, 5, 1]), np.array([9, 4]), np.array([9, 8, 8])]
    assert fill(costs, priorities, 4) == [1, 1, 1]
    assert fill(costs, priorities, 5) == [2, 1, 1]  # the part of cost 9 ends its unit
    assert fill(costs, priorities, 8) == [3, 2, 1]
    assert fill(costs, priorities, 17) == [2, 2, 3]
    assert fill([], [], 0) == []
    with pytest.raises(ValueError, match="budget"):
        fill(costs, priorities, 3)


def test_a_plan_says_whether_the_budget_can_be_met():
    weights = [Dense(torch.empty(24, 40, device="meta"))] * 3
    SVD(ratio=0.1, ranks="energy").check_budget(weights)
    with pytest.raises(ValueError, match="least ranks"):
        SVD(ratio=0.05, ranks="energy").check_budget(weights)
    assert SVD(ratio=1.0, ranks="energy").surveys is None
    with pytest.raises(ValidationError, match="leave ranks=loss out"):
        SVD(rank=3, ranks="loss")
