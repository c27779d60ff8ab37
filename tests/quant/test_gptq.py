"""GPTQ: what its sweep must equal in closed form, its order and groups, masks, and degenerate statistics."""

from functools import partial

import pytest
import torch

from compress.quant.gptq import GPTQ, Sweep
from compress.quant.grids import Grid, dequantize, fit_grid, quantize
from compress.quant.hessian import Plan, inverse_factor, make_plan
from compress.quant.rtn import RTN
from compress.stats import LinearStats
from compress.weights import Masked, Quantized, Weight

plain_gptq = partial(GPTQ, mse=False, full_range=False)  # on the grids that RTN rounds to


def stats_of(hessian: torch.Tensor, n: int = 1000) -> LinearStats:
    stats = LinearStats(len(hessian), {"hessian"})
    stats._sums["hessian"], stats.n = hessian.float(), n
    return stats


def correlated(n_inputs: int, n_tokens: int = 400, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(n_inputs, n_inputs, generator=generator, dtype=torch.float64)
    return torch.randn(n_tokens, n_inputs, generator=generator, dtype=torch.float64) @ mixing


def codes_of(weight: Weight) -> torch.Tensor:
    inner = weight.inner if isinstance(weight, Masked) else weight
    assert isinstance(inner, Quantized)
    return inner.codes


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [16, 48, None])
@pytest.mark.parametrize("mse", [True, False])
def test_diagonal_hessian_is_rounding_to_nearest(act_order, symmetric, group_size, mse):
    weight = torch.randn(10, 96)
    settings = {"group_size": group_size, "symmetric": symmetric, "mse": mse, "bits": 3}
    nearest = RTN(**settings).linear(weight, LinearStats(96, ()), None)
    for hessian in (torch.eye(96), torch.diag(torch.rand(96) * 100 + 0.01)):
        result = plain_gptq(act_order=act_order, **settings).linear(weight, stats_of(hessian), None)
        assert torch.equal(codes_of(result), codes_of(nearest))
        assert torch.equal(result.dense(), nearest.dense())


def test_factor_is_the_upper_cholesky_factor_of_the_inverse():
    x = correlated(40)
    hessian = x.T @ x
    factor = inverse_factor(hessian, 0.01)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(40, dtype=torch.float64)
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(factor.T @ factor @ damped, torch.eye(40, dtype=torch.float64), rtol=0, atol=1e-8)


def sweep_in_float64(
    weight: torch.Tensor, hessian: torch.Tensor, size: int = 20, refit=None
) -> tuple[Sweep, torch.Tensor, torch.Tensor]:
    factor = inverse_factor(hessian, 0.01)
    unit = factor / factor.diagonal().unsqueeze(1)
    plan = Plan(torch.arange(len(hessian)), unit, torch.zeros(len(hessian), dtype=torch.bool))
    sweep = Sweep(weight.T.contiguous(), plan, fit_grid(weight, 3, size, True, False, torch.float64), refit, None)
    sweep.run(0, len(hessian))
    grid = sweep.grid(torch.float64)
    return sweep, factor, Quantized(sweep.codes.T, grid.scale, None, 3).dense()


def test_sum_of_squared_errors_is_the_output_error():
    x, weight = correlated(100), torch.randn(12, 100, dtype=torch.float64)
    hessian = x.T @ x
    sweep, factor, rounded = sweep_in_float64(weight, hessian)
    errors = sweep.work / factor.diagonal().unsqueeze(1)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(100, dtype=torch.float64)
    delta = weight - rounded
    torch.testing.assert_close(errors.square().sum(), torch.trace(delta @ damped @ delta.T), rtol=1e-10, atol=0)


def test_result_does_not_depend_on_the_recursion(monkeypatch):
    x, weight = correlated(100), torch.randn(12, 100, dtype=torch.float64)
    rounded = sweep_in_float64(weight, x.T @ x)[2]
    monkeypatch.setattr("compress.quant.sweep._LEAF", 100)
    torch.testing.assert_close(sweep_in_float64(weight, x.T @ x)[2], rounded)


def test_dynamic_groups_equal_a_plain_loop():
    """The published algorithm without lazy updates, its grids fitted to fully compensated weights; in float64, in which
    rounding noise does not decide between two points."""
    n_inputs, size = 96, 24
    generator = torch.Generator().manual_seed(0)
    x, weight = correlated(n_inputs), torch.randn(6, n_inputs, generator=generator, dtype=torch.float64)

    def refit(group: torch.Tensor) -> Grid:
        return fit_grid(group, 3, None, True, False, torch.float64)

    _, factor, result = sweep_in_float64(weight, x.T @ x, size, refit)
    work, grid, expected = weight.clone(), None, torch.empty_like(weight)
    for j in range(n_inputs):
        if j % size == 0:
            grid = refit(work[:, j : j + size])
        assert grid is not None
        scale = grid.scale[:, 0]
        expected[:, j] = (work[:, j] / scale).round().clamp(-4, 3) * scale
        error = (work[:, j] - expected[:, j]) / factor[j, j]
        work[:, j:] -= error[:, None] * factor[j, j:]
    torch.testing.assert_close(result, expected)


