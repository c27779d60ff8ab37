"""SVD-LLM: its truncation identity, its equivalent forms, and too few tokens."""

import pytest
import torch

from compress.calibration import read_text, windows
from compress.lowrank.factor import leading_directions, project
from compress.lowrank.svd import SVD
from compress.lowrank.svd_llm import SVDLLM, covariance_root, root_of
from compress.methods import parse, with_effort
from compress.recipe import Calibration
from compress.stats import LinearStats
from compress.weights import LowRank, Weight


def correlated(n_tokens: int, n_inputs: int) -> torch.Tensor:
    mixing = torch.randn(n_inputs, n_inputs, dtype=torch.float64) * torch.logspace(1, -1, n_inputs, dtype=torch.float64)
    return torch.randn(n_tokens, n_inputs, dtype=torch.float64) @ mixing.T


def stats_of(x: torch.Tensor) -> LinearStats:
    stats = LinearStats(x.shape[1], {"covariance"})
    stats.add(x)
    return stats.finish()


def output_error(weight: torch.Tensor, result: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return ((weight.double() - result.double()) @ x.T).square().sum()


def product(result: Weight) -> torch.Tensor:
    assert isinstance(result, LowRank)
    return result.up.dense(torch.float64) @ result.down.dense(torch.float64)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_output_error_is_the_tail_of_the_whitened_spectrum(shape):
    weight, x = torch.randn(*shape, dtype=torch.float64), correlated(160, shape[1])
    result = product(SVDLLM(rank=9).linear(weight, stats_of(x), None))
    tail = torch.linalg.svdvals(weight @ x.T)[9:].square().sum()
    torch.testing.assert_close(output_error(weight, result, x), tail, rtol=1e-10, atol=0)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_equals_the_published_form_and_both_whitenings(shape):
    weight, x = torch.randn(*shape, dtype=torch.float64), correlated(160, shape[1])
    covariance = x.T @ x
    result = product(SVDLLM(rank=9).linear(weight, stats_of(x), None))
    values, vectors = torch.linalg.eigh(covariance)
    for root in (torch.linalg.cholesky(covariance), vectors * values.sqrt()):
        u, s, vh = torch.linalg.svd(weight @ root, full_matrices=False)
        published = u[:, :9] * s[:9] @ torch.linalg.solve(root.T, vh[:9].T).T
        torch.testing.assert_close(result, published, rtol=1e-8, atol=1e-10)
        projected = weight @ root
        down, up = project(weight, leading_directions(projected, 9))
        torch.testing.assert_close(up @ down, result, rtol=1e-8, atol=1e-10)


def test_never_worse_than_plain_svd_on_its_inputs():
    weight, x = torch.randn(24, 40), correlated(160, 40)
    stats = stats_of(x)
    ours, plain = (product(method(ratio=0.5).linear(weight, stats, None)) for method in (SVDLLM, SVD))
    assert output_error(weight, ours, x) < 0.8 * output_error(weight, plain, x)


def test_identity_covariance_is_plain_svd():
    weight = torch.randn(24, 40, dtype=torch.float64)
    x = torch.eye(40, dtype=torch.float64)
    ours, plain = (product(method(rank=9).linear(weight, stats_of(x), None)) for method in (SVDLLM, SVD))
    torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("n_tokens", [0, 1, 8, 39])
def test_few_tokens_warn_and_do_not_ruin_the_layer(n_tokens, caplog):
    weight, x = torch.randn(24, 40), correlated(400, 40)
    few = stats_of(x[:n_tokens]) if n_tokens else LinearStats(40, {"covariance"})
    result = product(SVDLLM(rank=9).linear(weight, few, None))
    assert f"{n_tokens} calibration tokens for 40 inputs" in caplog.text
    plain = product(SVD(rank=9).linear(weight, few, None))
    assert output_error(weight, result, x) < 1.5 * output_error(weight, plain, x)


def test_enough_tokens_do_not_warn(caplog):
    SVDLLM(rank=9).linear(torch.randn(24, 40), stats_of(correlated(80, 40)), None)
    assert caplog.text == ""


def test_dead_and_collinear_inputs_need_no_inverse():
    x = correlated(160, 40)
    x[:, 3] = 0
    x[:, 4] = x[:, 5]
    weight = torch.randn(24, 40, dtype=torch.float64)
    result = product(SVDLLM(rank=9).linear(weight, stats_of(x), None))
    tail = torch.linalg.svdvals(weight @ x.T)[9:].square().sum()
    torch.testing.assert_close(output_error(weight, result, x), tail, rtol=1e-9, atol=0)


def test_indefinite_rounding_falls_back_to_eigenvalues():
    covariance = torch.diag(torch.tensor([2.0, 1.0, -1e-9], dtype=torch.float64))
    root = covariance_root(covariance, 100)
    torch.testing.assert_close(root @ root.T, covariance.clamp(min=0))


def test_ridge_is_relative():
    x = correlated(80, 10)
    root = covariance_root(x.T @ x, 80, ridge=0.5)
    expected = x.T @ x + 0.5 * (x.T @ x).diagonal().mean() * torch.eye(10, dtype=torch.float64)
    torch.testing.assert_close(root @ root.T, expected)


def test_layers_of_an_input_group_share_one_root(monkeypatch):
    stats, calls = stats_of(correlated(80, 24)), []
    monkeypatch.setattr("compress.lowrank.svd_llm.root_of", lambda moment: calls.append(1) or root_of(moment))
    for _ in range(3):
        SVDLLM(rank=9).linear(torch.randn(40, 24).to(torch.bfloat16), stats.only({"covariance"}), None)
    assert len(calls) == 1


def test_wide_layers_need_no_root(monkeypatch):
    monkeypatch.setattr("compress.lowrank.svd_llm.root_of", lambda _: pytest.fail("a root was taken"))
    for ridge in (0.0, 0.1):
        result = SVDLLM(rank=9, ridge=ridge).linear(torch.randn(24, 40), stats_of(correlated(80, 40)), None)
        assert isinstance(result, LowRank) and result.rank == 9


def moved(x: torch.Tensor, before: torch.Tensor, dtype: torch.dtype = torch.float64) -> LinearStats:
    stats = LinearStats(x.shape[1], {"covariance", "cross"})
    for rows, others in zip(x.split(50), before.split(50), strict=True):
        stats.add(rows.to(dtype), others.to(dtype))
    return stats.finish()


def test_cross_statistics_and_how_they_move():
    x, before = correlated(120, 12), correlated(120, 12)
    stats, matrix, scale, order = moved(x, before), torch.randn(7, 12).double(), torch.rand(12).double() + 0.5, torch.randperm(12)
    torch.testing.assert_close(stats.cross, before.T @ x)
    torch.testing.assert_close(stats.through(matrix).cross, (before @ matrix.T).T @ (x @ matrix.T))
    torch.testing.assert_close(stats.scaled(scale).cross, (before / scale).T @ (x / scale))
    torch.testing.assert_close(stats.permuted(order).cross, before[:, order].T @ x[:, order])
    torch.testing.assert_close(stats.merge(stats).cross, 2 * before.T @ x)
    torch.testing.assert_close(moved(x, before, torch.float32).cross, before.T @ x, rtol=1e-4, atol=1e-3)
    with pytest.raises(AttributeError, match="cross"):
        stats.only({"covariance"}).cross  # noqa: B018


def test_update_fits_the_outputs_from_before_anything_was_compressed():
    """The truncated least squares: no other matrix of that rank comes closer, the published refit of U alone included."""
    weight, before = torch.randn(24, 40, dtype=torch.float64), correlated(200, 40)
    x = before + 0.3 * correlated(200, 40) + 0.2 * before.roll(1, 1)
    stats, outputs = moved(x, before), before @ weight.T
    plain = SVDLLM(rank=9).factors(weight, stats.only({"covariance"}), 9)
    updated = SVDLLM(rank=9, update=True).factors(weight, stats, 9)
    refitted = torch.linalg.lstsq(x @ plain[0].T, outputs).solution.T
    errors = [float((outputs - x @ down.T @ up.T).square().sum()) for down, up in (updated, (plain[0], refitted), plain)]
    assert errors[0] < errors[1] < errors[2]
    fitted = x @ torch.linalg.lstsq(x, outputs).solution
    best = (outputs - fitted).square().sum() + torch.linalg.svdvals(fitted)[9:].square().sum()
    assert errors[0] == pytest.approx(float(best), rel=1e-8)


def test_update_changes_nothing_where_inputs_are_as_they_were():
    weight, x = torch.randn(24, 40, dtype=torch.float64), correlated(160, 40)
    x[:, 3] = 0  # of which least squares know nothing
    stats = moved(x, x)
    torch.testing.assert_close(SVDLLM(update=True).refitted(weight, stats), weight)
    survey = SVDLLM(update=True, ranks="loss").surveys
    assert survey is not None and "cross" not in survey.stats


def test_the_best_effort_leaves_a_chosen_rank_alone():
    best = with_effort(parse("svd_llm:rank=9"), "best")
    assert isinstance(best, SVDLLM) and best.update and best.surveys is None and best.rank_of(24, 40) == 9
    best = with_effort(parse("svd_llm:ratio=0.5"), "best")
    assert isinstance(best, SVDLLM) and best.ranks == "loss" and best.surveys is not None


def test_update_of_a_model_makes_good_what_earlier_layers_lost(
    make_checkpoint, text_file, tokenizer, run_stages, make_pass, reload
):
    """On its calibration windows: through the engine's own capture of the model as it was, beside the one that it becomes."""
    source = make_checkpoint("llama")
    settings = {"calibration": Calibration(data=str(text_file), samples=40, length=24)}
    tokens = windows(tokenizer, *read_text(str(text_file)), n=40, length=24, seed=0).tokens
    logits = []
    for update in (False, True):
        artifact = run_stages(source, [make_pass("svd_llm", ratio=0.5, update=update)], **settings)
        logits.append(reload(artifact)(input_ids=tokens).logits.detach())
    target = reload(source)(input_ids=tokens).logits.detach()
    plain, updated = (float((found - target).norm()) for found in logits)
    assert updated < 0.95 * plain
