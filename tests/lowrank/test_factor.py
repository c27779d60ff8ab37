"""Rank arithmetic, the projection and its outlines."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from compress.lowrank.factor import leading_directions, orthonormalised, project, rank_for
from compress.lowrank.svd import SVD
from compress.stats import LinearStats
from compress.weights import Dense, LowRank, Masked

NO_STATS = LinearStats(40, ())


@given(st.floats(0.01, 1), st.integers(2, 4096), st.integers(2, 4096), st.sampled_from([1, 8, 32]))
def test_rank_keeps_the_budget(ratio, n_outputs, n_inputs, round_to):
    rank = rank_for(ratio, n_outputs, n_inputs, round_to)
    if rank is None:
        return
    per_rank, elements = n_outputs + n_inputs, n_outputs * n_inputs
    assert rank >= 1 and rank * per_rank < elements
    if rank > round_to:
        assert rank % round_to == 0 and rank * per_rank <= ratio * elements * (1 + 1e-6)
        assert (rank + round_to) * per_rank > ratio * elements * (1 - 1e-6)


def test_rank_of_known_shapes():
    assert rank_for(0.5, 4096, 4096) == 1024
    assert rank_for(0.8, 11008, 4096) == int(0.8 * 11008 * 4096 / 15104)
    assert rank_for(0.8, 768, 768, 32) == 288
    assert rank_for(0.01, 768, 768, 32) == 32
    assert rank_for(1.0, 768, 2048) is None
    assert rank_for(0.5, 1, 64) is None


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
def test_truncation_error_is_the_tail_of_the_spectrum(shape):
    weight = torch.randn(*shape, dtype=torch.float64)
    values = torch.linalg.svdvals(weight)
    for rank in (1, 7, min(shape)):
        down, up = project(weight, leading_directions(weight, rank))
        error = (weight - up @ down).square().sum()
        torch.testing.assert_close(error, values[rank:].square().sum(), rtol=1e-10, atol=1e-20)
        torch.testing.assert_close(up.norm(dim=0), down.norm(dim=1))
        torch.testing.assert_close(up.norm(dim=0).square(), values[:rank])


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_matrices_of_lower_rank_are_exact_and_finite(shape):
    weight = torch.randn(shape[0], 3, dtype=torch.float64) @ torch.randn(3, shape[1], dtype=torch.float64)
    for matrix in (weight, torch.zeros(shape, dtype=torch.float64)):
        down, up = project(matrix, leading_directions(matrix, 8))
        torch.testing.assert_close(up @ down, matrix, rtol=0, atol=1e-10)


@pytest.mark.parametrize("sizes", [(1.0, 1.0, 1.0), (1e8, 1.0, 1e-8), (1.0, 1e-3, 0.0)])
@pytest.mark.parametrize("mixing", [0.0, 1e-6, 1.0])
def test_bases_are_orthonormal_whatever_their_columns_are(sizes, mixing):
    """The sizes of columns do not matter; nor do columns that are far from orthogonal, or that are zero."""
    basis = torch.linalg.qr(torch.randn(20, 3, dtype=torch.float64)).Q
    columns = (basis + mixing * torch.randn(20, 3, dtype=torch.float64)) * torch.tensor(sizes, dtype=torch.float64)
    found = orthonormalised(columns)
    torch.testing.assert_close(found.T @ found, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-12)
    left = columns - found @ (found.T @ columns)
    assert float((left.norm(dim=0) / columns.norm(dim=0).clamp_min(1e-300)).amax()) < 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_layer_and_outline(dtype):
    weight = torch.randn(24, 40).to(dtype)
    step = SVD(ratio=0.6)
    result, outline = step.linear(weight, NO_STATS, None), step.outline(weight.to("meta"), NO_STATS, None)
    assert isinstance(result, LowRank) and isinstance(outline, LowRank)
    assert result.rank == outline.rank == int(0.6 * 24 * 40 / 64) and result.dtype == outline.dtype == dtype
    assert result.nbytes == outline.nbytes <= 0.6 * Dense(weight).nbytes
    assert SVD(rank=5).linear(weight, NO_STATS, None).numel == 5 * 64


def test_nothing_is_factored_where_it_would_not_save():
    weight, mask = torch.randn(24, 40), torch.rand(24, 40) < 0.5
    for step in (SVD(ratio=1.0), SVD(rank=15), SVD(rank=100)):
        whole = step.linear(weight, NO_STATS, None)
        assert isinstance(whole, Dense) and torch.equal(whole.values, weight)
        assert isinstance(step.linear(weight * mask, NO_STATS, mask), Masked)
        assert isinstance(step.outline(weight, NO_STATS, None), Dense)
        assert isinstance(step.outline(weight, NO_STATS, mask), Masked)
    assert isinstance(SVD(rank=14).linear(weight, NO_STATS, None), LowRank)


def test_fields():
    for wrong in ({"ratio": 0.0}, {"ratio": 1.1}, {"rank": 0}, {"round_to": 0}):
        with pytest.raises(ValidationError):
            SVD.model_validate(wrong)
