"""k-means and nearest entries."""

from __future__ import annotations

import pytest
import torch

from compress.quant.codebooks import kmeans, nearest
from compress.quant.vptq import VPTQ


def vectors(n: int = 300, length: int = 3) -> torch.Tensor:
    return torch.randn(n, length, generator=torch.Generator().manual_seed(0))


def distortion(found: torch.Tensor, entries: torch.Tensor, weights: torch.Tensor) -> float:
    return float(((found - entries[nearest(found, entries)]).square().sum(1) * weights).sum())


def test_the_nearest_entry_is_the_nearest():
    found, entries = vectors(), vectors(20)
    assert torch.equal(nearest(found, entries), torch.cdist(found, entries).argmin(1))


def test_every_iteration_lowers_the_weighted_distortion():
    found = vectors()
    weights = torch.rand(len(found), generator=torch.Generator().manual_seed(1)) ** 3
    falling = [distortion(found, kmeans(found, weights, 16, n), weights) for n in (1, 2, 4, 8, 30)]
    assert falling == sorted(falling, reverse=True) and falling[-1] < 0.9 * falling[0]


def test_few_distinct_vectors_are_met_exactly_and_weights_decide():
    corners = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [5.0, 5.0]])
    found = corners[torch.randint(0, 4, (80,), generator=torch.Generator().manual_seed(0))]
    assert distortion(found, kmeans(found, torch.ones(80), 4, 10), torch.ones(80)) == pytest.approx(0, abs=1e-10)
    heavy = torch.where(found.sum(1) == 10, 1000.0, 1.0)
    assert torch.allclose(kmeans(found, heavy, 1, 5), torch.tensor([[5.0, 5.0]]), atol=0.3)
    assert kmeans(corners, torch.ones(4), 8, 3).shape == (8, 2)


def test_a_length_is_lowered_to_a_divisor_and_large_books_are_refused():
    assert VPTQ(length=8, entries=16).form((20, 64)).length == 5
    with pytest.raises(ValueError, match="use fewer entries"):
        VPTQ(length=4, entries=256).form((16, 32))
