"""Mask patterns: exact counts, ties, nesting, N:M, and the fields of the pruning methods."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from compress.prune.magnitude import Magnitude
from compress.prune.masks import lowest
from compress.prune.wanda import Wanda

SHAPES = st.tuples(st.integers(1, 6), st.sampled_from([4, 8, 36, 64]))


@st.composite
def scores(draw):
    """Scores with and without ties."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    values = torch.rand(*draw(SHAPES), generator=generator)
    return (values * 3).round() if draw(st.booleans()) else values


def removed_by_stable_sort(rows: torch.Tensor, n_removed: int) -> torch.Tensor:
    order = rows.argsort(dim=1, stable=True)[:, :n_removed]
    return torch.ones_like(rows, dtype=torch.bool).scatter_(1, order, False)


@settings(max_examples=80, deadline=None)
@given(scores(), st.floats(0, 0.99), st.sampled_from(["row", "tensor", "2:4", "1:4", "3:4", "1:2"]))
def test_the_lowest_go_and_the_first_of_equals(values, sparsity, pattern):
    if ":" in pattern:
        n_kept, size = map(int, pattern.split(":"))
        rows, n_removed = values.reshape(-1, size), size - n_kept
    else:
        rows = values if pattern == "row" else values.reshape(1, -1)
        n_removed = int(rows.shape[1] * sparsity)
    expected = removed_by_stable_sort(rows, n_removed).view_as(values)
    assert torch.equal(lowest(values, sparsity, pattern), expected)


def test_wide_groups_count_too():
    kept = lowest(torch.rand(4, 96), 0.0, "8:32")
    assert bool((kept.unflatten(1, (3, 32)).sum(2) == 8).all())


@settings(max_examples=50, deadline=None)
@given(scores(), st.floats(0, 0.9), st.floats(0, 0.9), st.sampled_from(["row", "tensor", "2:4"]))
def test_masks_nest(values, first, second, pattern):
    weight = values - 1
    stats = None
    earlier = Magnitude(sparsity=first, pattern="row").linear(weight, stats, None)  # type: ignore[arg-type]
    step = Magnitude(pattern=pattern) if pattern == "2:4" else Magnitude(sparsity=second, pattern=pattern)
    later = step.linear(earlier.dense(), stats, earlier.mask)  # type: ignore[arg-type]
    assert earlier.mask is not None and later.mask is not None
    assert not bool((later.mask & ~earlier.mask).any())
    assert later.dense()[~later.mask].count_nonzero() == 0
    if pattern == "tensor":
        assert int((~later.mask).sum()) == max(int(values.numel() * second), int((~earlier.mask).sum()))
    if pattern == "row":
        n_removed = max(int(values.shape[1] * second), int(values.shape[1] * first))
        assert bool(((~later.mask).sum(1) == n_removed).all())


def test_inputs_that_do_not_divide_are_named():
    with pytest.raises(ValueError, match="5 x 6"):
        lowest(torch.rand(5, 6), 0.5, "2:4")


@pytest.mark.parametrize("pattern", ["column", "5:4", "0:4", "2-4", "2:4:8", ""])
def test_unknown_patterns_are_refused(pattern):
    with pytest.raises(ValidationError, match="pattern"):
        Wanda(pattern=pattern)


def test_pattern_implies_sparsity():
    assert Wanda(pattern="1:4").sparsity == 0.75
    assert Wanda(pattern="2:4", sparsity=0.5) == Wanda(pattern="2:4")
    assert Wanda(**Wanda(pattern="1:4").settings()) == Wanda(pattern="1:4")
    with pytest.raises(ValidationError, match=r"means sparsity 0\.5"):
        Wanda(pattern="2:4", sparsity=0.6)
    for wrong in (-0.1, 1.0):
        with pytest.raises(ValidationError):
            Wanda(sparsity=wrong)
