"""QuIP: the basis is undone exactly and changes no error, outliers vanish in it, and its rounding is GPTQ's."""

import pytest
import torch
from torch import nn

from compress.apply import apply, outline
from compress.export.layers import Source, read_weight, tensors
from compress.filling import fill_linear
from compress.loader import build
from compress.prune.magnitude import Magnitude
from compress.prune.wanda import Wanda
from compress.quant.gptq import GPTQ
from compress.quant.quip import QuIP
from compress.quant.rtn import RTN
from compress.stats import LinearStats
from compress.stored_layers import spread
from compress.weights import Dense, Incoherent, LowRank, Masked, Quantized, assert_structure_kept, spec_of, structure
from compress.weights.incoherent import turn
from tests.inputs import stats_of


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def inputs(n_inputs: int, n_tokens: int = 400) -> torch.Tensor:
    return torch.randn(n_tokens, n_inputs) @ torch.randn(n_inputs, n_inputs)


def signs(n: int) -> torch.Tensor:
    return torch.randint(2, (n,), dtype=torch.int8) * 2 - 1


def incoherent(result) -> tuple[Incoherent, Quantized]:
    assert isinstance(result, Incoherent) and isinstance(result.inner, Quantized)
    return result, result.inner


def relative_error(weight: torch.Tensor, result, x: torch.Tensor) -> float:
    return float(((weight - result.dense(torch.float32)) @ x.T).norm() / (weight @ x.T).norm())


@pytest.mark.parametrize("shape", [(16, 32), (24, 40), (7, 12), (1, 5)])
def test_the_basis_is_undone_and_changes_no_output_error(shape):
    weight, change, x = torch.randn(shape), torch.randn(shape), inputs(shape[1])
    sides = signs(shape[1]), signs(shape[0])
    back = Incoherent(Dense(turn(weight, *sides)), *sides)
    torch.testing.assert_close(back.dense(), weight, rtol=0, atol=1e-5)
    moved = turn(change, *sides)
    energy = torch.trace(moved @ back.carry(stats_of(x)).hessian @ moved.T)
    torch.testing.assert_close(energy, torch.trace(change @ stats_of(x).hessian @ change.T), rtol=1e-4, atol=0)


def test_outliers_are_spread_and_cost_little():
    weight, x = torch.randn(64, 128), inputs(128)
    weight[::5, 7] *= 30
    weight[3] *= 20
    result, _ = incoherent(QuIP(bits=4).linear(weight, stats_of(x), None))
    turned = turn(weight, result.signs_in, result.signs_out)
    assert turned.abs().max() / turned.square().mean().sqrt() < 0.5 * weight.abs().max() / weight.square().mean().sqrt()
    plain = GPTQ(bits=4, group_size=-1, mse=True).linear(weight, stats_of(x), None)
    assert relative_error(weight, result, x) < 0.7 * relative_error(weight, plain, x)


def test_rounding_is_gptq_in_that_basis():
    weight, x = torch.randn(12, 48), inputs(48)
    result, inner = incoherent(QuIP(bits=3).linear(weight, stats_of(x), None))
    turned_inputs = spread(x * result.signs_in)
    step = GPTQ(bits=3, group_size=-1, mse=True)
    expected = step.linear(turn(weight, result.signs_in, result.signs_out), stats_of(turned_inputs), None)
    assert isinstance(expected, Quantized)
    assert (inner.codes == expected.codes).float().mean() > 0.95  # rounding noise in the two Hessians may flip a few
    torch.testing.assert_close(inner.scale, expected.scale)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(16, 32), (20, 36), (9, 21)])
