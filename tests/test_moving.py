"""Grids whose codes are learned: the grid itself at first, always what is stored, and straight-through gradients."""

import pytest
import torch

from compress.moving import Moving, moving, stopped
from compress.quant.rtn import RTN
from compress.weights import Dense, LowRank, Masked, Quantized


def grid(symmetric: bool, shape=(6, 32), **settings) -> Quantized:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return RTN(bits=3, group_size=16, symmetric=symmetric, **settings).linear(weight, None, None)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_at_first_it_is_the_grid(symmetric, known):
    """Whatever the original was: other codes than the nearest to it are still the codes."""
    first = grid(symmetric)
    begun = moving(first, 2 * torch.randn(6, 32) if known else None)
    assert isinstance(begun, Moving) and begun.dense().equal(first.dense())
    assert stopped(begun).codes.equal(first.codes) and type(stopped(begun)) is Quantized
    assert (begun.shape, begun.dtype, begun.nbytes) == (first.shape, first.dtype, first.nbytes)


def test_a_grid_of_eight_bits_whose_zero_lies_at_one_end_is_itself_at_first():
    """Its codes are up to 255 steps from zero."""
    first = RTN(bits=8, group_size=16, symmetric=False).linear(torch.rand(6, 32), None, None)
    assert isinstance(first, Quantized) and int((first.codes.int() - first.zero_point.repeat_interleave(16, 1)).max()) > 200
    assert moving(first).dense().equal(first.dense())


@pytest.mark.parametrize("symmetric", [True, False])
def test_weights_begin_as_near_to_the_original_as_their_codes_let_them(symmetric):
    first = grid(symmetric)
    original = first.dense() + first.scale.repeat_interleave(16, 1) * torch.linspace(-2, 2, 32)
    zeros = 0 if symmetric else first.zero_point.repeat_interleave(16, 1)
    offsets = moving(first, original).positions - (first.codes - zeros)
    torch.testing.assert_close(offsets[:, 12:20], torch.linspace(-2, 2, 32)[12:20].expand(6, -1), atol=1e-5, rtol=0)
    assert offsets[:, 0].lt(-0.4).all() and offsets[:, -1].gt(0.4).all() and offsets.abs().max() < 0.5


@pytest.mark.parametrize("symmetric", [True, False])
def test_what_gradients_see_is_what_is_stored(symmetric):
    mask = torch.rand(6, 32, generator=torch.Generator().manual_seed(1)) < 0.6
    begun = moving(grid(symmetric).masked(mask))
    moved = begun.rebuild({"positions": torch.randn(6, 32) * 4, "scale": begun.inner.scale * 1.1})
    after = stopped(moved)
    assert isinstance(after, Masked) and after.kept.equal(mask) and not after.dense()[~mask].any()
    assert after.dense().equal(moved.dense())
    assert after.inner.codes.min() >= -4 and after.inner.codes.max() <= 3


def test_the_gradients_of_the_straight_through_estimator():
    """A step to the position, nothing beyond the codes' range; the codes to the scale."""
    start = Quantized(torch.zeros(1, 4, dtype=torch.int8), torch.full((1, 1), 0.5), None, 3)
    positions, scale = torch.tensor([[0.6, -2.4, 9.0, -9.0]], requires_grad=True), start.scale.clone().requires_grad_()
    moving(start).rebuild({"positions": positions, "scale": scale}).dense().sum().backward()
    assert positions.grad.tolist() == [[0.5, 0.5, 0, 0]]
    assert scale.grad.item() == 1 - 2 + 3 - 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_free_grid_begins_as_it_is_and_is_stored_as_it_is_computed_with(symmetric, dtype):
    """Whatever has moved, and to the bit: scales as they are stored, whole zero points within the codes."""
    mask = torch.rand(6, 32, generator=torch.Generator().manual_seed(1)) < 0.6
    weight = torch.randn(6, 32).to(dtype) * mask
    first = RTN(bits=3, group_size=16, symmetric=symmetric).nearest(weight, mask)
    begun = moving(first, weight, Moving.free)
    assert begun.dense().equal(first.dense()) and stopped(begun).inner.codes.equal(first.inner.codes)
    moved = {
        name: (value.float() * 1.3 + torch.randn(value.shape) * (2 if name == "zeros" else 0.3))
        for name, value in begun.parameters().items()
    }
    after = stopped(begun.rebuild(moved))
    assert after.dense(torch.float32).equal(begun.rebuild(moved).dense(torch.float32)) and after.dtype == dtype
    assert not after.dense()[~mask].any() and after.inner.codes.min() >= -4 and after.inner.codes.max() <= 3
    assert symmetric or (after.inner.zero_point.dtype == torch.int8 and not after.inner.zero_point.equal(first.inner.zero_point))


def test_the_gradients_of_a_free_grid():
    """Inside the range 1 to a weight and round(w/s) - w/s to its scale; beyond it nothing, and the last code less the zero-point;
    to the zero-point -s of every weight that is clipped."""
    grid = Quantized(torch.zeros(1, 4, dtype=torch.int8), torch.full((1, 1), 0.5), torch.ones(1, 1, dtype=torch.int8), 3)
    begun = moving(grid, torch.tensor([[0.3, -1.2, 9.0, -9.0]]), Moving.free)
    leaves = {name: value.clone().requires_grad_() for name, value in begun.parameters().items()}
    begun.rebuild(leaves).dense().sum().backward()
    assert leaves["positions"].grad.tolist() == [[0.5, 0.5, 0, 0]]  # a step of 1 is a move of s
    expected = (1 - 0.6) + (-2 + 2.4) + (3 - 1) + (-4 - 1)
    assert leaves["scale"].grad.item() == pytest.approx(expected, rel=1e-5)
    assert leaves["zeros"].grad.item() == -2 * 0.5


def test_factors_move_and_other_forms_are_left_alone():
    dense = Dense(torch.randn(4, 4))
    assert moving(dense) is dense and stopped(dense) is dense
    low_rank = LowRank(grid(True, (16, 32)), grid(False, (6, 16)))
    begun = moving(low_rank)
    assert isinstance(begun.down, Moving) and isinstance(begun.up, Moving)
    assert stopped(begun).dense().equal(low_rank.dense()) and type(stopped(begun).up) is Quantized


def test_a_scale_of_zero_stays_finite():
    begun = moving(Quantized(torch.zeros(1, 4, dtype=torch.int8), torch.zeros(1, 1), None, 4))
    assert begun.dense().eq(0).all() and stopped(begun).codes.eq(0).all()
