"""MXFP4: nearest 4-bit floats with powers of two, the standard's choice of them, masks, widths, sizes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress.quant.floats import best_scale, to_e2m1
from compress.quant.mxfp4 import MXFP4
from compress.stats import LinearStats
from compress.weights import Dense, FloatQuantized, Masked
from compress.weights.grid import E2M1

NO_STATS = LinearStats(64, ())


def test_halves_go_to_the_even_code_as_readers_have_it():
    middles = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    expected = torch.tensor([0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0])
    levels = torch.tensor(E2M1)
    assert levels[to_e2m1(middles).int()].equal(expected)
    assert levels[(to_e2m1(-middles) & 7).int()].equal(expected)
    assert to_e2m1(torch.tensor([-0.1, -7.0, 9.0, -0.0])).tolist() == [0, 15, 7, 0]


@given(st.floats(-8, 8))
def test_nearest(value):
    levels = torch.tensor([*E2M1, *(-each for each in E2M1)])
    found = levels[int(to_e2m1(torch.tensor([value])))]
    assert abs(found - value) <= (levels - value).abs().min() + 1e-6


@pytest.mark.parametrize("mse", [True, False])
@given(seed=st.integers(0, 999), power=st.integers(-60, 60))
def test_scales_are_powers_of_two_and_scaling_by_them_changes_nothing_else(mse, seed, power):
    weight = torch.randn(3, 64, generator=torch.Generator().manual_seed(seed))
    result, scaled = (MXFP4(mse=mse).linear(w, NO_STATS, None) for w in (weight, weight * 2.0**power))
    assert isinstance(result, FloatQuantized) and isinstance(scaled, FloatQuantized)
    assert scaled.codes.equal(result.codes) and (scaled.scale.int() - result.scale.int() == power).all()
    largest = weight.unflatten(1, (2, 32)).abs().amax(2) / torch.exp2(result.scale.float() - 127)
    assert bool(((largest >= (2 if mse else 4)) & (largest < 8)).all())


def test_the_better_power_is_taken():
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    best, standard = ((MXFP4(mse=mse).linear(weight, NO_STATS, None).dense(torch.float32) - weight) for mse in (True, False))
    per_group = [error.unflatten(1, (2, 32)).square().sum(2) for error in (best, standard)]
    assert bool((per_group[0] <= per_group[1] + 1e-6).all()) and per_group[0].sum() < 0.99 * per_group[1].sum()
    scales = torch.ones(64, 2)
    assert best_scale(weight.unflatten(1, (2, 32)), [scales, scales]).count_nonzero() == 0


def test_masks_zeros_sizes_and_dtype():
    torch.manual_seed(0)
    mask = torch.rand(8, 64) < 0.5
    weight = torch.randn(8, 64) * mask
    weight[2] = 0
    result = MXFP4().linear(weight, NO_STATS, mask)
    assert isinstance(result, Masked) and not result.dense()[~mask].any() and not result.dense()[2].any()
    assert result.nbytes == 8 * 64 // 2 + 8 * 2 == MXFP4().outline(weight.to("meta"), NO_STATS, mask).nbytes
    assert result.parameters() == {} and result.dense(torch.float32).equal(result.dense().float())


def test_widths_without_whole_groups_stay_dense(caplog):
    weight = torch.randn(4, 48)
    result = MXFP4().linear(weight, LinearStats(48, ()), None)
    assert isinstance(result, Dense) and result.dense().equal(weight) and "stays as it is" in caplog.text
    assert isinstance(MXFP4().outline(weight.to("meta"), LinearStats(48, ()), None), Dense)
