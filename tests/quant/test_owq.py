"""OWQ: its limits, which columns it keeps and what they become, grids, masks and sizes."""

import pytest
import torch

from compress.apply import apply, outline
from compress.quant.gptq import GPTQ
from compress.quant.grids import fit_grid
from compress.quant.hessian import inverse_factor, make_plan
from compress.quant.owq import OWQ
from compress.stats import LinearStats
from compress.weights import Columns, Dense, Masked, Quantized, Sum, Weight
from tests.inputs import stats_of

N_INPUTS = 64


def inputs(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(400, N_INPUTS, generator=generator) @ torch.randn(N_INPUTS, N_INPUTS, generator=generator)
    x[:, [7, 30]] *= 12  # a few inputs are far larger than the others, as in language models
    return x


def matrix() -> torch.Tensor:
    return torch.randn(24, N_INPUTS, generator=torch.Generator().manual_seed(2))


def parts_of(weight: Weight) -> tuple[Weight, Columns]:
    assert isinstance(weight, Sum)
    grid, columns = weight.parts
    assert isinstance(columns, Columns)
    return grid, columns


def output_error(weight: torch.Tensor, result: Weight, x: torch.Tensor) -> float:
    return float(((weight - result.dense(torch.float32)) @ x.T).square().sum())


@pytest.mark.parametrize("act_order", [True, False])
def test_no_columns_is_gptq(act_order):
    weight, stats = matrix(), stats_of(inputs())
    settings = {"bits": 3, "group_size": 16, "act_order": act_order, "mse": True}
    expected = GPTQ(**settings).linear(weight, stats, None)
    for none in ({"columns": 0}, {"extra_bits": 0.0}):
        assert OWQ(**settings, **none).linear(weight, stats, None).dense().equal(expected.dense())


@pytest.mark.parametrize("count", [N_INPUTS, 1000])
def test_all_columns_is_the_identity(count):
    weight = matrix()
    result = OWQ(bits=2, columns=count).linear(weight, stats_of(inputs()), None)
    assert result.dense().equal(weight)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
def test_weak_columns_are_kept_with_compensation(symmetric, act_order):
    x, weight = inputs(), matrix()
    stats = stats_of(x)
    step = OWQ(bits=3, group_size=16, columns=2, symmetric=symmetric, act_order=act_order)
    result = step.linear(weight, stats, None)
    grid, columns = parts_of(result)
    assert columns.indices.tolist() == [7, 30]
    assert isinstance(grid, Quantized) and grid.dense()[:, [7, 30]].count_nonzero() == 0
    # The others' errors, taken up by the kept columns through the inverse Hessian's block: the least squares answer.
    rest = [j for j in range(N_INPUTS) if j not in (7, 30)]
    damped = stats.hessian.double()
    damped = damped + 0.01 * damped.diagonal().mean() * torch.eye(N_INPUTS, dtype=torch.float64)
    left = (weight - grid.dense())[:, rest].double()
    wanted = weight[:, [7, 30]].double() + left @ damped[rest][:, [7, 30]] @ damped[[7, 30]][:, [7, 30]].inverse()
    torch.testing.assert_close(columns.values.double(), wanted, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(columns.values, weight[:, [7, 30]], atol=1e-3)


def test_grid_is_fitted_without_the_weak_columns():
    weight = matrix()
    weight[:, 7] *= 50
    result = OWQ(bits=3, group_size=16, columns=1, mse=False, full_range=False).linear(weight, stats_of(inputs()), None)
    grid, columns = parts_of(result)
    assert columns.indices.tolist() == [7] and isinstance(grid, Quantized)
    others = weight.clone()
    others[:, 7] = 0
    assert grid.scale.equal(fit_grid(others, 3, 16, True, False, torch.float32).scale)


def test_better_than_gptq_on_the_outputs():
    x, weight = inputs(), matrix()
    stats, settings = stats_of(x), {"bits": 3, "group_size": 16, "mse": True}
    plain = GPTQ(**settings).linear(weight, stats, None)
    kept = OWQ(**settings, columns=2).linear(weight, stats, None)
    assert output_error(weight, kept, x) < 0.8 * output_error(weight, plain, x)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_mask_holds_in_the_kept_columns_too(symmetric):
    x, weight = inputs(), matrix()
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(3)) < 0.6
    before = Dense(weight).masked(mask)
    result = apply(OWQ(bits=3, group_size=16, columns=4, symmetric=symmetric), before, stats_of(x))
    grid, columns = parts_of(result)
    assert isinstance(grid, Masked) and isinstance(grid.inner, Quantized)
    assert result.dense()[~mask].count_nonzero() == 0
    assert result.mask is not None and not bool((result.mask & ~mask).any())
    assert columns.dense()[:, columns.indices.long()][mask[:, columns.indices.long()]].count_nonzero() > 0


def test_columns_follow_from_the_extra_bits():
    assert OWQ(extra_bits=0.1).n_columns(4096, torch.float16) == 26
    assert OWQ(extra_bits=0.01).n_columns(4096, torch.bfloat16) == 3
    assert OWQ(extra_bits=0.01).n_columns(64, torch.float32) == 1
    assert OWQ(columns=5).n_columns(4096, torch.float32) == 5
    weight = torch.randn(256, 1024).half()
    stats = LinearStats(1024, {"hessian"})
    stats._sums["hessian"] = torch.eye(1024)
    _, columns = parts_of(OWQ(bits=3, mse=False).linear(weight, stats, None))
    assert abs(8 * columns.nbytes / weight.numel() - 0.1) < 0.02


def test_dead_and_idle_inputs():
    x = inputs()
    x[:, 5] = 0
    result = OWQ(columns=3, group_size=16).linear(matrix(), stats_of(x), None)
    assert result.dense()[:, 5].count_nonzero() == 0 and bool(result.dense().isfinite().all())
    idle = OWQ(columns=3, group_size=16).linear(matrix(), LinearStats(N_INPUTS, {"hessian"}), None)
    assert bool(idle.dense().isfinite().all())


def test_inputs_can_be_put_last():
    x = inputs()
    hessian, last = x.T @ x, torch.zeros(N_INPUTS, dtype=torch.bool)
    last[[3, 50]] = True
    for act_order in (True, False):
        plan = make_plan(hessian, 0.01, act_order, last)
        assert set(plan.order[-2:].tolist()) == {3, 50} and plan.order.sort().values.equal(torch.arange(N_INPUTS))
        factor = inverse_factor(hessian, 0.01, plan.order)
        torch.testing.assert_close(plan.factor, (factor / factor.diagonal().unsqueeze(1)).float())


@pytest.mark.parametrize("settings", [{}, {"columns": 5, "symmetric": False}, {"columns": 0}])
def test_outline_has_the_result_s_sizes(settings):
    weight, step, stats = matrix().to(torch.bfloat16), OWQ(**settings), stats_of(inputs())
    for before in (Dense(weight), Dense(weight).masked(weight > 0)):
        result, outlined = apply(step, before, stats), outline(step, before.map(lambda tensor: tensor.to("meta")))
        assert (type(outlined), outlined.nbytes) == (type(result), result.nbytes)
