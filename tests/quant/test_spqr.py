"""SpQR: the limits of its threshold, outliers that are found and kept, second-level grids, masks, counted bytes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.apply import apply, outline
from compress.export.layers import Source, read_weight, tensors
from compress.filling import fill_linear
from compress.loader import build
from compress.prune.magnitude import Magnitude
from compress.quant.bilevel import bilevel_scale, fit_bilevel, leave_one_out_gain
from compress.quant.gptq import GPTQ
from compress.quant.grids import Grid, dequantize, fit_grid, quantize
from compress.quant.rtn import RTN
from compress.quant.spqr import SpQR
from compress.stats import LinearStats
from compress.weights import Bilevel, Dense, Masked, Outliers, Quantized, Sum, Weight, assert_structure_kept, spec_of, structure
from compress.weights.composed import unmasked
from tests.inputs import stats_of


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def inputs(n_inputs: int, n_tokens: int = 400) -> torch.Tensor:
    return torch.randn(n_tokens, n_inputs) @ torch.randn(n_inputs, n_inputs)


def parts_of(weight: Weight) -> tuple[Bilevel, Outliers]:
    assert isinstance(weight, Sum)
    grid, outliers = unmasked(weight.parts[0]), weight.parts[1]
    assert isinstance(grid, Bilevel) and isinstance(outliers, Outliers)
    return grid, outliers


def heavy(n_outputs: int = 48, n_inputs: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights, and where they have been made outliers."""
    weight, where = torch.randn(n_outputs, n_inputs), torch.rand(n_outputs, n_inputs) < 0.01
    return torch.where(where, weight.sign() * 8, weight), where


def output_error(weight: torch.Tensor, result: Weight, x: torch.Tensor) -> float:
    return float(((weight - result.dense(torch.float32)) @ x.T).square().sum())


def test_without_a_threshold_to_pass_it_is_gptq_with_small_groups():
    weight, x = torch.randn(16, 64), inputs(64)
    grid, outliers = parts_of(SpQR(bits=8, outlier_threshold=1e9).linear(weight, stats_of(x), None))
    assert outliers.numel == 0
    settings = {"bits": 8, "group_size": 16, "symmetric": False, "act_order": False}
    gptq = GPTQ(damping=1.0, **settings).linear(weight, stats_of(x), None)
    assert (grid.dense() - gptq.dense()).abs().max() < 0.1  # of grids that are not quite the same
    assert output_error(weight, grid, x) < 4 * output_error(weight, gptq, x)


def test_with_a_threshold_of_zero_nothing_changes():
    weight = torch.randn(16, 64)
    result = SpQR(outlier_threshold=0).linear(weight, stats_of(inputs(64)), None)
    assert torch.equal(result.dense(), weight)


def test_outliers_are_found_and_kept():
    (weight, where), x = heavy(), torch.randn(400, 64)
    result = SpQR().linear(weight, stats_of(x), None)
    grid, outliers = parts_of(result)
    found = float(outliers.mask[where].float().mean())  # two in one group hide each other from the search
    assert found > 0.7 and outliers.numel < 2 * int(where.sum())
    assert not grid.dense()[outliers.mask].any()
    without = SpQR(outlier_threshold=1e9).linear(weight, stats_of(x), None)
    assert output_error(weight, result, x) < 0.6 * output_error(weight, without, x)


def test_fewer_outliers_above_a_higher_threshold():
    (weight, _), stats = heavy(), stats_of(inputs(64))
    counts = [parts_of(SpQR(outlier_threshold=t).linear(weight, stats, None))[1].numel for t in (0.05, 0.2, 0.8)]
    assert counts[0] > counts[1] > counts[2]


