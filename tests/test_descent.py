"""The loop that follows a block's error down: what it learns from, what it is judged by, and what it leaves."""

import pytest
import torch

from compress.descent import constant, cosine, descend, linear, output_error


@pytest.fixture
def shifted(make_block):
    """A block whose targets are half a norm away, and the norm's weight as a parameter."""
    block = make_block()
    name = "input_layernorm.weight"
    with torch.no_grad():
        block.targets = block.run(block.inputs, {name: block.others[name] * 1.5})
    return block, name, block.others[name].clone().requires_grad_()


def descended(block, name, parameter, **settings):
    optimizer = torch.optim.Adam([parameter], lr=settings.pop("lr", 0.02))
    descend(block, lambda: {name: parameter}, optimizer, 10, 4, **{"rate": constant, **settings})
    with torch.no_grad():
        return [
            float(output_error(block, {name: value}, block.inputs, block.targets)) for value in (block.others[name], parameter)
        ]


@pytest.mark.parametrize("rate", [constant, linear, cosine])
def test_the_error_falls(rate, shifted):
    before, after = descended(*shifted, rate=rate)
    assert after < 0.8 * before


def test_rates_begin_at_all_and_end_at_nothing():
    assert [rate(0.0) for rate in (constant, linear, cosine)] == [1, 1, 1]
    assert [rate(1.0) for rate in (linear, cosine)] == [0, 0] and cosine(0.5) == pytest.approx(0.5)


def test_parameters_that_never_get_better_stay_as_they_were(shifted):
    block, name, parameter = shifted
    assert descended(block, name, parameter, lr=1e4)[1] == descended(block, name, parameter, lr=1e4)[0]
    assert parameter.equal(block.others[name])


def test_nothing_to_repair_leaves_everything(make_block):
    block, name = make_block(), "input_layernorm.weight"
    parameter = block.others[name].clone().requires_grad_()
    descended(block, name, parameter)
    assert parameter.equal(block.others[name]) and parameter.grad is None


def test_what_is_held_out_decides_and_is_not_learned_from(shifted):
    """Held-out sequences that the start already fits: any move is for the worse. Their targets reach no gradient."""
    block, name, parameter = shifted
    with torch.no_grad():
        block.targets[-2:] = block.run(block.inputs[-2:])
        block.targets[-1:] += 1e-3
    descended(block, name, parameter, n_held_out=2)
    assert parameter.equal(block.others[name])
    descended(block, name, parameter)
    assert not parameter.equal(block.others[name])
