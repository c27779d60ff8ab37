"""ASVD: plain SVD at alpha 0, a diagonal metric above, and its search for ranks."""

import pytest
import torch

from compress.lowrank.asvd import ASVD
from compress.lowrank.svd import SVD
from compress.lowrank.svd_llm import SVDLLM
from compress.stats import LinearStats
from compress.weights import LowRank, Weight


def stats_of(x: torch.Tensor) -> LinearStats:
    stats = LinearStats(x.shape[1], {"abssum", "absmax", "covariance"})
    stats.add(x)
    return stats.finish()


def uneven(n_tokens: int, n_inputs: int) -> torch.Tensor:
    mixing = torch.eye(n_inputs, dtype=torch.float64) + 0.3 * torch.randn(n_inputs, n_inputs, dtype=torch.float64)
    return torch.randn(n_tokens, n_inputs, dtype=torch.float64) * torch.logspace(1, -1, n_inputs, dtype=torch.float64) @ mixing


def product(result: Weight) -> torch.Tensor:
    assert isinstance(result, LowRank)
    return result.up.dense(torch.float64) @ result.down.dense(torch.float64)


@pytest.mark.parametrize("size", ["mean", "largest"])
def test_no_power_is_plain_svd(size):
    weight, stats = torch.randn(24, 40, dtype=torch.float64), stats_of(uneven(100, 40))
    ours, plain = (step.linear(weight, stats, None) for step in (ASVD(rank=9, alpha=0, size=size), SVD(rank=9)))
    torch.testing.assert_close(product(ours), product(plain))


@pytest.mark.parametrize("size", ["mean", "largest"])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_it_is_the_decomposition_of_the_scaled_matrix(shape, size):
    weight, x = torch.randn(*shape, dtype=torch.float64), uneven(100, shape[1])
    sizes = x.abs().mean(0) if size == "mean" else x.abs().amax(0)
    scale = sizes.sqrt()
    u, s, vh = torch.linalg.svd(weight * scale, full_matrices=False)
    result = product(ASVD(rank=9, size=size).linear(weight, stats_of(x), None))
    torch.testing.assert_close(result, u[:, :9] * s[:9] @ vh[:9] / scale, rtol=1e-4, atol=1e-4)


def test_full_rank_loses_nothing():
    weight, stats = torch.randn(24, 40, dtype=torch.float64), stats_of(uneven(100, 40))
    down, up = ASVD().factors(weight, stats, 24)
    torch.testing.assert_close(up @ down, weight)


@pytest.mark.parametrize("seed", range(3))
def test_whitening_is_never_worse_on_its_inputs(seed):
    torch.manual_seed(seed)
    weight, x = torch.randn(24, 40, dtype=torch.float64), uneven(200, 40)
    stats = stats_of(x)
    errors = [
        ((weight - product(step.linear(weight, stats, None))) @ x.T).square().sum()
        for step in (SVDLLM(rank=9), ASVD(rank=9), ASVD(rank=9, alpha=1), SVD(rank=9))
    ]
    assert errors[0] <= min(errors[1:]) and errors[1] < errors[3]


def test_inputs_that_were_never_seen():
    weight, x = torch.randn(24, 40, dtype=torch.float64), uneven(100, 40)
    x[:, 5:9] = 0
    for stats in (stats_of(x), LinearStats(40, {"abssum", "absmax"})):
        result = product(ASVD(rank=9).linear(weight, stats, None))
        assert result.isfinite().all() and result[:, 5:9].norm() < 10 * weight[:, 5:9].norm()


def test_measured_ranks_go_where_truncation_hurts():
    """Through the survey and the allocation, with the errors of the layers themselves as effects."""
    x = uneven(100, 40)
    step, stats = ASVD(ratio=0.5, ranks="sensitivity"), stats_of(x)
    weights = {"a.0.flat": torch.randn(40, 40), "a.0.steep": torch.randn(40, 40) * torch.logspace(0, -3, 40).unsqueeze(1)}

    def survey(weight: torch.Tensor):
        from compress.weights import Dense

        def effect(other: Weight) -> float:
            return float((weight - other.dense()).square().sum() / weight.square().sum())

        return step.survey(Dense(weight), stats.only(step.needs.stats), effect)

    found = {name: survey(weight) for name, weight in weights.items()}
    assert found["a.0.flat"]["effects"] == sorted(found["a.0.flat"]["effects"], reverse=True)
    chosen = {name: chosen.rank_of(40, 40) for name, chosen in step.allocate(found, []).items()}
    flat, steep = (1600 if rank is None else rank * 80 for rank in chosen.values())
    assert flat > steep and flat + steep <= 1600