def test_leaving_one_out_is_worth_what_the_grid_without_it_saves():
    group, diagonal = torch.randn(5, 16), torch.rand(16) + 0.5
    group[2, 3] = 9
    gain = leave_one_out_gain(group, diagonal, 3)

    def error(weights: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        grid = fit_grid(weights[None], 3, None, False, False, torch.float32)
        return ((dequantize(quantize(weights[None], grid), grid) - weights) / scale).square().sum()

    for row in range(5):
        for i in range(16):
            others = torch.arange(16) != i
            expected = error(group[row], diagonal) - error(group[row][others], diagonal[others])
            torch.testing.assert_close(gain[row, i], expected, rtol=1e-4, atol=1e-5)
    assert gain.argmax() == 2 * 16 + 3


@given(st.integers(1, 50), st.sampled_from([2, 3, 4, 8]), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
@settings(max_examples=25, deadline=None)
def test_second_level_grids_cost_little(n_outputs, bits, dtype):
    group = torch.randn(n_outputs, 16) * 0.1
    zero, codes, base, step = fit_bilevel(group, torch.ones(16), bits, dtype)
    assert base.dtype == step.dtype == dtype and len(base) == -(-n_outputs // 16)
    assert zero.dtype == codes.dtype == torch.int8 and 0 <= int(codes.min()) <= int(codes.max()) <= 7
    grid = Grid(bilevel_scale(codes, base, step).unsqueeze(1), zero.unsqueeze(1), bits)
    full = fit_grid(group, bits, None, False, False, torch.float32)
    found, expected = ((dequantize(quantize(group, g), g) - group).square().sum() for g in (grid, full))
    assert bool((grid.scale > 0).all()) and found < 1.6 * expected


def test_an_all_zero_matrix_stays_zero():
    result = SpQR().linear(torch.zeros(20, 32), stats_of(inputs(32)), None)
    assert not result.dense().any() and bool(result.dense().isfinite().all())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", [(48, 64), (20, 40), (7, 36)])
def test_file_and_module(shape, bits):
    weight = SpQR(bits=bits).linear(heavy(*shape)[0], stats_of(inputs(shape[1])), None)
    stored = tensors("layer", weight)
    assert sum(t.numel() * t.element_size() for t in stored.values()) == weight.nbytes
    source = Source(stored.__getitem__, stored.__contains__)
    again = read_weight("layer", source, spec_of(weight), shape)
    assert torch.equal(again.dense(), weight.dense()) and again.nbytes == weight.nbytes
    outline = read_weight("layer", Source(lambda n: stored[n].to("meta"), stored.__contains__), spec_of(weight), shape)
    assert outline.nbytes == weight.nbytes
    module, x = build(spec_of(weight), shape[1], shape[0], False), torch.randn(3, shape[1])
    fill_linear(module, weight, "cpu", torch.float32)
    torch.testing.assert_close(module(x), x @ weight.dense().T, rtol=1e-4, atol=1e-4)


def test_true_bits_are_counted():
    weight = torch.randn(64, 256).to(torch.float16)
    result = SpQR().linear(weight, stats_of(inputs(256)), None)
    grid, outliers = parts_of(result)
    # 3 bits of code, 3 + 3 of scale and zero-point for 16 weights, base and step of 16 bits for 256.
    assert 8 * grid.nbytes / weight.numel() == 3 + 6 / 16 + 32 / 256
    assert 8 * outliers.nbytes == 32 * outliers.numel + 32 * 65
    planned = outline(SpQR(), Dense(weight.to("meta")))
    assert parts_of(planned)[0].nbytes == grid.nbytes


@pytest.mark.parametrize("bits", [2, 4])
def test_masked_weights_stay_zero_and_are_never_outliers(bits):
    (weight, _), mask, x = heavy(), torch.rand(48, 64) < 0.5, inputs(64)
    stats = stats_of(x)
    result = SpQR(bits=bits).linear(weight * mask, stats, mask)
    _, outliers = parts_of(result)
    assert result.mask is not None and torch.equal(result.mask, mask)
    assert not result.dense()[~mask].any() and not (outliers.mask & ~mask).any() and outliers.numel
    nearest = RTN(bits=bits, group_size=16, symmetric=False).linear(weight * mask, LinearStats(64, ()), mask)
    assert output_error(weight * mask, result, x) < output_error(weight * mask, nearest, x)


def test_later_passes_take_the_grid_and_leave_the_outliers():
    (weight, _), stats = heavy(), stats_of(inputs(64))
    first = SpQR().linear(weight, stats, None)
    pruned = apply(Magnitude(sparsity=0.5), first, stats)
    assert isinstance(pruned, Sum) and isinstance(pruned.parts[0], Masked) and isinstance(pruned.parts[0].inner, Bilevel)
    assert pruned.parts[1] is first.parts[1]  # type: ignore[attr-defined]
    assert_structure_kept("layer", structure(first), pruned)
    rounded = apply(RTN(bits=4, group_size=16), first, stats)
    assert isinstance(rounded, Sum) and isinstance(rounded.parts[0], Quantized)
    masked = apply(SpQR(), Dense(weight * (weight.abs() > 0.5)).masked(weight.abs() > 0.5), stats)
    assert_structure_kept("layer", structure(Dense(weight).masked(weight.abs() > 0.5)), masked)


def test_bfloat16_weights_and_a_dead_input():
    x = inputs(40)
    x[:, 3] = 0
    result = SpQR().linear(torch.randn(20, 40).to(torch.bfloat16), stats_of(x), None)
    assert result.dense().dtype == torch.bfloat16 and not result.dense()[:, 3].any()


def test_training_moves_the_grids_and_the_outliers():
    weight = SpQR().linear(heavy()[0], stats_of(inputs(64)), None)
    parameters = {name: value.clone().requires_grad_() for name, value in weight.parameters().items()}
    weight.rebuild(parameters).dense().square().sum().backward()
    assert set(parameters) == {"parts.0/base", "parts.0/step", "parts.1/values"}
    assert all(value.grad is not None and value.grad.count_nonzero() for value in parameters.values())
