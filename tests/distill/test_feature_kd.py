"""Layer maps, projections where widths differ, and distances that vanish for equal states."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from compress.distill.feature_kd import FeatureKD
from compress.distill.features import cosine_distance, layer_map, linear_maps, relative_error
from compress.distill.losses import forward_kl


def test_layer_maps_are_even_and_end_at_the_end():
    assert layer_map(5, 5) == [(1, 1), (2, 2), (3, 3), (4, 4)]
    assert layer_map(4, 7) == [(1, 2), (2, 4), (3, 6)]
    for n_student in range(2, 12):
        pairs = layer_map(n_student, 12)
        assert pairs[-1] == (n_student - 1, 11) and all(a[1] < b[1] for a, b in pairwise(pairs))


def test_distances_are_zero_for_equal_states_and_know_their_scale():
    states, others = (torch.randn(50, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert relative_error(states, states) == 0 and cosine_distance(states, states) == 0
    torch.testing.assert_close(relative_error(9 * others, 9 * states), relative_error(others, states))
    torch.testing.assert_close(cosine_distance(states, others), 1 - F.cosine_similarity(states, others).mean())
    assert cosine_distance(states, 3 * states) < 1e-6


@pytest.mark.parametrize("distance", ["mse", "cosine"])
def test_the_loss_of_the_teacher_itself_is_zero(distance, batch, make_signal):
    signal, step = make_signal(1, n_states=4), FeatureKD(distance=distance)
    assert step.loss(signal, signal, batch) == 0
    assert step.loss(make_signal(2, n_states=4), signal, batch) > 0


def test_the_loss_is_a_weighted_sum_over_mapped_layers(batch, make_signal):
    student, teacher = make_signal(1, n_states=3), make_signal(2, n_states=5)
    found = FeatureKD(features=2.0, logits=0.5).loss(student, teacher, batch)
    states = relative_error(student.states[1], teacher.states[2]) + relative_error(student.states[2], teacher.states[4])
    logits = forward_kl(student.head(student.hidden), teacher.head(teacher.hidden)).mean()
    torch.testing.assert_close(found, states + 0.5 * logits)


def test_maps_are_learned_where_widths_differ_and_only_there(batch, make_signal):
    step = FeatureKD(logits=0.0)
    assert step.aids((8, 8, 8), (8, 8, 8)) is None
    state = torch.get_rng_state()
    maps = step.aids((6, 6, 6), (8, 8, 8, 8, 8))
    assert maps is not None and torch.equal(torch.get_rng_state(), state)
    assert [tuple(module.weight.shape) for module in maps.children()] == [(8, 6), (8, 6)]
    student, teacher = make_signal(1, n_states=3, width=6), make_signal(2, n_states=5)
    optimizer, losses = torch.optim.Adam(maps.parameters(), lr=0.05), []
    for _ in range(30):
        loss = step.loss(student, teacher, batch._replace(aids=maps))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    everywhere = FeatureKD(maps="all").aids((8, 8), (8, 8))
    assert everywhere is not None and torch.equal(next(everywhere.parameters()), torch.eye(8))


def test_random_maps_keep_sizes():
    (module,) = linear_maps([(256, 512)])
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    assert float(module(x).detach().square().mean()) == pytest.approx(1, rel=0.1)
