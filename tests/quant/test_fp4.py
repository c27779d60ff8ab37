"""FP4: its levels, and the library's rounding against the nearest of them."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from compress.quant.fp4 import FP4
from compress.quant.nf4 import NF4
from compress.stats import LinearStats
from compress.weights import Masked

pytestmark = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")

POSITIVE = torch.tensor([0, 0.0625, 8, 12, 4, 6, 2, 3]) / 12


def quantize(weight, mask=None, **options):
    return FP4(**options).linear(weight, LinearStats(weight.shape[1], ()), mask)


def test_levels_are_those_of_the_format():
    found = quantize(torch.randn(2, 64))
    torch.testing.assert_close(found.levels, torch.cat([POSITIVE, -POSITIVE]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(32, 128), (7, 100)], ids=str)
def test_every_weight_goes_to_the_nearest_level(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = quantize(weight)
    scales = torch.stack([block.abs().max() for block in weight.flatten().split(64)])
    assert found.absmax.equal(scales)
    spread = scales.repeat_interleave(64)[: weight.numel()].reshape(shape)
    distances = (weight / spread).unsqueeze(-1) - torch.cat([POSITIVE, -POSITIVE])
    torch.testing.assert_close((weight - found.dense()).abs(), distances.abs().min(-1).values * spread, rtol=0, atol=1e-5)


def test_levels_of_any_scale_stay_as_they_are():
    book = quantize(torch.randn(1, 64)).levels
    codes = torch.randint(16, (24, 64), generator=torch.Generator().manual_seed(0))
    codes[:, 3] = 3
    weight = book[codes] * torch.rand(24, 1)
    assert quantize(weight).dense().equal(weight)


@pytest.mark.parametrize("double_quant", [False, True])
def test_a_mask_stays(double_quant):
    weight, mask = torch.randn(16, 96), torch.rand(16, 96) > 0.5
    found = quantize(weight, mask, double_quant=double_quant)
    assert isinstance(found, Masked) and found.mask.equal(mask) and not found.dense()[~mask].any()


def test_normal_weights_fit_nf4_better():
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    errors = [(step.linear(weight, LinearStats(256, ()), None).dense() - weight).norm() for step in (NF4(), FP4())]
    assert errors[0] < 0.9 * errors[1]
