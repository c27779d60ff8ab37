"""Integer grids: ranges, zero, rounding of scales, idempotence, groups."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from compress.quant.grids import code_range, dequantize, effective_group_size, fit_grid, quantize
from compress.quant.rtn import RTN

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@st.composite
def grids(draw):
    bits, symmetric, mse = draw(st.integers(2, 8)), draw(st.booleans()), draw(st.booleans())
    dtype, magnitude = draw(st.sampled_from(DTYPES)), draw(st.sampled_from([0.0, 1e-7, 1e-3, 1.0, 1e3]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    weight = torch.randn(3, 24, generator=generator) * magnitude + draw(st.sampled_from([0.0, magnitude]))
    weight[torch.rand(3, 24, generator=generator) < 0.2] = 0
    group_size, full_range = draw(st.sampled_from([8, 24, None])), draw(st.booleans())
    return weight, fit_grid(weight, bits, group_size, symmetric, mse, dtype, full_range), dtype


@settings(max_examples=60, deadline=None)
@given(grids())
def test_grid_invariants(case):
    weight, grid, dtype = case
    assert grid.scale.dtype == dtype and bool(((grid.scale != 0) & grid.scale.isfinite()).all())
    codes = quantize(weight, grid)
    values = dequantize(codes, grid)
    assert codes.amin() >= code_range(grid.bits)[0] and codes.amax() <= code_range(grid.bits)[1]
    assert torch.equal(quantize(values, grid), codes)
    if dtype != torch.bfloat16 or grid.bits < 8 or grid.zero_point is None:  # bfloat16 cannot tell 255 steps apart
        assert torch.equal(quantize(dequantize(codes, grid, dtype).float(), grid), codes)
    assert bool((values[weight == 0] == 0).all())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_no_weight_errs_by_more_than_half_a_step(bits, symmetric):
    weight = torch.randn(8, 64)
    grid = fit_grid(weight, bits, 16, symmetric, False, torch.float32)
    error = (dequantize(quantize(weight, grid), grid) - weight).abs().unflatten(1, (4, 16))
    # An integer zero-point may be off by half a step, which a weight at the end of the range then suffers.
    assert bool((error <= grid.scale.unsqueeze(-1) * (0.5001 if symmetric else 1.0001)).all())


def test_symmetric_scale_is_that_of_compressed_tensors():
    weight = torch.tensor([[-7.5, 1.0, 3.2, 7.5]])
    grid = fit_grid(weight, 4, None, True, False, torch.float32)
    assert grid.zero_point is None and grid.scale.item() == 1.0
    assert quantize(weight, grid).tolist() == [[-8, 1, 3, 7]]


def test_asymmetric_grid_holds_zero_when_all_weights_are_positive():
    weight = torch.linspace(3, 6, 16).unsqueeze(0)
    grid = fit_grid(weight, 4, None, False, False, torch.float32)
    assert grid.zero_point is not None and grid.zero_point.item() == -8
    assert dequantize(quantize(torch.zeros(1, 16), grid), grid).count_nonzero() == 0


@pytest.mark.parametrize("symmetric", [True, False])
def test_mse_search_lowers_its_own_error(symmetric):
    weight = torch.distributions.StudentT(torch.tensor(3.0)).sample((16, 64))
    errors = []
    for mse in (False, True):
        grid = fit_grid(weight, 3, 32, symmetric, mse, torch.float32)
        errors.append((dequantize(quantize(weight, grid), grid) - weight).abs().pow(2.4).sum().item())
    assert errors[1] < 0.95 * errors[0]


def test_mse_search_does_not_depend_on_its_chunks(monkeypatch):
    weight = torch.randn(8, 32)
    whole = fit_grid(weight, 4, 16, True, True, torch.float32)
    monkeypatch.setattr("compress.quant.grids._SEARCH_ELEMENTS", 64)
    assert torch.equal(fit_grid(weight, 4, 16, True, True, torch.float32).scale, whole.scale)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(value):
    with pytest.raises(ValueError, match="not finite"):
        fit_grid(torch.tensor([[1.0, value]]), 4, None, True, False, torch.float32)


@given(st.integers(1, 5000), st.one_of(st.none(), st.integers(1, 512)))
def test_groups_always_divide_the_inputs(n_inputs, group_size):
    size = effective_group_size(n_inputs, group_size)
    assert n_inputs % size == 0
    if group_size and n_inputs % group_size == 0:
        assert size == group_size


def test_group_size_falls_back():
    assert effective_group_size(344, 128) == 344  # gcd 8 is too small
    assert effective_group_size(192, 128) == 64
    assert effective_group_size(64, 128) == 64
    assert effective_group_size(96, None) == 96


def test_fields():
    assert RTN.model_validate({"group_size": "-1"}).group_size is None
    assert RTN(group_size=-1).group_size is None
    for wrong in ({"bits": 1}, {"bits": 9}, {"group_size": 0}, {"group": 3}):
        with pytest.raises(ValidationError):
            RTN.model_validate(wrong)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("extreme", [-3.0, 3.0])
def test_full_range_puts_the_extreme_on_the_code_without_an_opposite(bits, extreme):
    """AutoRound's grid: the extreme weight is exact, whatever its sign, and the scale is finer than the two-sided one."""
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(bits)).clamp(-2.5, 2.5)
    weight[:, 5] = extreme
    grid = fit_grid(weight, bits, None, True, False, torch.float32, full_range=True)
    codes = quantize(weight, grid)
    assert bool((codes[:, 5] == code_range(bits)[0]).all())
    torch.testing.assert_close(dequantize(codes, grid)[:, 5], weight[:, 5])
    assert bool((grid.scale.abs() < fit_grid(weight, bits, None, True, False, torch.float32).scale).all())
    assert bool(((grid.scale < 0) == (extreme > 0)).all())


def test_full_range_is_of_symmetric_grids():
    with pytest.raises(ValidationError, match="full_range"):
        RTN(full_range=True, symmetric=False)
