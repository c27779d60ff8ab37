"""HQQ: what the splitting must equal in closed form, the kept best, masks, whole zero-points and sizes."""

from itertools import pairwise

import pytest
import torch

from compress.apply import apply, outline
from compress.prune.magnitude import Magnitude
from compress.quant.grids import fit_grid
from compress.quant.hqq import HQQ, best_zero, shifted_zero
from compress.quant.rtn import RTN
from compress.stats import LinearStats
from compress.weights import Affine, Dense, LowRank, Masked, Quantized

NO_STATS = LinearStats(128, ())


def skewed(n_rows: int = 32, n_inputs: int = 128, seed: int = 0) -> torch.Tensor:
    """Weights with a long tail on one side, where a shifted grid helps."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(n_rows, n_inputs, generator=generator)
    return 0.02 * torch.where(normal > 1.5, 2 * normal, normal)


def error(weight: torch.Tensor, dense: torch.Tensor, power: float) -> torch.Tensor:
    return (weight - dense).abs().pow(power).unflatten(1, (-1, 64)).sum(-1)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("power", [0.7, 1.0])
def test_no_group_is_worse_than_where_it_began(bits, power):
    weight = skewed()
    start = RTN(bits=bits, group_size=64, symmetric=False).linear(weight, NO_STATS, None).dense()
    found = HQQ(bits=bits, power=power).linear(weight, NO_STATS, None).dense()
    before, after = error(weight, start, power), error(weight, found, power)
    assert bool((after <= before * (1 + 1e-5)).all())
    assert after.sum() < 0.97 * before.sum()


def test_without_sparse_errors_the_start_is_a_fixed_point():
    """p = 1 and an endless penalty: all of the error counts as sparse, so nothing is left to fit."""
    steps = torch.randn(5, 3, 16, dtype=torch.float64) * 4
    zero = torch.rand(5, 3, dtype=torch.float64)
    codes = (steps + zero.unsqueeze(-1)).round().clamp(-8, 7)
    torch.testing.assert_close(shifted_zero(steps, codes, zero, 1.0, float("inf")), zero)


def test_with_no_sparse_part_the_zero_is_the_least_squares_one():
    steps = torch.randn(5, 3, 16, dtype=torch.float64)
    zero = torch.zeros(5, 3, dtype=torch.float64)
    codes = steps.round()
    found = shifted_zero(steps, codes, zero, 0.7, 1e-9)
    torch.testing.assert_close(found, (codes - steps).mean(-1))
    for shift in (-0.01, 0.01):
        assert bool(((steps - codes + found.unsqueeze(-1)).square().sum(-1)
                     <= (steps - codes + found.unsqueeze(-1) + shift).square().sum(-1)).all())  # fmt: skip


def test_sparse_part_is_the_generalised_soft_threshold():
    steps = torch.tensor([[[0.05, -0.4, 0.0]]], dtype=torch.float64)
    zero = torch.zeros(1, 1, dtype=torch.float64)
    sparse = torch.tensor([0.0, -(0.4 - 0.4**-0.3 / 10), 0.0], dtype=torch.float64)  # 0.05 lies below its threshold
    expected = (torch.zeros(3, dtype=torch.float64) - steps[0, 0] + sparse).mean()
    torch.testing.assert_close(shifted_zero(steps, torch.zeros_like(steps), zero, 0.7, 10.0)[0, 0], expected)


@pytest.mark.parametrize("scale", [2.0**-6, 8.0])
def test_codes_do_not_depend_on_the_unit_of_the_weights(scale):
    weight = skewed()
    plain, scaled = (HQQ(bits=3).linear(value, NO_STATS, None) for value in (weight, scale * weight))
    assert isinstance(plain, Affine) and isinstance(scaled, Affine)
    assert plain.codes.equal(scaled.codes) and plain.zero.equal(scaled.zero)


@pytest.mark.parametrize("value", [0.0, 0.013, -2.5])
def test_constant_groups_are_exact(value):
    weight = torch.full((3, 128), value)
    torch.testing.assert_close(HQQ(bits=2).linear(weight, NO_STATS, None).dense(), weight, rtol=1e-6, atol=0)


def test_no_iterations_is_rounding_to_nearest():
    weight = skewed()
    nearest = RTN(group_size=64, symmetric=False).linear(weight, NO_STATS, None)
    assert HQQ(iterations=0).linear(weight, NO_STATS, None).dense().equal(nearest.dense())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_fit_the_zero_point_as_it_is_stored(dtype):
    weight = skewed().to(dtype)
    found = HQQ(bits=3).linear(weight, NO_STATS, None)
    assert isinstance(found, Affine) and found.zero.dtype == found.scale.dtype == dtype
    steps = (weight.float().unflatten(1, (-1, 64)) / found.scale.float().unsqueeze(-1)) + found.zero.float().unsqueeze(-1)
    assert found.codes.equal(steps.round().clamp(-4, 3).flatten(1).to(torch.int8))


def test_whole_zero_points_make_an_ordinary_grid():
    weight = skewed()
    found = HQQ(bits=2, integer_zero=True).linear(weight, NO_STATS, None)
    assert isinstance(found, Quantized) and found.zero_point is not None and found.zero_point.dtype == torch.int8
    start = RTN(bits=2, group_size=64, symmetric=False).linear(weight, NO_STATS, None)
    assert bool((error(weight, found.dense(), 0.7) <= error(weight, start.dense(), 0.7) * (1 + 1e-5)).all())


@pytest.mark.parametrize("whole", [True, False])
def test_a_mask_keeps_its_zeros(whole):
    weight = skewed()
    pruned = Magnitude(sparsity=0.5).linear(weight, NO_STATS, None)
    found = apply(HQQ(bits=3, integer_zero=whole), pruned, NO_STATS)
    assert isinstance(found, Masked) and isinstance(found.inner, Quantized if whole else Affine)
    assert pruned.mask is not None and found.kept.equal(pruned.mask)
    assert found.dense()[~pruned.mask].count_nonzero() == 0
    assert (found.dense() - pruned.dense()).norm() < 0.4 * pruned.dense().norm()


def test_pruning_afterwards_keeps_the_grid():
    found = HQQ().linear(skewed(), NO_STATS, None)
    assert isinstance(found, Affine)
    pruned = apply(Magnitude(sparsity=0.5), found, NO_STATS)
    assert isinstance(pruned, Masked) and isinstance(pruned.inner, Affine) and pruned.inner.scale is found.scale
    assert pruned.dense()[~pruned.kept].count_nonzero() == 0
    half_steps = (pruned.dense() - found.dense()).abs()[pruned.kept] / found.scale.repeat_interleave(64, 1)[pruned.kept]
    assert half_steps.max() <= 0.5 + 1e-4  # what rounding the zero-points moves


@pytest.mark.parametrize("settings", [{}, {"integer_zero": True}, {"bits": 3, "group_size": -1}])
def test_outline_has_the_result_s_sizes(settings):
    weight, step = skewed(), HQQ(**settings)
    mask = torch.rand(weight.shape) < 0.5
    for before in (Dense(weight), Dense(weight).masked(mask), LowRank(Dense(weight[:4]), Dense(weight[:, :4]))):
        result, outlined = apply(step, before, NO_STATS), outline(step, before.map(lambda tensor: tensor.to("meta")))
        assert (type(outlined), outlined.nbytes) == (type(result), result.nbytes)


def test_bits_per_weight_at_defaults():
    result = HQQ().linear(skewed().half(), NO_STATS, None)
    assert result.nbytes * 8 / result.numel == 4.5


def test_what_the_grid_cannot_hold_is_refused():
    with pytest.raises(ValueError, match="symmetric"):
        HQQ(symmetric=True)
    with pytest.raises(ValueError, match="integer_zero"):
        HQQ(activations="int8")


def test_best_of_the_iterations_is_kept():
    groups = skewed().unflatten(1, (-1, 64))
    grid = fit_grid(skewed(), 2, 64, False, False, torch.float32)
    assert grid.zero_point is not None

    def total(iterations: int) -> torch.Tensor:
        zero, codes = best_zero(groups, grid.scale, grid.zero_point, 2, 0.7, iterations, False)
        return (groups - (codes - zero.unsqueeze(-1)) * grid.scale.unsqueeze(-1)).abs().pow(0.7).sum(-1)

    errors = [total(n) for n in (0, 5, 20, 60)]
    assert all(bool((later <= earlier * (1 + 1e-5)).all()) for earlier, later in pairwise(errors))
