"""Low rank plus sparse: budgets in bytes, whole rows, single entries, and alternations that never get worse."""

from __future__ import annotations

from itertools import islice, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.export import layers
from compress.lowrank.factor import leading_directions, project
from compress.lowrank.losparse import LoSparse, set_apart
from compress.lowrank.sltrain import SLTrain, fitted, rounds
from compress.lowrank.sparse import LowRankAndSparse, largest
from compress.lowrank.svd_llm import SVDLLM
from compress.stats import LinearStats
from compress.weights import Dense, LowRank, Outliers, Rows, Sum, Weight

METHODS: list[type[LowRankAndSparse]] = [LoSparse, SLTrain]


def stats_of(n_inputs: int, n_tokens: int = 400) -> LinearStats:
    stats = LinearStats(n_inputs, {"covariance"})
    mixing = torch.randn(n_inputs, n_inputs) * torch.logspace(0.5, -0.5, n_inputs)
    stats.add(torch.randn(n_tokens, n_inputs) @ mixing.T)
    return stats.finish()


def error(weight: torch.Tensor, result: Weight, stats: LinearStats) -> float:
    change = weight.double() - result.dense(torch.float64)
    return float((change @ stats.covariance * change).sum())


@pytest.mark.parametrize("method", METHODS)
@settings(deadline=None, max_examples=40)
@given(
    st.floats(0.05, 1), st.floats(0, 0.99), st.integers(2, 90), st.integers(2, 90),
    st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_bytes_are_at_most_those_of_factors_alone_and_planned_exactly(method, ratio, share, n_outputs, n_inputs, dtype):
    weight, none = torch.empty(n_outputs, n_inputs, dtype=dtype, device="meta"), LinearStats(n_inputs, ())
    step, pure = method(ratio=ratio, sparse_share=share), SVDLLM(ratio=ratio)
    outlined, factors = step.outline(weight, none, None), pure.outline(weight, none, None)
    assert outlined.shape == (n_outputs, n_inputs) and outlined.nbytes <= factors.nbytes
    if isinstance(outlined, Sum):
        low, sparse = outlined.parts
        assert isinstance(low, LowRank) and low.rank >= 1
        unit = (n_inputs + 1) * 4 if method is LoSparse else 6
        assert factors.nbytes - outlined.nbytes < max(unit, (n_outputs + n_inputs) * dtype.itemsize)
        assert sparse.numel > 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_outline_and_file_agree(method, dtype):
    weight, stats = torch.randn(48, 40).to(dtype), stats_of(40)
    step = method(ratio=0.7, sparse_share=0.3)
    result, outlined = step.linear(weight, stats, None), step.outline(weight.to("meta"), stats, None)
    assert isinstance(result, Sum) and isinstance(result.parts[1], Rows if method is LoSparse else Outliers)
    tensors, planned = (layers.tensors("layer", each) for each in (result, outlined))
    assert {name: (t.shape, t.dtype) for name, t in tensors.items()} == {name: (t.shape, t.dtype) for name, t in planned.items()}
    assert result.nbytes == outlined.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    assert result.dense().isfinite().all() and result.dtype == dtype
    assert isinstance(method(ratio=1.0).linear(weight, stats, None), Dense)
    alone = method(ratio=0.7, sparse_share=0.0).linear(weight, stats, None)
    assert isinstance(alone, LowRank) and alone.dense().equal(SVDLLM(ratio=0.7).linear(weight, stats, None).dense())


def test_the_largest():
    found = largest(torch.tensor([[3.0, 1.0], [3.0, 3.0]]), 2)
    assert found.tolist() == [[True, False], [True, False]]
    assert not largest(torch.rand(4), 0).any() and largest(torch.rand(4), 4).all()


# whole rows


def test_neurons_unlike_the_others_are_set_apart():
    weight = torch.randn(48, 5) @ torch.randn(5, 40)
    odd = torch.tensor([3, 17, 18, 40])
    weight[odd] = 2 * torch.randn(4, 40)
    stats = stats_of(40)
    split = set_apart(weight.double(), torch.linalg.cholesky(stats.covariance), 5, 4, 10)
    assert split.where.nonzero().flatten().tolist() == odd.tolist()
    torch.testing.assert_close((split.up @ split.down + split.sparse).float(), weight, rtol=0, atol=1e-4)


def test_rows_are_exact_and_no_round_is_worse():
    weight, root = torch.randn(48, 40).double(), torch.linalg.cholesky(stats_of(40).covariance)
    errors = []
    for most in (1, 2, 3, 10):
        split = set_apart(weight, root, 8, 6, most)
        left = weight - split.sparse - split.up @ split.down
        assert int(split.where.sum()) == 6 and not split.sparse[~split.where].any()
        torch.testing.assert_close(left[split.where], torch.zeros(6, 40).double(), rtol=0, atol=1e-10)
        errors.append(float((left @ root).square().sum()))
    assert all(later <= sooner * (1 + 1e-12) for sooner, later in pairwise(errors))


# single entries


@pytest.mark.parametrize("kind", ["identity", "diagonal", "full"])
def test_the_alternation_never_gets_worse(kind):
    """For exact steps, which a diagonal covariance or a support that stays allow."""
    weight, covariance = torch.randn(32, 40).double(), stats_of(40).covariance
    covariance = {"identity": torch.eye(40).double(), "diagonal": covariance.diagonal().diag(), "full": covariance}[kind]
    root = torch.linalg.cholesky(covariance)
    where = largest(torch.rand(32, 40), 150) if kind == "full" else None
    errors = []
    for error, split in islice(rounds(weight, covariance, root, 6, 150, where), 12):
        assert int(split.where.sum()) == 150 and not split.sparse[~split.where].any() and split.down.shape == (6, 40)
        left = (weight - split.sparse - split.up @ split.down) @ root
        assert error == pytest.approx(float(left.square().sum()))
        errors.append(error)
    assert all(later <= sooner * (1 + 1e-10) for sooner, later in pairwise(errors))
    down, up = project(weight, leading_directions(weight @ root, 6))
    assert errors[0] < float(((weight - up @ down) @ root).square().sum())


def test_entries_are_fitted_to_the_outputs():
    target, covariance = torch.randn(8, 30).double(), stats_of(30).covariance / 400
    where = torch.rand(8, 30) < 0.2
    found = torch.zeros_like(target)
    for _ in range(60):
        found = fitted(target, covariance, found, where)
    for row in range(8):
        on = where[row]
        exact = torch.linalg.solve(covariance[on][:, on], (target[row] @ covariance)[on])
        torch.testing.assert_close(found[row, on], exact, rtol=1e-4, atol=1e-4)
    diagonal = torch.rand(30).double().diag()
    torch.testing.assert_close(fitted(target, diagonal, torch.zeros_like(target), where), target * where)


def test_a_sum_that_exists_is_found():
    low, where = torch.randn(48, 3) @ torch.randn(3, 40), torch.rand(48, 40) < 0.03
    weight = (low + 8 * where * torch.randn(48, 40)).double()
    eye = torch.eye(40).double()
    _, split = next(islice(rounds(weight, eye, eye, 3, int(where.sum())), 99, None))
    assert (weight - split.sparse - split.up @ split.down).norm() < 0.02 * weight.norm()


def test_better_than_factors_alone_and_than_a_random_support():
    weight, stats = torch.randn(64, 48), stats_of(48)
    chosen, drawn, pure = (
        error(weight, step.linear(weight, stats, None), stats)
        for step in (SLTrain(ratio=0.6), SLTrain(ratio=0.6, support="random"), SVDLLM(ratio=0.6))
    )
    assert chosen < 0.8 * pure and chosen < drawn


@pytest.mark.parametrize("n_tokens", [0, 3])
@pytest.mark.parametrize("method", METHODS)
def test_few_tokens_do_not_ruin_the_layer(method, n_tokens):
    weight, stats = torch.randn(32, 24), stats_of(24, n_tokens)
    result = method(ratio=0.8, sparse_share=0.2).linear(weight, stats, None).dense()
    assert (result - weight).norm() < weight.norm()
