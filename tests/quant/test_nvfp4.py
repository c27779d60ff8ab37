"""NVFP4: two levels of scales, the better of two for each group, masks, extremes, sizes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress.quant.mxfp4 import MXFP4
from compress.quant.nvfp4 import NVFP4
from compress.stats import LinearStats
from compress.weights import FloatQuantized, Masked

NO_STATS = LinearStats(64, ())


def error(step, weight: torch.Tensor) -> torch.Tensor:
    return (step.linear(weight, LinearStats(weight.shape[1], ()), None).dense(torch.float32) - weight).square()


@given(seed=st.integers(0, 999), magnitude=st.sampled_from([1e-20, 1e-3, 1.0, 1e10]))
def test_the_largest_weight_is_kept_and_errors_are_small(seed, magnitude):
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(seed)) * magnitude
    result = NVFP4().linear(weight, NO_STATS, None)
    assert isinstance(result, FloatQuantized) and result.global_scale is not None
    assert result.scale.float().max() <= 448 and result.scale.float().min() > 0
    assert (result.dense(torch.float32) - weight).norm() < 0.15 * weight.norm()
    place = weight.abs().argmax()
    assert result.dense(torch.float32).flatten()[place] == pytest.approx(float(weight.flatten()[place]), rel=0.01)


def test_the_better_scale_is_taken():
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    per_group = [error(NVFP4(mse=mse), weight).unflatten(1, (4, 16)).sum(2) for mse in (True, False)]
    assert bool((per_group[0] <= per_group[1] * 1.05 + 1e-6).all()) and per_group[0].sum() < 0.97 * per_group[1].sum()
    assert per_group[0].sum() < error(MXFP4(), weight).sum()


def test_masks_zeros_and_sizes():
    torch.manual_seed(0)
    mask = torch.rand(8, 64) < 0.5
    weight = torch.randn(8, 64) * mask
    weight[2] = 0
    result = NVFP4().linear(weight, NO_STATS, mask)
    assert isinstance(result, Masked) and not result.dense()[~mask].any() and not result.dense()[2].any()
    assert result.nbytes == 8 * 64 // 2 + 8 * 4 + 4 == NVFP4().outline(weight.to("meta"), NO_STATS, mask).nbytes
    assert not NVFP4().linear(torch.zeros(2, 64), NO_STATS, None).dense().any()
