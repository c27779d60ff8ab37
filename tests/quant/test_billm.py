"""BiLLM: closed-form scales, errors that fall with every term, blocks that know of each other by the Hessian alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.filling import fill_linear
from compress.loader import build
from compress.quant.billm import BiLLM
from compress.quant.binary import binarise, binarised, explained, middle, salient_columns
from compress.stats import LinearStats
from compress.weights import Binary, spec_of
from tests.inputs import correlated, relative_error, stats_of


def matrix(n_outputs: int = 24, n_inputs: int = 80) -> Tensor:
    return torch.randn(n_outputs, n_inputs, generator=torch.Generator().manual_seed(0)) + 0.2


def some(centred: bool, block_size: int = 32) -> Binary:
    return BiLLM(block_size=block_size, means=centred).linear(matrix(), stats_of(correlated(80)), None)  # type: ignore


@pytest.mark.parametrize("centred", [True, False])
def test_a_scale_is_the_least_squares_one_for_its_signs(centred):
    values, where = matrix(6, 40), matrix(6, 40) > 0
    mean, scale = binarise(values, where, centred)
    for row in range(6):
        own = values[row][where[row]]
        assert float(mean[row]) == pytest.approx(float(own.mean()) if centred else 0.0, abs=1e-6)
        left = own - mean[row]
        solved = torch.linalg.lstsq(left.sign().unsqueeze(1), left.unsqueeze(1)).solution
        assert float(scale[row]) == pytest.approx(float(solved), rel=1e-5)


@pytest.mark.parametrize("centred", [True, False])
def test_what_two_parts_explain_is_what_their_errors_leave(centred):
    values, near = matrix(6, 40), matrix(6, 40).abs() < 0.8
    nothing = torch.zeros(40, dtype=torch.bool)
    error = (binarised(values, nothing, near, centred, torch.float32).dense() - values).square().sum()
    left = float(values.square().sum()) - explained(values, (near, ~near), centred)
    assert left == pytest.approx(float(error), rel=1e-5)


def test_a_second_sign_lowers_the_error():
    values = matrix()
    nothing = torch.zeros(80, dtype=torch.bool)
    once, twice = (
        binarised(values, salient, torch.ones_like(values, dtype=torch.bool) & ~salient, True, torch.float32)
        for salient in (nothing, ~nothing)
    )
    errors = [(each.dense() - values).square().sum(1) for each in (once, twice)]
    assert (errors[1] <= errors[0]).all() and errors[1].sum() < 0.5 * errors[0].sum()


def test_a_split_bell_lowers_the_error_and_is_split_near_its_standard_deviation():
    values = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    nothing = torch.zeros(512, dtype=torch.bool)
    near = middle(values, nothing, False)
    threshold = float(values[near].abs().max())
    assert threshold == pytest.approx(0.98, abs=0.1)  # of the best four levels for a Gaussian (Lloyd and Max)
    whole, split = (
        binarised(values, nothing, where, False, torch.float32) for where in (torch.ones_like(near), near)
    )  # fmt: skip
    error = [float((each.dense() - values).square().mean()) for each in (whole, split)]
    assert error == pytest.approx([1 - 2 / torch.pi, 0.1175], abs=0.01)


def test_salient_columns_are_the_first_by_weight_and_curvature():
    values, diagonal = matrix(), torch.ones(80)
    values[:, [3, 70]] *= 8
    diagonal[40] = 1e-3  # whose error no later input can make up for
    found = salient_columns(values, diagonal, 50, True).nonzero().flatten().tolist()
    assert set(found) >= {40} and set(found) & {3, 70}
    order = (values.square().sum(0) / diagonal.square()).argsort(descending=True)
    assert set(found) == set(order[: len(found)].tolist())
    assert int(salient_columns(values, diagonal, 1, True).sum()) == 1


def test_with_independent_inputs_blocks_know_nothing_of_each_other():
    weight = matrix()
    together = BiLLM(block_size=32).linear(weight, stats_of(torch.eye(80)), None)
    for start in (0, 32, 64):
        part = weight[:, start : start + 32]
        alone = BiLLM(block_size=32).linear(part, stats_of(torch.eye(part.shape[1])), None)
        assert alone.dense().equal(together.dense()[:, start : start + 32])


def test_errors_are_carried_on_as_the_inverse_hessian_says():
    """What the second block is given is what makes up best for the first one's error."""
    weight, x = matrix(), correlated(80).double()
    made = BiLLM(block_size=40, damping=1e-6).linear(weight, stats_of(x.float()), None)
    error = (weight - made.dense()).double()[:, :40] @ x[:, :40].T  # missing from every token's output
    best = (weight.double()[:, 40:] + torch.linalg.lstsq(x[:, 40:], error.T).solution.T).float()
    assert isinstance(made, Binary)
    salient, codes = made.salient[40:], made.codes[:, 40:]
    again = binarised(best, salient, (codes < 2) & ~salient, False, torch.float32)
    torch.testing.assert_close(made.dense()[:, 40:], again.dense(), rtol=0, atol=0.02)