def output_error(weight: torch.Tensor, result: Weight, x: torch.Tensor) -> float:
    return ((weight - result.dense(torch.float32)) @ x.T.float()).square().sum().item()


@pytest.mark.parametrize("act_order", [True, False])
def test_beats_rounding_to_nearest(act_order):
    x, weight = correlated(128), torch.randn(64, 128)
    stats = stats_of(x.T @ x)
    result = plain_gptq(bits=3, group_size=32, act_order=act_order).linear(weight, stats, None)
    nearest = RTN(bits=3, group_size=32).linear(weight, stats, None)
    assert output_error(weight, result, x) < 0.7 * output_error(weight, nearest, x)


def test_act_order_keeps_the_grids_of_the_original_groups():
    x, weight = correlated(64) * torch.rand(64, dtype=torch.float64) * 9, torch.randn(8, 64)
    result = plain_gptq(group_size=16).linear(weight, stats_of(x.T @ x), None)
    assert isinstance(result, Quantized)
    assert torch.equal(result.scale, fit_grid(weight, 4, 16, True, False, torch.float32).scale)
    plan = make_plan(x.T @ x, 0.01, True)
    assert bool(((x.T @ x).diagonal()[plan.order].diff() <= 0).all())


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_masked_weights_stay_zero_and_are_made_up_for(act_order, symmetric):
    x = correlated(64)
    mask = torch.rand(32, 64) < 0.6
    weight = torch.randn(32, 64) * mask
    stats, settings = stats_of(x.T @ x), {"bits": 3, "group_size": 16, "symmetric": symmetric}
    solved = plain_gptq(act_order=act_order, **settings).linear(weight, stats, mask)
    nearest = RTN(**settings).linear(weight, stats, mask)
    assert isinstance(solved, Masked) and torch.equal(solved.kept, mask)
    assert solved.dense()[~mask].count_nonzero() == 0
    assert output_error(weight, solved, x) < output_error(weight, nearest, x)


@pytest.mark.parametrize("act_order", [True, False])
def test_weights_on_the_grid_are_unchanged(act_order):
    x, first = correlated(32), torch.randn(4, 32)
    grid = fit_grid(first, 4, 16, True, False, torch.float32)
    weight = dequantize(quantize(first, grid), grid)
    plan = make_plan((x.T @ x).float(), 0.01, act_order)
    sweep = Sweep(weight.T[plan.order].contiguous(), plan, grid, None, None)
    sweep.run(0, 32)
    assert sweep.work.count_nonzero() == 0


def test_true_sequential_asks_for_new_statistics():
    assert plain_gptq(true_sequential=True).sequential and not plain_gptq().sequential


def test_dead_input_loses_its_weights():
    x = correlated(32)
    x[:, 5] = 0
    result = plain_gptq(group_size=16, symmetric=False).linear(torch.randn(4, 32), stats_of(x.T @ x), None)
    assert result.dense()[:, 5].count_nonzero() == 0 and bool(result.dense().isfinite().all())
    assert result.dense().count_nonzero() > 100


def test_single_token_and_none():
    weight = torch.randn(4, 32)
    x = torch.randn(1, 32)
    assert bool(plain_gptq(bits=4).linear(weight, stats_of(x.T @ x, 1), None).dense().isfinite().all())
    idle = plain_gptq(bits=4).linear(weight, stats_of(torch.zeros(32, 32), 0), None)
    assert torch.equal(idle.dense(), RTN(bits=4).linear(weight, LinearStats(32, ()), None).dense())


def test_indefinite_hessian_is_damped_until_it_is_not(caplog):
    hessian = torch.eye(16) * 2
    hessian[0, 1] = hessian[1, 0] = 2.5
    assert bool(inverse_factor(hessian, 0.01).isfinite().all())
    assert "damping was raised" in caplog.text
    with pytest.raises(torch.linalg.LinAlgError):
        inverse_factor(torch.full((4, 4), float("nan")), 0.01)


def test_layers_of_an_input_group_share_one_factor(monkeypatch):
    stats, calls = stats_of(torch.eye(16)), []
    monkeypatch.setattr("compress.quant.gptq.make_plan", lambda *given: calls.append(1) or make_plan(*given))
    for _ in range(3):
        plain_gptq().linear(torch.randn(4, 16), stats.only({"hessian"}), None)
    assert len(calls) == 1


def test_bfloat16_weights_and_odd_width():
    x = correlated(40)
    result = plain_gptq(group_size=32, bits=8).linear(torch.randn(4, 40).to(torch.bfloat16), stats_of(x.T @ x), None)
    assert isinstance(result, Quantized) and result.group_size == 40 and result.dense().dtype == torch.bfloat16
