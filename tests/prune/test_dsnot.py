"""DSnoT: counts stay, errors shrink, groups hold, and what is no plain mask is left alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.checkpoint import Checkpoint
from compress.manifest import Manifest
from compress.prune.dsnot import DSnoT
from compress.prune.masks import groups_of
from compress.prune.wanda import Wanda
from compress.quant.rtn import RTN
from compress.skeleton import Skeleton
from compress.stats import LinearStats
from compress.weights import Dense, Masked


def layer(seed: int, n_outputs: int = 12, n_inputs: int = 48) -> tuple[torch.Tensor, torch.Tensor, LinearStats]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n_outputs, n_inputs, generator=generator)
    x = torch.randn(60, n_inputs, generator=generator) + torch.randn(n_inputs, generator=generator)
    stats = LinearStats(n_inputs, {"sum", "sqnorm"})
    stats.add(x)
    return weight, x, stats.finish()


def mean_errors(original: torch.Tensor, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return ((weight - original) @ x.mean(0)).abs()


@given(st.integers(0, 10**6), st.sampled_from(["row", "tensor", "2:4", "4:8"]), st.booleans())
@settings(max_examples=40, deadline=None)
def test_counts_stay_and_errors_shrink(seed, pattern, updated):
    weight, x, stats = layer(seed)
    pruned = Wanda(pattern=pattern).linear(weight, stats, None)
    if updated:  # as SparseGPT leaves kept weights
        pruned = Masked(Dense(pruned.dense() * 1.1), pruned.mask)
    refined = DSnoT(tolerance=0.01).correct(weight, pruned, stats)
    assert isinstance(refined, Masked) and not refined.dense()[~refined.kept].any()
    assert torch.equal(refined.kept.sum(1), pruned.mask.sum(1))
    before, after = (mean_errors(weight, part.dense(), x) for part in (pruned, refined))
    assert bool((after <= before + 1e-4).all()) and after.sum() < before.sum()
    both, back = refined.kept & pruned.mask, refined.kept & ~pruned.mask
    assert torch.equal(refined.dense()[both], pruned.dense()[both]) and bool(back.any())
    assert torch.equal(refined.dense()[back], weight[back])
    if ":" in pattern:
        n_kept, size = map(int, pattern.split(":"))
        assert bool((refined.kept.unflatten(1, (-1, size)).sum(2) == n_kept).all())


def test_each_swap_is_the_published_choice():
    """One cycle on one row, chosen by hand: gain |w E[x]| / Var[x], then the least Wanda score of the right sign."""
    weight, x, stats = layer(3, 1)
    pruned = Wanda().linear(weight, stats, None)
    refined = DSnoT(cycles=1, tolerance=0.0).correct(weight, pruned, stats)
    mean, variance = x.mean(0), x.var(0, unbiased=False)
    error = float(((pruned.dense() - weight) @ mean)[0])
    effect = (weight * mean)[0]
    gain = torch.where(~pruned.mask[0] & (effect * error < 0), effect.abs() / variance, -1.0)
    score = weight.abs()[0] * x.square().mean(0).sqrt()
    cost = torch.where(pruned.mask[0] & (effect * error > 0), score, torch.inf)
    changed = (refined.mask ^ pruned.mask)[0].nonzero().flatten().tolist()
    assert sorted(changed) == sorted([int(gain.argmax()), int(cost.argmin())])


def test_what_needs_nothing_is_left_alone():
    weight, _, stats = layer(0)
    pruned = Wanda().linear(weight, stats, None)
    assert torch.equal(DSnoT(tolerance=1e6).correct(weight, pruned, stats).mask, pruned.mask)
    idle = LinearStats(48, {"sum", "sqnorm"})
    grid = RTN(group_size=16).linear(pruned.dense(), stats, pruned.mask)
    for kept, statistics in ((pruned, idle), (Dense(weight), stats), (grid, stats)):
        assert DSnoT().correct(weight, kept, statistics) is kept
    outline = Wanda().outline(weight.to("meta"), stats, None)
    assert DSnoT().correct(weight.to("meta"), outline, LinearStats(48, (), "meta")) is outline


def test_weights_that_an_earlier_stage_removed_stay_so():
    weight, _, stats = layer(0)
    earlier = Wanda(sparsity=0.3).linear(weight, stats, None)
    later = Wanda(sparsity=0.6).linear(earlier.dense(), stats, earlier.mask)
    refined = DSnoT(tolerance=0.0).correct(earlier.dense(), later, stats)
    assert not bool((refined.mask & ~earlier.mask).any()) and not torch.equal(refined.mask, later.mask)


def test_groups_are_recognised():
    mask = torch.zeros(3, 48, dtype=torch.bool)
    mask[:, ::4] = True
    assert groups_of(mask) == 4
    mask[1, 0], mask[1, 1] = False, True
    assert groups_of(mask) == 4
    mask[1, 1], mask[1, 5] = False, True
    assert groups_of(mask) in (None, 8, 16, 24)
    assert groups_of(torch.ones(3, 48, dtype=torch.bool)) is None


@pytest.mark.parametrize("pruner", ["wanda:pattern=2:4", "magnitude:sparsity=0.6"])
def test_in_a_stream(pruner, llama, run_stages, assert_reloads):
    alone, refined = run_stages(llama, [pruner]), run_stages(llama, [pruner, "dsnot:tolerance=0.001"])
    assert_reloads(refined)
    found = [Skeleton(Checkpoint(artifact)).read_weights(0) for artifact in (alone, refined)]
    for name, weight in found[0].items():
        assert torch.equal(weight.mask.sum(1), found[1][name].mask.sum(1))
        assert "2:4" not in pruner or bool((found[1][name].mask.unflatten(1, (-1, 4)).sum(2) == 2).all())
    assert any(not torch.equal(weight.mask, found[1][name].mask) for name, weight in found[0].items())
    assert all(record.passes == [pruner, "dsnot:tolerance=0.001"] for record in Manifest.read(refined).modules.values())
