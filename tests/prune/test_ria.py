"""RIA: its metric, and what it protects."""

import pytest
import torch

from compress.prune.magnitude import Magnitude
from compress.prune.ria import RIA
from compress.stats import LinearStats
from tests.inputs import stats_of


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_metric():
    weight, x = draw(8, 32), draw(50, 32, seed=1)
    norms = x.square().mean(0).sqrt()
    for power in (0.5, 1.0):
        expected = torch.empty(8, 32)
        for i in range(8):
            for j in range(32):
                share = weight[i, j] / weight[:, j].abs().sum(), weight[i, j] / weight[i].abs().sum()
                expected[i, j] = (share[0].abs() + share[1].abs()) * norms[j] ** power
        torch.testing.assert_close(RIA(power=power).scores(weight, stats_of(x)), expected)
    torch.testing.assert_close(RIA(power=0).scores(weight, stats_of(x)), RIA().scores(weight, stats_of(torch.empty(0, 32))))


@pytest.mark.parametrize("pattern", ["row", "2:4"])
def test_mask_does_not_depend_on_the_scale_of_weights_or_inputs(pattern):
    weight, x, step = draw(8, 32), draw(50, 32, seed=1), RIA(pattern=pattern)
    masks = [step.linear(w, stats_of(y), None).mask for w, y in ((weight, x), (weight * 4, x), (weight, x * 4))]
    assert masks[0] is not None and all(mask is not None and torch.equal(mask, masks[0]) for mask in masks)


def test_no_input_loses_all_its_weights():
    weight, x = draw(16, 64), draw(200, 64, seed=1)
    weight[:, 5] *= 1e-3
    magnitude = Magnitude(pattern="row").linear(weight, LinearStats(64, ()), None).mask
    found = RIA().linear(weight, stats_of(x), None).mask
    assert magnitude is not None and found is not None
    assert not bool(magnitude[:, 5].any()) and int(found[:, 5].sum()) >= 4


def test_empty_rows_and_columns_and_an_earlier_mask():
    weight, mask = draw(8, 32), draw(8, 32, seed=2) > -0.3
    weight[3], weight[:, 7] = 0, 0
    result = RIA(sparsity=0.75).linear(weight * mask, stats_of(draw(50, 32, seed=1)), mask)
    assert bool(RIA().scores(weight, stats_of(draw(50, 32))).isfinite().all())
    assert result.mask is not None and not bool((result.mask & ~mask).any())
    assert bool((result.mask.sum(1) == 8).all())