def test_making_up_for_errors_helps_and_more_so_inside_blocks():
    weight, x = matrix(), correlated(80)
    plain = BiLLM(block_size=20).linear(weight, stats_of(torch.eye(80)), None)
    between, inside = (BiLLM(block_size=20, within=within).linear(weight, stats_of(x), None) for within in (False, True))
    assert relative_error(between, weight, x) < 0.85 * relative_error(plain, weight, x)
    assert relative_error(inside, weight, x) < 0.85 * relative_error(between, weight, x)
    assert between.nbytes == inside.nbytes


def test_inside_a_block_codes_are_the_nearest_of_its_levels():
    """With independent inputs there is nothing to make up for, and the nearest level is no worse than the split's."""
    weight = matrix()
    split, near = (BiLLM(block_size=40, within=within).linear(weight, stats_of(torch.eye(80)), None) for within in (False, True))
    assert isinstance(near, Binary) and isinstance(split, Binary) and near.scale.equal(split.scale)
    assert ((near.dense() - weight).abs() <= (split.dense() - weight).abs() + 1e-6).all()


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("block_size", [32, 40, 128])
def test_it_is_the_bytes_of_its_tensors_and_comes_back_from_them(centred, block_size):
    weight = some(centred, block_size)
    tensors, n_blocks = weight.tensors(), -(-80 // block_size)
    assert weight.nbytes == sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert weight.nbytes == 24 * 80 // 4 + 10 + 4 * 24 * n_blocks * (7 if centred else 4)
    back = Binary.assemble(weight.shape, weight.sizes(), tensors, {})
    assert back.codes.equal(weight.codes) and back.dense().equal(weight.dense())
    planned = BiLLM(block_size=block_size, means=centred).outline(matrix().to("meta"), stats_of(torch.eye(80)), None)
    assert planned.nbytes == weight.nbytes


@given(st.integers(1, 9), st.integers(1, 70), st.integers(1, 40), st.booleans(), st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_matrices_of_any_shape_are_what_their_parts_say(n_outputs, n_inputs, block_size, centred, seed):
    draw = torch.Generator().manual_seed(seed)
    n_blocks = -(-n_inputs // block_size)
    codes = torch.randint(0, 4, (n_outputs, n_inputs), generator=draw).to(torch.int8)
    salient = torch.rand(n_inputs, generator=draw) < 0.3
    scale, mean = torch.rand(n_outputs, n_blocks, 4, generator=draw), torch.randn(n_outputs, n_blocks, 3, generator=draw)
    weight = Binary(codes, salient, scale, mean if centred else None, block_size)
    expected = torch.empty(n_outputs, n_inputs)
    for i in range(n_outputs):
        for j in range(n_inputs):
            sign, high, block = 2 * int(codes[i, j] & 1) - 1, int(codes[i, j] >> 1), j // block_size
            own, kind = scale[i, block], 2 if salient[j] else high
            value = sign * own[2] + (2 * high - 1) * own[3] if salient[j] else sign * own[high]
            expected[i, j] = value + (mean[i, block, kind] if centred else 0)
    torch.testing.assert_close(weight.dense(), expected)
    back = Binary.assemble(weight.shape, weight.sizes(), weight.tensors(), {})
    assert back.dense().equal(weight.dense())
    module = build(spec_of(weight), n_inputs, n_outputs, False)
    fill_linear(module, weight, torch.device("cpu"), torch.float32)
    assert module.matrix().equal(weight.dense())


def test_scales_and_means_are_trained_and_signs_are_not():
    weight = some(True)
    assert weight.parameters().keys() == {"scale", "mean"} and some(False).parameters().keys() == {"scale"}
    values = {name: value.clone().requires_grad_() for name, value in weight.parameters().items()}
    weight.rebuild(values).dense().square().sum().backward()
    assert all(value.grad is not None and value.grad.abs().sum() > 0 for value in values.values())


def test_a_bfloat16_matrix_keeps_its_dtype():
    made = BiLLM(block_size=32, means=True).linear(matrix().bfloat16(), stats_of(correlated(80)), None)
    assert made.dtype == torch.bfloat16 and all(value.dtype == torch.bfloat16 for value in made.parameters().values())


def test_inputs_that_are_always_zero_and_no_tokens_do_no_harm():
    x = correlated(80)
    x[:, 3] = 0
    assert BiLLM().linear(matrix(), stats_of(x), None).dense().isfinite().all()
    assert BiLLM().linear(matrix(), LinearStats(80, {"hessian"}), None).dense().isfinite().all()


def test_pruned_layers_are_refused():
    with pytest.raises(ValueError, match="zeros of a pruned layer"):
        BiLLM().linear(matrix(), stats_of(correlated(80)), matrix() > 0)
    with pytest.raises(ValueError, match="zeros of a pruned layer"):
        some(True).masked(matrix() > 0)
