"""RTN: each weight at its nearest grid point, masks kept, outlines of the right size."""

import pytest
import torch

from compress.quant.gptq import GPTQ
from compress.quant.rtn import RTN
from compress.stats import LinearStats
from compress.weights import Masked, Quantized

NO_STATS = LinearStats(48, ())


def test_every_weight_is_at_its_nearest_point():
    weight = torch.randn(6, 48)
    result = RTN(bits=3, group_size=16).linear(weight, NO_STATS, None)
    assert isinstance(result, Quantized) and result.group_size == 16
    points = torch.arange(-4, 4) * result.scale.unsqueeze(-1)
    nearest = (weight.unflatten(1, (3, 16)).unsqueeze(-1) - points.unsqueeze(2)).abs().amin(-1).flatten(1)
    torch.testing.assert_close((result.dense() - weight).abs(), nearest, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_weights_keep_their_dtype(dtype):
    weight = torch.randn(6, 48).to(dtype)
    result = RTN(bits=8, group_size=16).linear(weight, NO_STATS, None)
    assert result.dtype == result.dense().dtype == dtype
    assert (result.dense().float() - weight.float()).abs().max() < 0.03


@pytest.mark.parametrize("symmetric", [True, False])
def test_mask_is_kept_and_ignored_by_the_grid(symmetric):
    mask = torch.rand(6, 48) < 0.5
    weight = torch.randn(6, 48)
    dirty = torch.where(mask, weight, 100.0)
    result = RTN(group_size=16, symmetric=symmetric).linear(dirty, NO_STATS, mask)
    assert isinstance(result, Masked) and isinstance(result.inner, Quantized)
    assert torch.equal(result.kept, mask) and result.dense()[~mask].count_nonzero() == 0
    assert torch.equal(result.dense(), RTN(group_size=16, symmetric=symmetric).linear(weight * mask, NO_STATS, None).dense())


@pytest.mark.parametrize("method", [RTN, GPTQ])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("n_inputs, group_size", [(48, 32), (48, None), (40, 32)])
def test_outline_has_the_size_of_the_result(method, symmetric, masked, n_inputs, group_size):
    weight = torch.randn(6, n_inputs).to(torch.bfloat16)
    mask = torch.rand(6, n_inputs) < 0.5 if masked else None
    stats = LinearStats(n_inputs, {"hessian"})
    stats.add(torch.randn(80, n_inputs))
    step = method(group_size=group_size, symmetric=symmetric)
    result = step.linear(weight * mask if mask is not None else weight, stats.finish(), mask)
    outline = step.outline(weight.to("meta"), stats, None if mask is None else mask.to("meta"))
    assert type(outline) is type(result)
    assert (outline.shape, outline.dtype, outline.nbytes) == (result.shape, result.dtype, result.nbytes)
