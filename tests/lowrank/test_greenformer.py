"""Greenformer: its ranks and shares, and semi-nonnegative factors."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from pydantic import ValidationError

from compress.lowrank.factor import leading_directions
from compress.lowrank.greenformer import Greenformer, semi_nonnegative
from compress.lowrank.svd import SVD
from compress.stats import LinearStats
from compress.weights import Dense, LowRank

NO_STATS = LinearStats(40, ())


def distance(weight: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> float:
    return float((weight - up @ down).square().sum())


def test_a_rank_below_one_is_a_share_of_the_largest_that_pays():
    weight = torch.randn(24, 40)  # factors are as large as the matrix at a rank of 15
    for wanted, rank in ((0.4, 6), ("0.4", 6), (5, 5), ("5", 5), (14, 14)):
        result = Greenformer.model_validate({"rank": wanted}).linear(weight, NO_STATS, None)
        assert isinstance(result, LowRank) and result.rank == rank
        assert result.numel <= weight.numel()
    assert isinstance(Greenformer(rank=15).linear(weight, NO_STATS, None), Dense)
    assert Greenformer.model_validate({"rank": 0.4}) == Greenformer(ratio=0.4)
    for wrong in ({"rank": 0}, {"rank": -1}, {"rank": 1.5}, {"rank": 0.4, "ratio": 0.4}, {"solver": "random"}):
        with pytest.raises(ValidationError):
            Greenformer.model_validate(wrong)


def test_its_svd_is_svd_and_a_matrix_of_that_rank_is_exact():
    weight = torch.randn(24, 40)
    ours, plain = (method(rank=6).linear(weight, NO_STATS, None).dense() for method in (Greenformer, SVD))
    assert ours.equal(plain)
    low = torch.randn(24, 6) @ torch.randn(6, 40)
    torch.testing.assert_close(Greenformer(rank=6).linear(low, NO_STATS, None).dense(), low, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_semi_nonnegative_factors(shape):
    weight = torch.randn(*shape, dtype=torch.float64)
    directions = leading_directions(weight, 6)
    least = distance(weight, directions.T @ weight, directions)
    found = [distance(weight, *semi_nonnegative(weight, 6, iterations)) for iterations in (1, 2, 3, 10, 100)]
    assert all(later <= sooner * (1 + 1e-12) for sooner, later in pairwise(found))
    assert least <= found[-1] < 0.7 * weight.square().sum()
    down, up = semi_nonnegative(weight, 6, 10)
    assert down.shape == (6, shape[1]) and up.shape == (shape[0], 6) and bool((down >= 0).all())
    torch.testing.assert_close(up.norm(dim=0), down.norm(dim=1))
    again = semi_nonnegative(weight, 6, 10)
    assert down.equal(again[0]) and up.equal(again[1])
    result = Greenformer(rank=6, solver="snmf").linear(weight.float(), NO_STATS, None)
    assert isinstance(result, LowRank) and bool((result.down.dense() >= 0).all())


def test_factors_that_exist_are_found():
    down, up = torch.rand(3, 40, dtype=torch.float64), torch.randn(24, 3, dtype=torch.float64)
    weight = up @ down
    assert distance(weight, *semi_nonnegative(weight, 3, 500)) < 1e-3 * weight.square().sum()


def test_matrices_of_lower_rank_stay_finite():
    for weight in (torch.zeros(24, 40).double(), torch.randn(24, 2).double() @ torch.randn(2, 40).double()):
        down, up = semi_nonnegative(weight, 6, 50)
        assert down.isfinite().all() and up.isfinite().all()
        assert distance(weight, down, up) <= weight.square().sum()
