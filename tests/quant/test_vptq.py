"""VPTQ: entries are the nearest, errors are carried on, a diagonal Hessian makes it plain k-means."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress.quant.codebooks import nearest
from compress.quant.gptq import GPTQ
from compress.quant.vptq import VPTQ
from compress.stats import LinearStats
from compress.weights import Codebook
from tests.inputs import correlated, relative_error, stats_of

SMALL = {"length": 4, "entries": 16, "iterations": 10}


def matrix(n_outputs: int = 32, n_inputs: int = 24) -> Tensor:
    return torch.randn(n_outputs, n_inputs, generator=torch.Generator().manual_seed(0))


def test_with_independent_inputs_every_vector_gets_the_nearest_entry():
    weight, x = matrix(), torch.eye(24)
    found = VPTQ(**SMALL, rounds=0).linear(weight, stats_of(x), None)
    assert isinstance(found, Codebook) and found.axis == 0 and found.shape == weight.shape
    scaled = (weight / found.scale).T.reshape(24, 8, 4)  # of every input, its vectors
    expected = nearest(scaled.reshape(-1, 4), found.books[0]).view(24, 8).T
    assert torch.equal(found.indices[0].long(), expected)


def test_errors_are_made_up_for_by_later_inputs():
    weight, x = matrix(), correlated(24)
    swept = VPTQ(**SMALL).linear(weight, stats_of(x), None)
    assert isinstance(swept, Codebook)
    vectors = (weight / swept.scale).T.reshape(-1, 4)
    plain = Codebook(nearest(vectors, swept.books[0]).view(24, 8).T[None].int(), swept.books, swept.scale, 0)
    assert relative_error(swept, weight, x) < 0.9 * relative_error(plain, weight, x)


def test_turns_of_solving_lower_the_error():
    weight, x = matrix(64, 48), correlated(48)
    swept, solved = (VPTQ(**SMALL, rounds=rounds).linear(weight, stats_of(x), None) for rounds in (0, 3))
    assert relative_error(solved, weight, x) < 0.95 * relative_error(swept, weight, x) and solved.nbytes == swept.nbytes


def test_it_beats_a_grid_of_as_many_bits_and_a_second_book_helps():
    weight, x = matrix(128, 128), correlated(128)
    one = VPTQ(length=2, entries=16).linear(weight, stats_of(x), None)
    two = VPTQ(length=2, entries=16, books=2).linear(weight, stats_of(x), None)
    grid = GPTQ(bits=2, group_size=64).linear(weight, stats_of(x), None)
    assert one.nbytes < grid.nbytes
    assert relative_error(two, weight, x) < 0.3 * relative_error(one, weight, x)
    assert relative_error(one, weight, x) < relative_error(grid, weight, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_plan_knows_the_bytes(dtype):
    weight, x = matrix().to(dtype), correlated(24)
    step = VPTQ(**SMALL, books=2)
    made, planned = step.linear(weight, stats_of(x), None), step.outline(weight.to("meta"), stats_of(x), None)
    assert made.nbytes == planned.nbytes and made.dtype == dtype


def test_inputs_that_are_always_zero_and_no_tokens_do_no_harm():
    x = correlated(24)
    x[:, 3] = 0
    assert VPTQ(**SMALL).linear(matrix(), stats_of(x), None).dense().isfinite().all()
    assert VPTQ(**SMALL).linear(matrix(), LinearStats(24, {"hessian"}), None).dense().isfinite().all()


def test_pruned_layers_are_refused():
    with pytest.raises(ValueError, match="zeros of a pruned layer"):
        VPTQ(**SMALL).linear(matrix(), stats_of(correlated(24)), matrix() > 0)