def test_file_and_module(shape, bias):
    weight = QuIP(bits=3, group_size=-1).linear(torch.randn(shape), stats_of(inputs(shape[1])), None)
    stored = tensors("layer", weight)
    assert sum(t.numel() * t.element_size() for t in stored.values()) == weight.nbytes
    assert isinstance(weight, Incoherent)
    assert weight.nbytes == weight.inner.nbytes + -(-shape[0] // 8) + -(-shape[1] // 8)
    scheme = {"num_bits": 3, "type": "int", "strategy": "channel"}
    config = {"config_groups": {"group": {"targets": ["Linear"], "weights": scheme}}}
    source = Source(stored.__getitem__, stored.__contains__, config)
    again = read_weight("layer", source, spec_of(weight), shape)
    assert isinstance(again, Incoherent) and torch.equal(again.dense(), weight.dense())
    assert torch.equal(again.signs_in, weight.signs_in) and torch.equal(again.signs_out, weight.signs_out)
    module, x = build(spec_of(weight), shape[1], shape[0], bias), torch.randn(3, 5, shape[1])
    fill_linear(module, weight, "cpu", torch.float32)
    if bias:
        nn.init.normal_(module.bias)
    torch.testing.assert_close(module(x), nn.functional.linear(x, weight.dense(), module.bias), rtol=1e-4, atol=1e-4)


def test_outline_has_the_size_of_the_result():
    weight = torch.randn(16, 40)
    for step in (QuIP(), QuIP(bits=3, group_size=8), QuIP(symmetric=False)):
        result = step.linear(weight, stats_of(inputs(40)), None)
        assert outline(step, Dense(weight.to("meta"))).nbytes == result.nbytes


def test_a_mask_is_kept_by_rounding_in_the_layer_s_own_basis():
    mask, x = torch.rand(16, 32) < 0.5, inputs(32)
    weight = torch.randn(16, 32) * mask
    result = QuIP(bits=4).linear(weight, stats_of(x), mask)
    assert isinstance(result, Masked) and result.kept.equal(mask) and not result.dense()[~mask].any()
    expected = GPTQ(bits=4, group_size=-1, mse=True).linear(weight, stats_of(x), mask)
    assert result.dense().equal(expected.dense())


def test_later_passes_work_in_the_basis():
    weight, x = Dense(torch.randn(16, 32)), inputs(32)
    stats = LinearStats(32, {"hessian", "sqnorm"})
    stats.add(x)
    first = apply(QuIP(), weight, stats.finish())
    rounded, inner = incoherent(apply(RTN(bits=3, group_size=-1), first, stats))
    assert inner.bits == 3 and rounded.signs_in.equal(first.signs_in)  # type: ignore[attr-defined]
    for pruner in (Wanda(sparsity=0.5), Magnitude(sparsity=0.5)):
        pruned = apply(pruner, first, stats)
        assert isinstance(pruned, Incoherent) and isinstance(pruned.inner, Masked)
        assert isinstance(pruned.inner.inner, Quantized) and float(pruned.inner.kept.float().mean()) == 0.5
        assert_structure_kept("layer", structure(first), pruned)
    again, inner = incoherent(apply(QuIP(bits=3, seed=1), first, stats))
    assert inner.bits == 3 and not again.signs_in.equal(first.signs_in)  # type: ignore[attr-defined]
    factors = apply(QuIP(), LowRank(Dense(torch.randn(4, 32)), Dense(torch.randn(16, 4))), stats)
    assert isinstance(factors, LowRank) and all(isinstance(part, Incoherent) for part in (factors.down, factors.up))


def test_dead_inputs_widen_no_range():
    weight, x = torch.randn(8, 32), inputs(32)
    x[:, 4] = 0
    loud = weight.clone()
    loud[:, 4] = 1e4
    results = [QuIP().linear(w, stats_of(x), None).dense() for w in (weight, loud)]
    assert results[0].equal(results[1])
    idle = QuIP(bits=8).linear(weight, LinearStats(32, {"hessian"}), None)
    assert (idle.dense() - weight).abs().max() < 0.1


def test_the_seed_says_which_basis_and_layers_of_an_input_share_their_statistics():
    weight, stats = torch.randn(8, 32), stats_of(inputs(32))
    first, again, other = (QuIP(seed=seed).linear(weight, stats, None) for seed in (0, 0, 1))
    assert first.dense().equal(again.dense()) and not first.dense().equal(other.dense())
    assert len(stats._factors) == 2


def test_training_moves_the_scales():
    weight = QuIP().linear(torch.randn(8, 32), stats_of(inputs(32)), None)
    parameters = {name: value.clone().requires_grad_() for name, value in weight.parameters().items()}
    weight.rebuild(parameters).dense().square().sum().backward()
    assert list(parameters) == ["inner/scale"] and all(value.grad is not None for value in parameters.values())
