"""Calibration statistics: every operation equals the direct computation on the tokens."""

import pytest
import torch

from compress.stats import LinearStats

EVERY = ("sum", "sqnorm", "abssum", "absmax", "hessian", "covariance")
LINEAR = ("sum", "sqnorm", "hessian", "covariance")


def gather(x: torch.Tensor, *wanted: str) -> LinearStats:
    stats = LinearStats(x.shape[-1], wanted)
    stats.add(x)
    return stats.finish()


def direct(x: torch.Tensor) -> dict[str, torch.Tensor]:
    x = x.double()
    return {
        "sum": x.sum(0),
        "sqnorm": x.square().sum(0),
        "abssum": x.abs().sum(0),
        "absmax": x.abs().amax(0),
        "hessian": x.T @ x,
        "covariance": x.T @ x,
    }


def assert_equal(stats: LinearStats, x: torch.Tensor, names=EVERY) -> None:
    assert stats.n == len(x)
    for name in names:
        torch.testing.assert_close(getattr(stats, name).double(), direct(x)[name], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", EVERY)
def test_each_statistic_alone(name):
    x = torch.randn(50, 12)
    assert_equal(gather(x, name), x, [name])


@pytest.mark.parametrize("n_inputs", [12, 256, 700, 1030])
@pytest.mark.parametrize("name", ["hessian", "covariance"])
def test_second_moment_of_any_width(n_inputs, name):
    x = torch.randn(64, n_inputs)
    second_moment = getattr(gather(x, name), name)
    torch.testing.assert_close(second_moment.double(), direct(x)[name], rtol=1e-4, atol=1e-3)
    assert torch.equal(second_moment, second_moment.T)


def test_batches_of_any_shape_sum():
    x = torch.randn(60, 12)
    stats = LinearStats(12, EVERY)
    stats.add(x[:20].reshape(4, 5, 12))
    stats.add(x[20:21])
    stats.add(x[21:].unsqueeze(0))
    assert_equal(stats.finish(), x)


def test_many_rows_are_split(monkeypatch):
    monkeypatch.setattr("compress.stats._ROWS_PER_SUM", 7)
    x = torch.randn(50, 12)
    assert_equal(gather(x, *EVERY), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_inputs_are_summed_in_float32(dtype):
    x = (torch.randn(4096, 16) + 3).to(dtype)
    expected = x.double().T @ x.double()
    assert ((gather(x, "hessian").hessian.double() - expected).abs() / expected).max() < 1e-4


def test_float64_inputs_keep_their_precision():
    x = torch.randn(50, 12, dtype=torch.float64)
    torch.testing.assert_close(gather(x, "covariance").covariance, x.T @ x, rtol=1e-13, atol=1e-13)


def test_merge():
    x = torch.randn(50, 12)
    assert_equal(gather(x[:20], *EVERY).merge(gather(x[20:], *EVERY)), x)


@pytest.mark.parametrize("n_outputs", [5, 20])
def test_through(n_outputs):
    x, matrix = torch.randn(50, 12), torch.randn(n_outputs, 12)
    assert_equal(gather(x, *EVERY).through(matrix), x @ matrix.T, LINEAR)
    with pytest.raises(AttributeError):
        gather(x, *EVERY).through(matrix).absmax  # noqa: B018
    with pytest.raises(AttributeError, match="carried"):
        gather(x, "sqnorm").through(matrix)
    assert_equal(gather(x, "sum").through(matrix), x @ matrix.T, ["sum"])
    with pytest.raises(AttributeError, match="carried"):
        gather(x, "sum", "sqnorm").through(matrix)


def test_scaled():
    x, scale = torch.randn(50, 12), torch.rand(12) + 0.5
    assert_equal(gather(x, *EVERY).scaled(scale), x / scale)
    assert_equal(gather(x, "sum").scaled(-scale), x / -scale, ["sum"])


def test_a_covariance_gives_the_rest():
    x = torch.randn(50, 12)
    stats = gather(x, *LINEAR)
    assert set(stats._sums) == {"sum", "covariance"}
    assert_equal(stats, x, LINEAR)
    assert stats.covariance.dtype == torch.float64 and stats.hessian.dtype == stats.sqnorm.dtype == torch.float32


def test_undeclared_statistics_raise():
    stats = gather(torch.randn(50, 12), "hessian")
    for name in ("sqnorm", "absmax", "covariance"):
        with pytest.raises(AttributeError, match="not declared"):
            getattr(stats, name)
    assert stats.only({"sqnorm"}).sqnorm.shape == (12,)
    with pytest.raises(AttributeError, match="not declared"):
        stats.only({"sqnorm"}).hessian  # noqa: B018
    with pytest.raises(AttributeError, match="not gathered"):
        stats.only({"absmax"}).absmax  # noqa: B018
    with pytest.raises(ValueError, match="unknown statistics"):
        LinearStats(12, {"variance"})


def test_cached_factors_are_shared_until_more_is_added():
    stats, calls = gather(torch.randn(50, 12), "hessian"), []
    for view in (stats, stats.only({"hessian"}), stats.only({"sqnorm"})):
        assert view.cached("key", lambda: calls.append(1) or 7) == 7
    assert len(calls) == 1
    stats.add(torch.randn(1, 12))
    assert stats.cached("key", lambda: 8) == 8
