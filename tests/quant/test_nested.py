"""Nested codes: the leading bits are the codes of every width, zeros stay zero at all of them, and no width is left out."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.errors import BadInput
from compress.loader import KINDS as MODULES
from compress.methods import build
from compress.quant.gptq import GPTQ
from compress.quant.grids import code_range
from compress.quant.hessian import make_plan
from compress.quant.nested import Nested
from compress.quant.nesting import Grids, Sweep, Widths, fit, nesting_zero, refit
from compress.quant.rtn import RTN
from compress.stats import LinearStats, energy
from compress.weights import BitPlanes, Masked, Quantized, prefix


def stats_of(n_inputs: int) -> LinearStats:
    stats = LinearStats(n_inputs, {"hessian"})
    stats.add(torch.randn(400, n_inputs) @ (torch.randn(n_inputs, n_inputs) / n_inputs**0.5 * torch.rand(n_inputs)))
    return stats.finish()


def output_error(weight, found, stats: LinearStats) -> float:
    return float(energy(found.dense(torch.float32) - weight, stats.hessian) / energy(weight, stats.hessian))


@pytest.mark.parametrize("least", [2, 3, 4])
def test_every_width_is_a_grid_of_the_leading_bits(least):
    weight, stats = torch.randn(24, 64), stats_of(64)
    stack = Nested(group_size=16, least=least, order="level").linear(weight, stats, None)
    assert isinstance(stack, BitPlanes) and list(stack.widths) == list(range(least, 5)) and stack.n_parts == 5 - least
    for count, width in enumerate(stack.widths):
        grid = prefix(stack, count + 1)
        assert isinstance(grid, Quantized) and grid.bits == width and grid.group_size == 16
        low, high = code_range(width)
        assert grid.codes.min() >= low and grid.codes.max() <= high and grid.codes.unique().numel() > 2 ** (width - 1)
        assert grid.codes.equal(torch.div(stack.codes, 2 ** (4 - width), rounding_mode="floor").to(torch.int8))
        assert (grid.scale > 0).all()
    assert prefix(stack, stack.n_parts).dense().equal(stack.dense())


def test_all_widths_are_near_what_gptq_makes_for_each_alone_and_rtn_is_not():
    weight, stats = torch.randn(48, 128), stats_of(128)
    stack = Nested(group_size=32, order="level").linear(weight, stats, None)
    for count, bits in enumerate((2, 3, 4)):
        nested = output_error(weight, prefix(stack, count + 1), stats)
        alone = output_error(weight, GPTQ(bits=bits, group_size=32).linear(weight, stats, None), stats)
        assert nested < 3.5 * alone, bits
        assert nested < output_error(weight, RTN(bits=bits, group_size=32, mse=True).linear(weight, stats, None), stats), bits


def test_the_balance_moves_error_from_wide_codes_to_narrow_ones():
    weight, stats = torch.randn(48, 64), stats_of(64)
    errors = []
    for balance in (0, 1, 3):
        stack = Nested(group_size=32, balance=balance, order="level").linear(weight, stats, None)
        errors.append([output_error(weight, prefix(stack, count), stats) for count in (1, 3)])
    (first, last) = zip(*errors, strict=True)
    assert first[0] < first[1] < first[2] and last[0] > last[1] > last[2]


@pytest.mark.parametrize("cycles", [0, 2])
def test_one_width_alone_rounds_like_gptq(cycles):
    """No narrower codes to choose for: with the same grid and no descent the sweep's codes are GPTQ's."""
    weight, stats = torch.randn(16, 32), stats_of(32)
    widths, plan = Widths(3, 3, 0.5), make_plan(stats.hessian, 0.01, True)
    grids = fit(weight, widths, 16, torch.float32)
    sweep = Sweep(weight, plan, grids, None)
    own = Grids(widths, grids.scale, grids.zero)
    assert own.steps(sweep.codes(), 0).abs().max() <= 7
    from compress.quant.gptq import Sweep as Alone
    from compress.quant.grids import Grid

    alone = Alone(weight.T[plan.order].contiguous(), plan, Grid(grids.scale[0], grids.zero, 3), None, None)
    alone.run(0, 32)
    assert sweep.codes().equal(alone.codes[plan.order.argsort()].T)
    before = output_error(weight, Quantized(sweep.codes(), sweep.grids.scale[0], grids.zero, 3), stats)
    for _ in range(cycles):
        sweep.improve(stats.hessian, 0.01)
    assert output_error(weight, Quantized(sweep.codes(), sweep.grids.scale[0], grids.zero, 3), stats) <= before * (1 + 1e-5)


def test_descent_and_scales_lower_the_sum_of_the_widths_errors():
    weight, stats = torch.randn(32, 64), stats_of(64)
    plan, grids = make_plan(stats.hessian, 0.01, True), fit(weight, Widths(2, 4, 0.5), 16, torch.float32)
    sweep = Sweep(weight, plan, grids, None)

    def total() -> float:
        codes, found = sweep.codes(), 0.0
        for shift, share, scale in zip((2, 1, 0), grids.widths.shares, sweep.grids.scale, strict=True):
            grid = Quantized(codes >> shift, scale, grids.zero >> shift, 4 - shift)
            found += share * output_error(weight, grid, stats)
        return found

    errors = [total()]
    for _ in range(2):
        sweep.use(refit(weight, sweep.codes(), sweep.grids, stats.hessian, torch.float32))
        errors.append(total())
        sweep.improve(stats.hessian, 1e-6)
        errors.append(total())
    assert all(after < before for before, after in pairwise(errors)), errors


@given(st.integers(2, 8), st.integers(0, 6), st.floats(-200, 200))
@settings(max_examples=80, deadline=None)
def test_a_zero_point_nests_in_the_middle_of_its_narrowest_code(bits, fewer, wanted):
    least = max(2, bits - fewer)
    zero = int(nesting_zero(torch.tensor([wanted]), Widths(least, bits, 1.0)))
    low, high = code_range(bits)
    size = 2 ** (bits - least)
    assert low <= zero <= high
    assert size == 1 or (zero - low) % size in (size // 2 - 1, size // 2)
    inside = min(max(wanted, low), high)
    assert abs(zero - inside) <= size / 2 + 1


def test_removed_weights_are_zero_at_every_width():
    weight, stats = torch.randn(24, 64), stats_of(64)
    mask = torch.rand(24, 64) > 0.5
    stack = Nested(group_size=16, order="level").linear(weight * mask, stats, mask)
    assert isinstance(stack, Masked)
    for found in (stack, Nested(group_size=16, order="level").linear(weight, stats, None).masked(mask)):
        for count in (1, 2, 3):
            assert not prefix(found, count).dense()[~mask].any()


@given(st.integers(1, 6), st.sampled_from([4, 8, 12]), st.integers(2, 8), st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_files_hold_the_planes_and_readers_compute_the_widest(n_outputs, n_inputs, bits, n_widths):
    n_widths, (low, high) = min(n_widths, bits - 1), code_range(bits)
    codes = torch.randint(low, high + 1, (n_outputs, n_inputs), dtype=torch.int8)
    zero = torch.randint(low, high + 1, (n_outputs, 2), dtype=torch.int8)
    stack = BitPlanes(codes, torch.rand(n_widths, n_outputs, 2), zero, bits, (1.0,) * (n_widths - 1))
    tensors = stack.tensors()
    assert tensors["planes"].shape == (bits, -(-n_outputs * n_inputs // 8))
    module = MODULES[stack.kind](n_inputs, n_outputs, False, **stack.sizes(), children={})
    for name, tensor in tensors.items():
        assert getattr(module, name).shape == tensor.shape and getattr(module, name).dtype == tensor.dtype
        getattr(module, name).data = tensor
    assert module.matrix().equal(stack.dense())
    again = type(stack).assemble(stack.shape, stack.sizes(), tensors, {})
    assert again.codes.equal(codes) and again.priorities == stack.priorities
    assert stack.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    assert stack.map(lambda tensor: tensor.to("meta")).nbytes == stack.nbytes
    leading = BitPlanes.assemble(stack.shape, stack.sizes() | {"bits": 2}, tensors | {"planes": tensors["planes"][:2]}, {})
    assert leading.codes.equal(codes >> (bits - 2))  # the first planes alone are the narrower codes


def test_inputs_that_no_token_reached():
    stats = LinearStats(32, {"hessian"}).finish()
    stack = Nested(group_size=16, order="level").linear(torch.randn(8, 32), stats, None)
    assert all(prefix(stack, count).dense().isfinite().all() for count in (1, 2, 3))


def test_widths_must_rise():
    with pytest.raises(BadInput, match="least=4 is above bits=3"):
        build("nested", {"bits": 3, "least": 4})
