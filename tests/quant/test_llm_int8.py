"""LLM.int8(): rows and tokens against their definition, outlier inputs, and gradients."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from compress.quant.llm_int8 import LLMInt8
from compress.stats import LinearStats
from compress.weights import Masked, RowInt8

pytestmark = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")


def quantize(weight: Tensor, mask: Tensor | None = None, **options) -> RowInt8:
    found = LLMInt8(**options).linear(weight, LinearStats(weight.shape[1], ()), mask)
    inner = found.inner if isinstance(found, Masked) else found
    assert isinstance(inner, RowInt8)
    return inner


def expected_output(x: Tensor, weight: RowInt8, threshold: float) -> Tensor:
    """The layer written from its description, in float64: x (tokens, in) -> (tokens, out)."""
    half = x.half()
    outliers = (half.abs() >= threshold).any(0) if threshold else torch.zeros(x.shape[1], dtype=torch.bool)
    small = half.masked_fill(half.abs() >= threshold, 0) if threshold else half
    scales = small.abs().amax(1, keepdim=True).float()
    codes = (small * (127 / scales)).round().masked_fill(outliers, 0).double()
    dense = weight.codes.double() * weight.absmax.double().unsqueeze(1) / 127
    return codes * scales / 127 @ dense.T + x.double()[:, outliers] @ dense.T[outliers]


def test_rows_are_rounded_by_their_largest():
    weight = torch.randn(16, 96, generator=torch.Generator().manual_seed(0))
    found, half = quantize(weight), weight.half()
    assert found.absmax.equal(half.abs().amax(1).float())
    assert found.codes.equal((half * (127 / found.absmax.unsqueeze(1))).round().to(torch.int8))
    assert ((found.dense() - weight).abs() <= found.absmax.unsqueeze(1) * (0.5 / 127 + 1e-3)).all()
    assert found.codes.abs().amax(1).eq(127).all()
    assert 8 * found.ideal_nbytes / found.numel == pytest.approx(8 + 32 / 96)


def test_zeros_stay_zeros():
    weight, mask = torch.randn(16, 96), torch.rand(16, 96) > 0.5
    weight[3] = 0
    found = LLMInt8().linear(weight, LinearStats(96, ()), mask)
    assert isinstance(found, Masked) and not found.dense()[~mask].any() and not found.dense()[3].any()
    with pytest.raises(ValueError, match="float16"):
        quantize(torch.full((2, 8), 1e6))


@pytest.mark.parametrize("threshold", [6.0, 2.0, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_is_the_described_one(threshold, dtype):
    draw = torch.Generator().manual_seed(0)
    weight, x = torch.randn(24, 64, generator=draw), torch.randn(2, 5, 64, generator=draw)
    x[1, 2, 7], x[0, 4, 20] = 9.0, -30.0
    found = quantize(weight, threshold=threshold)
    layer = found.layer(dtype)
    y = layer(x.to(dtype), None)
    assert y.dtype == dtype and y.shape == (2, 5, 24)
    reference = expected_output(x.to(dtype).flatten(0, 1), found, threshold).reshape(2, 5, 24)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    assert (y.double() - reference).abs().max() <= tolerance * reference.abs().max()
    bias = torch.randn(24, generator=draw)
    assert (layer(x.to(dtype), bias).double() - reference - bias).abs().max() <= tolerance * reference.abs().max()


def test_outliers_are_kept_where_rounding_would_drown_the_others():
    draw = torch.Generator().manual_seed(0)
    weight, x = torch.randn(24, 64, generator=draw), torch.randn(8, 64, generator=draw)
    x[:, 5] = 300.0
    exact = x @ quantize(weight).dense().T
    errors = {
        threshold: (quantize(weight, threshold=threshold).layer(torch.float32)(x, None) - exact).norm()
        for threshold in (0.0, 6.0)
    }
    assert errors[6.0] < 0.1 * errors[0.0]


def test_gradients_are_those_of_the_unrounded_product():
    draw = torch.Generator().manual_seed(0)
    found, bias = quantize(torch.randn(12, 32, generator=draw)), torch.zeros(12, requires_grad=True)
    x = (3 * torch.randn(2, 4, 32, generator=draw)).requires_grad_()
    before = x.detach().clone()
    toward = torch.randn(2, 4, 12, generator=draw)
    (found.layer(torch.float32)(x, bias) * toward).sum().backward()
    torch.testing.assert_close(x.grad, toward @ found.dense())
    torch.testing.assert_close(bias.grad, toward.sum((0, 1)))
    assert x.detach().equal(before)
