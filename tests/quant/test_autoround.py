"""AutoRound: rounding to nearest when nothing is learned, codes next to the nearest otherwise, and less error of the block."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress import methods
from compress.descent import output_error
from compress.quant.autoround import AutoRound, Rounding, confine
from compress.quant.grids import code_range, dequantize, fit_grid, quantize
from compress.quant.rtn import RTN
from compress.quant.tuning import round_softly, round_through, shrink
from compress.weights import Dense, LowRank, Masked, Quantized, Sum

CPU = torch.device("cpu")


@given(bits=st.integers(2, 8), symmetric=st.booleans(), seed=st.integers(0, 99), dtype=st.sampled_from(["float32", "bfloat16"]))
@settings(max_examples=40, deadline=None)
def test_nothing_learned_is_rounding_to_nearest(bits, symmetric, seed, dtype):
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(seed)).to(getattr(torch, dtype))
    step = AutoRound(bits=bits, group_size=16, symmetric=symmetric)
    result = Rounding(step, Dense(weight), CPU).result()
    nearest = step.nearest(weight, None)
    assert isinstance(result, Quantized) and isinstance(nearest, Quantized)
    assert result.codes.equal(nearest.codes) and result.scale.equal(nearest.scale)
    assert symmetric or result.zero_point.equal(nearest.zero_point)


@given(bits=st.integers(2, 8), symmetric=st.booleans(), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_an_offset_of_half_a_step_reaches_the_next_code_at_most(bits, symmetric, seed):
    torch.manual_seed(seed)
    weight = torch.randn(6, 32)
    rounding = Rounding(AutoRound(bits=bits, group_size=8, symmetric=symmetric), Dense(weight), CPU)
    nearest = rounding.rounded().codes
    with torch.no_grad():
        rounding.offset.uniform_(-9, 9)
    confine([rounding])
    moved = rounding.rounded().codes - nearest
    assert moved.abs().max() <= 1
    low, high = code_range(bits)
    assert rounding.rounded().codes.min() >= low and rounding.rounded().codes.max() <= high


@pytest.mark.parametrize("symmetric", [True, False])
def test_what_gradients_see_is_what_is_stored(symmetric):
    """In the dtype that scales are stored in, with every parameter somewhere else than at its start."""
    torch.manual_seed(0)
    mask = torch.rand(8, 48) < 0.6
    weight = Masked(Dense((torch.randn(8, 48) * mask).to(torch.bfloat16)), mask)
    rounding = Rounding(AutoRound(bits=3, group_size=16, symmetric=symmetric), weight, CPU)
    with torch.no_grad():
        for parameter, (low, high) in zip(rounding.parameters, [(-0.5, 0.5), (0.3, 1), (0.3, 1)], strict=False):
            parameter.uniform_(low, high)
    result = rounding.result()
    assert isinstance(result, Masked) and result.mask.equal(mask) and not result.dense()[~mask].any()
    inner = result.inner
    assert isinstance(inner, Quantized) and inner.scale.dtype == torch.bfloat16
    scale, zero_point = inner.scale.float(), inner.zero_point
    exact = Quantized(inner.codes, scale, zero_point, 3).dense() * mask
    torch.testing.assert_close(exact, rounding.values(), rtol=0, atol=0)


def test_shares_of_the_range_move_its_ends():
    grid = fit_grid(torch.tensor([[-3.0, 1.0, 0.5, 0.0]]), 8, 4, False, False, torch.float32)
    first, last = code_range(8)
    for upper, lower in ((1.0, 1.0), (0.5, 1.0), (1.0, 0.25), (0.3, 0.7)):
        scale, zero_point = shrink(grid, torch.tensor([[upper]]), torch.tensor([[lower]]))
        assert zero_point is not None
        ends = [(end - zero_point) * scale for end in (first, last)]
        assert ends[0].item() == pytest.approx(-3 * lower, abs=scale.item())
        assert ends[1].item() == pytest.approx(1 * upper, abs=scale.item())
        assert zero_point.equal(zero_point.round()) and first <= zero_point.item() <= last


def test_gradients_are_those_of_the_straight_through_estimator():
    """Inside the range d/dw = 1 and d/ds = round(w/s) - w/s; at its ends nothing to w, and the code to s."""
    values = torch.tensor([[0.3, -1.2, 9.0, -9.0]], requires_grad=True)
    grid = fit_grid(torch.ones(1, 4) * 3.5 / 2, 3, 4, True, False, torch.float32)
    upper = torch.ones(1, 1, requires_grad=True)
    offset = torch.zeros(1, 4, requires_grad=True)
    rounded = round_softly(values, grid, upper, upper, offset)
    rounded.values(None).sum().backward()
    scale = grid.scale
    steps = values.detach() / scale
    assert values.grad.tolist() == [[1, 1, 0, 0]]
    torch.testing.assert_close(offset.grad, torch.tensor([[1.0, 1, 0, 0]]) * scale)
    expected = (steps.round() - steps)[0, :2].sum() + 3 - 4
    torch.testing.assert_close(upper.grad / scale, expected.view(1, 1))
    x = torch.linspace(-9, 9, 7001)
    assert round_through(x).equal(x.round())


def test_all_zero_and_constant_groups_stay_finite():
    weight = torch.zeros(2, 32)
    weight[1] = 2.0
    for symmetric in (True, False):
        rounding = Rounding(AutoRound(bits=2, group_size=16, symmetric=symmetric), Dense(weight), CPU)
        rounding.values().square().sum().backward()
        assert all(bool(parameter.grad.isfinite().all()) for parameter in rounding.parameters)
        with torch.no_grad():
            rounding.upper.zero_()
            rounding.lower.zero_()
        confine([rounding])
        assert bool(rounding.result().dense().isfinite().all())


@pytest.mark.parametrize("symmetric", [True, False])
def test_zero_steps_round_the_block_to_nearest(symmetric, make_block):
    step = AutoRound(bits=3, group_size=16, symmetric=symmetric, full_range=False, iterations=0)
    block = make_block()
    original = dict(block.weights)
    step.block(block)
    for name, weight in block.weights.items():
        nearest = RTN(bits=3, group_size=16, symmetric=symmetric).linear(original[name].dense(), None, None)
        assert weight.dense().equal(nearest.dense())


def test_the_grid_is_full_range_unless_it_has_zero_points():
    weight = torch.tensor([[1.0, 0.2, -0.4, 0.3], [-1.0, 0.2, 0.4, 0.3]])
    grid = AutoRound(bits=2, group_size=4).fit(weight, torch.float32)
    assert grid.scale.flatten().tolist() == [-0.5, 0.5]
    assert dequantize(quantize(weight, grid), grid)[:, 0].tolist() == [1, -1]
    assert AutoRound(symmetric=False).fit(weight, torch.float32).zero_point is not None


def test_the_rate_lets_an_offset_cross_half_a_step():
    for step in (AutoRound(), AutoRound(iterations=1000), AutoRound(iterations=50, learning_rate=0.02)):
        assert sum(step.first_rate() * (1 - i / step.iterations) for i in range(step.iterations)) == pytest.approx(0.5, rel=0.03)
    assert AutoRound(bits=2, iterations=1000).first_rate() == pytest.approx(2e-3)


@pytest.mark.parametrize(
    "kind", [{"symmetric": True}, {"symmetric": False}, {"mse": True}, {"activations": "int8"}, {"full_range": False}], ids=str
)
def test_the_blocks_outputs_come_closer(kind, make_block):
    step = AutoRound(bits=3, group_size=16, iterations=40, batch_size=4, **kind)
    nearest, tuned = (step.model_copy(update={"iterations": n}) for n in (0, 40))
    errors = [error_of(tuned_block(make_block(), method)) for method in (nearest, tuned)]
    assert errors[1] < 0.8 * errors[0]


def test_the_result_is_never_worse_than_rounding_to_nearest(make_block):
    """With a rate that throws the codes about, the first snapshot is the best one."""
    wild = AutoRound(bits=4, group_size=16, iterations=5, learning_rate=50.0)
    nearest = wild.model_copy(update={"iterations": 0})
    assert error_of(tuned_block(make_block(), wild)) <= error_of(tuned_block(make_block(), nearest)) * (1 + 1e-5)


def test_a_run_can_be_repeated(make_block):
    step = AutoRound(bits=3, group_size=16, iterations=4)
    first, second = (tuned_block(make_block(), step) for _ in range(2))
    assert all(weight.dense().equal(second.weights[name].dense()) for name, weight in first.weights.items())


def test_masks_factors_sums_and_unselected_layers(make_block):
    block, mask = make_block(), torch.rand(64, 64) < 0.5
    before = block.weights["self_attn.q_proj"].dense()
    block.set("self_attn.q_proj", Masked(Dense(before * mask), mask))
    low_rank = LowRank(Dense(torch.randn(16, 64) / 8), Dense(torch.randn(32, 16) / 4))
    block.set("self_attn.k_proj", low_rank)
    coarse = RTN(bits=2, group_size=16).linear(block.weights["mlp.up_proj"].dense(), None, None)
    block.set("mlp.up_proj", Sum((coarse, LowRank(Dense(torch.randn(4, 64) / 8), Dense(torch.randn(112, 4) / 8)))))
    kept = block.weights["mlp.down_proj"]
    block.selected -= {"mlp.down_proj"}
    tuned_block(block, AutoRound(bits=4, group_size=16, iterations=6, batch_size=4))
    pruned, factors, parts = (block.weights[name] for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj"))
    assert isinstance(pruned, Masked) and pruned.mask.equal(mask) and not pruned.dense()[~mask].any()
    assert isinstance(factors, LowRank) and isinstance(factors.down, Quantized) and isinstance(factors.up, Quantized)
    assert isinstance(parts, Sum) and parts.parts[0].bits == 4 and isinstance(parts.parts[1].up, Quantized)
    assert block.weights["mlp.down_proj"] is kept


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_other_architectures(family, make_block):
    step = AutoRound(bits=3, group_size=16, iterations=12, batch_size=4)
    nearest = step.model_copy(update={"iterations": 0})
    assert error_of(tuned_block(make_block(family), step)) < error_of(tuned_block(make_block(family), nearest))


def test_rounded_inputs_are_stored(llama, make_pass, run_stages, assert_reloads):
    assert_reloads(run_stages(llama, [make_pass("autoround", group_size=16, activations="int8", iterations=3)]))


def test_efforts_are_settings():
    for effort in AutoRound.efforts.values():
        assert methods.build("autoround", effort)


def test_weights_on_a_grid_stay_there():
    first = torch.randn(4, 32)
    grid = fit_grid(first, 4, 16, False, False, torch.float32)
    on_grid = dequantize(quantize(first, grid), grid)
    rounding = Rounding(AutoRound(group_size=16, symmetric=False), Dense(on_grid), CPU)
    torch.testing.assert_close(rounding.result().dense(), on_grid)


def tuned_block(block, step):
    step.block(block)
    return block


def error_of(block) -> float:
    with torch.no_grad():
        return float(output_error(block, {}, block.inputs, block.targets))
