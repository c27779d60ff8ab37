"""SparseGPT: its masks in closed form, what the update gains, exact counts, earlier masks, and the joint solve."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from compress.prune.magnitude import Magnitude
from compress.prune.sparsegpt import SparseGPT
from compress.prune.wanda import Wanda
from compress.quant.gptq import GPTQ
from compress.quant.hessian import inverse_factor
from compress.stats import LinearStats
from compress.weights import Masked, Quantized, Weight
from tests.inputs import stats_of


def correlated(n_inputs: int, n_tokens: int = 400, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.eye(n_inputs) + 0.3 * torch.randn(n_inputs, n_inputs, generator=generator)
    return torch.randn(n_tokens, n_inputs, generator=generator) @ mixing


def draw(n_outputs: int, n_inputs: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(n_outputs, n_inputs, generator=torch.Generator().manual_seed(seed))


def kept_by(weight: Weight) -> torch.Tensor:
    assert weight.mask is not None
    return weight.mask


def output_error(weight: torch.Tensor, result: torch.Tensor, x: torch.Tensor) -> float:
    return ((weight - result.float()) @ x.T).square().sum().item()


def by_columns(weight: torch.Tensor, x: torch.Tensor, sparsity: float, kept_of_four: int | None) -> torch.Tensor:
    """The published algorithm, one column after the other without lazy updates, in float64, and with exact counts."""
    work, n_inputs = weight.double(), weight.shape[1]
    factor = inverse_factor((x.T @ x).double(), 0.01)
    unit = 128 if kept_of_four is None else 4
    mask = torch.ones_like(work, dtype=torch.bool)
    for j in range(n_inputs):
        if j % unit == 0:
            stop = min(j + unit, n_inputs)
            scores = (work[:, j:stop] / factor.diagonal()[j:stop]).square()
            if kept_of_four is None:
                lowest = scores.flatten().argsort()[: int(scores.numel() * sparsity)]
                mask[:, j:stop] = torch.ones(scores.numel(), dtype=torch.bool).index_fill(0, lowest, False).view_as(scores)
            else:
                mask[:, j:stop].scatter_(1, scores.argsort(1)[:, : 4 - kept_of_four], False)
        error = work[:, j] * ~mask[:, j] / factor[j, j]
        work[:, j + 1 :] -= error[:, None] * factor[j, j + 1 :]
        work[:, j] *= mask[:, j]
    return work


@pytest.mark.parametrize("kept_of_four", [None, 2, 1])
@pytest.mark.parametrize("n_inputs", [64, 320])
def test_is_the_published_algorithm(kept_of_four, n_inputs):
    weight, x = draw(12, n_inputs), correlated(n_inputs, 900)
    step = SparseGPT(sparsity=0.5) if kept_of_four is None else SparseGPT(pattern=f"{kept_of_four}:4")
    result = step.linear(weight, stats_of(x), None).dense().double()
    agree = (result - by_columns(weight, x, 0.5, kept_of_four)).abs() < 1e-3
    assert agree.float().mean() > 0.97  # rounding noise may choose the other of two equal scores


@pytest.mark.parametrize("pattern", ["tensor", "row"])
def test_sparsity_zero_is_the_identity(pattern):
    weight, x = draw(8, 200).to(torch.bfloat16), correlated(200)
    x[:, 7] = 0  # never active
    result = SparseGPT(sparsity=0, pattern=pattern).linear(weight, stats_of(x), None)
    assert torch.equal(result.dense(), weight) and bool(kept_by(result).all())


@pytest.mark.parametrize("pattern", ["tensor", "row", "2:4"])
def test_equal_independent_inputs_are_magnitude(pattern):
    weight = draw(8, 128)  # one block
    magnitude = Magnitude(pattern=pattern, sparsity=0.5).linear(weight, LinearStats(128, ()), None)
    for stats in (stats_of(torch.eye(128) * 3), stats_of(torch.empty(0, 128))):  # and with no token at all
        result = SparseGPT(pattern=pattern, sparsity=0.5).linear(weight, stats, None)
        assert torch.equal(kept_by(result), kept_by(magnitude)) and torch.equal(result.dense(), magnitude.dense())


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 7), st.integers(1, 80), st.floats(0, 0.99), st.sampled_from(["tensor", "row", "2:4", "1:4", "6:8"]))
def test_counts_are_exact(n_outputs, n_fours, sparsity, pattern):
    n_inputs = 8 * n_fours if pattern == "6:8" else 4 * n_fours
    step = SparseGPT(pattern=pattern) if ":" in pattern else SparseGPT(pattern=pattern, sparsity=sparsity)
    result = step.linear(draw(n_outputs, n_inputs), stats_of(correlated(n_inputs, 50)), None)
    kept = kept_by(result)
    if ":" in pattern:
        n_kept, size = map(int, pattern.split(":"))
        assert bool((kept.unflatten(1, (-1, size)).sum(2) == n_kept).all())
    elif pattern == "row":
        assert bool(((~kept).sum(1) == int(n_inputs * sparsity)).all())
    else:
        assert int((~kept).sum()) == int(n_outputs * n_inputs * sparsity)
    assert result.dense()[~kept].count_nonzero() == 0
    outline = step.outline(torch.empty(n_outputs, n_inputs, device="meta"), LinearStats(n_inputs, (), "meta"), None)
    assert (outline.numel, outline.nbytes, outline.ideal_nbytes) == (result.numel, result.nbytes, result.ideal_nbytes)


def refit(weight: torch.Tensor, kept: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """The best weights on a mask: least squares, row by row."""
    best = torch.zeros_like(weight, dtype=torch.float64)
    for row, mask, target in zip(best, kept, weight.double(), strict=True):
        row[mask] = torch.linalg.solve(hessian[mask][:, mask], hessian[mask] @ target)
    return best.float()


@pytest.mark.parametrize("pattern", ["tensor", "row", "2:4"])
def test_the_update_helps_and_least_squares_bounds_it(pattern):
    weight, x = draw(32, 192), correlated(192, 800)
    result = SparseGPT(pattern=pattern).linear(weight, stats_of(x), None)
    solved = output_error(weight, result.dense(), x)
    bound = output_error(weight, refit(weight, kept_by(result), (x.T @ x).double()), x)
    assert bound <= solved < 0.7 * output_error(weight, weight * kept_by(result), x)
    wanda = Wanda(pattern=pattern).linear(weight, stats_of(x), None)
    assert solved < 0.8 * output_error(weight, wanda.dense(), x)


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("pattern", ["tensor", "row", "2:4"])
def test_an_earlier_mask_stays_and_counts(pattern, bits):
    x, settings = correlated(160), {"bits": bits, "group_size": 16}
    earlier = Magnitude(sparsity=0.3, pattern="row").linear(draw(24, 160), LinearStats(160, ()), None)
    mask, step = kept_by(earlier), SparseGPT(pattern=pattern, **settings)
    result = step.linear(earlier.dense(), stats_of(x), mask)
    kept = kept_by(result)
    assert not bool((kept & ~mask).any()) and result.dense()[~kept].count_nonzero() == 0
    if pattern == "tensor":
        assert int((~kept).sum()) == 24 * 80
    if pattern == "2:4":
        assert int(kept.unflatten(1, (-1, 4)).sum(2).max()) == 2
    same = SparseGPT(sparsity=0).linear(earlier.dense(), stats_of(x), mask)
    assert torch.equal(same.dense(), earlier.dense()) and torch.equal(kept_by(same), mask)


def test_inputs_that_were_never_active_go_first():
    x = correlated(64)
    x[:, [3, 40]] = 0
    kept = kept_by(SparseGPT(sparsity=0.1).linear(draw(16, 64), stats_of(x), None))
    assert not bool(kept[:, [3, 40]].any()) and int((~kept).sum()) == int(16 * 64 * 0.1)


def test_a_block_of_128_loses_its_share():
    x = correlated(256) * torch.linspace(0.1, 3, 256)
    kept = kept_by(SparseGPT(sparsity=0.25).linear(draw(16, 256), stats_of(x), None))
    assert [int((~part).sum()) for part in kept.split(128, dim=1)] == [512, 512]


# Joint sparsification and rounding.


@pytest.mark.parametrize(
    ("group_size", "pattern", "symmetric"),
    [
        (18, "2:4", True), (48, "2:4", False), (144, "2:4", True), (None, "2:4", False),
        (18, "tensor", False), (48, "row", True), (144, "tensor", True), (None, "row", True),
    ],
)  # fmt: skip
def test_joint_result_is_a_masked_grid(group_size, pattern, symmetric):
    weight, x = draw(10, 288), correlated(288, 500)
    step = SparseGPT(bits=3, group_size=group_size, pattern=pattern, symmetric=symmetric)
    result = step.linear(weight, stats_of(x), None)
    assert isinstance(result, Masked) and isinstance(result.inner, Quantized)
    assert (result.inner.bits, result.inner.group_size) == (3, group_size or 288)
    assert (result.inner.zero_point is None) == symmetric
    kept = result.kept
    assert int(kept.sum()) == 5 * 288 and result.dense()[~kept].count_nonzero() == 0
    if pattern == "2:4":
        assert bool((kept.unflatten(1, (-1, 4)).sum(2) == 2).all())
    outline = step.outline(weight.to("meta"), LinearStats(288, (), "meta"), None)
    assert type(outline) is type(result) and (outline.nbytes, outline.numel) == (result.nbytes, result.numel)


@pytest.mark.parametrize("pattern", ["tensor", "2:4"])
def test_joint_solve_is_as_good_as_two_and_better_than_masking_a_grid(pattern):
    weight, x = draw(64, 256), correlated(256, 1000)
    stats, quantizer = stats_of(x), GPTQ(bits=4, group_size=64)
    joint = SparseGPT(pattern=pattern, bits=4, group_size=64).linear(weight, stats, None)
    pruned = SparseGPT(pattern=pattern).linear(weight, stats, None)
    sequence = quantizer.linear(pruned.dense(), stats, kept_by(pruned))
    masked = quantizer.linear(weight, stats, None).masked(kept_by(Wanda(pattern=pattern).linear(weight, stats, None)))
    error = output_error(weight, joint.dense(), x)
    assert error < 1.05 * output_error(weight, sequence.dense(), x)
    assert error < 0.7 * output_error(weight, masked.dense(), x)


def test_joint_with_nothing_to_prune_is_gptq():
    weight, x = draw(8, 256), correlated(256)
    joint = SparseGPT(sparsity=0, bits=4, group_size=32).linear(weight, stats_of(x), None)
    assert torch.equal(joint.dense(), GPTQ(bits=4, group_size=32, act_order=False).linear(weight, stats_of(x), None).dense())


def test_settings():
    assert SparseGPT(group_size=-1).group_size is None  # type: ignore[arg-type]
    assert SparseGPT(pattern="1:4").sparsity == 0.75
    for wrong in ({"bits": 1}, {"damping": 0.0}, {"pattern": "4:2"}, {"sparsity": 1.0}):
        with pytest.raises(ValidationError):
            SparseGPT(**wrong)
    with pytest.raises(ValueError, match="5 x 6"):
        SparseGPT(pattern="2:4").linear(draw(5, 6), stats_of(draw(9, 6)), None)
