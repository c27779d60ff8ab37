"""FP8: nearest floats, scales per row or matrix, masks, degenerate rows, sizes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress.methods import parse
from compress.quant.fp8 import FP8
from compress.stats import LinearStats
from compress.weights import FloatQuantized, Masked

NO_STATS = LinearStats(32, ())


@pytest.mark.parametrize("scheme", ["channel", "tensor"])
@given(seed=st.integers(0, 999), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_each_weight_becomes_the_nearest_float(scheme, seed, dtype):
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(seed)).to(dtype)
    result = FP8(scheme=scheme).linear(weight, NO_STATS, None)
    assert isinstance(result, FloatQuantized) and result.scale.shape == ((4, 1) if scheme == "channel" else (1, 1))
    every = torch.arange(256, dtype=torch.int16).to(torch.uint8).view(torch.float8_e4m3fn).float()
    floats = every[every.isfinite()].double() * result.scale.double()[..., None]
    nearest = (floats.expand(4, 1, -1) - weight.double().unsqueeze(-1)).abs().amin(-1)
    error = (result.codes.double() * result.scale.double() - weight.double()).abs()
    torch.testing.assert_close(error, nearest, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("scheme", ["channel", "tensor"])
def test_masks_zeros_and_sizes(scheme):
    torch.manual_seed(0)
    mask = torch.rand(8, 32) < 0.5
    weight = torch.randn(8, 32) * mask
    weight[3] = 0
    result = FP8(scheme=scheme).linear(weight, NO_STATS, mask)
    assert isinstance(result, Masked) and result.kept.equal(mask)
    assert not result.dense()[~mask].any() and not result.dense()[3].any() and bool(result.dense().isfinite().all())
    assert result.nbytes == 8 * 32 + 4 * (8 if scheme == "channel" else 1)
    outlined = FP8(scheme=scheme).outline(weight.to("meta"), NO_STATS, mask)
    assert outlined.nbytes == result.nbytes and outlined.shape == result.shape


def test_rows_of_any_magnitude():
    weight = torch.randn(5, 32) * torch.tensor([1e-12, 1e-3, 1.0, 1e3, 1e12]).unsqueeze(1)
    result = FP8().linear(weight, NO_STATS, None)
    assert bool(((result.dense() - weight).norm(dim=1) / weight.norm(dim=1) < 0.04).all())


def test_not_finite():
    with pytest.raises(ValueError, match="finite"):
        FP8().linear(torch.tensor([[1.0, float("nan")]]), LinearStats(2, ()), None)


def test_inputs_are_rounded_unless_told_not_to():
    assert FP8().linear(torch.randn(2, 8), LinearStats(8, ()), None).inputs == "fp8"
    assert parse("fp8:activations=none").linear(torch.randn(2, 8), LinearStats(8, ()), None).inputs is None
