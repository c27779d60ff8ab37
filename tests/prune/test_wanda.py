"""Wanda: its metric, its invariances, and inputs that no token activates."""

import pytest
import torch

from compress.prune.magnitude import Magnitude
from compress.prune.wanda import Wanda
from compress.stats import LinearStats
from tests.inputs import stats_of


def mask_of(weight: torch.Tensor, x: torch.Tensor, **settings) -> torch.Tensor:
    mask = Wanda(**settings).linear(weight, stats_of(x), None).mask
    assert mask is not None
    return mask


def test_metric():
    weight, x = torch.randn(8, 32), torch.randn(50, 32)
    expected = weight.abs() * ((x.T @ x).diagonal() / 50).sqrt()
    torch.testing.assert_close(Wanda().scores(weight, stats_of(x)), expected)


@pytest.mark.parametrize("pattern", ["row", "2:4"])
def test_mask_survives_scaling_the_inputs_and_unscaling_the_weight(pattern):
    weight, x = torch.randn(8, 32), torch.randn(50, 32)
    scale = 2.0 ** torch.randint(-3, 4, (32,))  # powers of two, so that nothing is rounded
    mask = mask_of(weight, x, pattern=pattern)
    assert torch.equal(mask, mask_of(weight * scale, x / scale, pattern=pattern))
    assert torch.equal(mask, mask_of(weight, x * 8, pattern=pattern))


def test_equal_norms_are_magnitude_by_row():
    weight = torch.randn(8, 32)
    magnitude = Magnitude(pattern="row").linear(weight, LinearStats(32, ()), None)
    assert magnitude.mask is not None
    assert torch.equal(mask_of(weight, torch.eye(32)), magnitude.mask)
    assert torch.equal(mask_of(weight, torch.empty(0, 32)), magnitude.mask)


def test_two_of_four_and_rows_are_exact():
    weight, x = torch.randn(8, 32), torch.randn(50, 32)
    assert bool((mask_of(weight, x, pattern="2:4").unflatten(1, (8, 4)).sum(2) == 2).all())
    assert bool((mask_of(weight, x, sparsity=0.7).sum(1) == 32 - int(32 * 0.7)).all())


def test_dead_input_goes_first_and_one_token_is_enough():
    weight, x = torch.randn(8, 32), torch.randn(1, 32)
    x[0, 3] = 0
    assert not bool(mask_of(weight, x, sparsity=0.1)[:, 3].any())


def test_reads_nothing_but_its_declared_statistic():
    with pytest.raises(AttributeError, match="sqnorm"):
        stats = LinearStats(32, {"absmax"})
        stats.add(torch.randn(3, 32))
        Wanda().linear(torch.randn(8, 32), stats, None)
