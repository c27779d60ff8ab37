"""AQLM: every turn lowers the layer's output error, and with plain inputs and one book it is k-means."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from compress.quant.additive import Search, damped
from compress.quant.aqlm import AQLM
from compress.quant.codebooks import nearest
from compress.quant.gptq import GPTQ
from compress.stats import LinearStats
from compress.weights import Codebook

SMALL = {"length": 4, "entries": 16, "iterations": 10}


def matrix(n_outputs: int = 32, n_inputs: int = 24) -> Tensor:
    return torch.randn(n_outputs, n_inputs, generator=torch.Generator().manual_seed(0))


def hessian_of(n_inputs: int = 24) -> Tensor:
    x = torch.randn(400, n_inputs, generator=torch.Generator().manual_seed(1)) @ matrix(n_inputs, n_inputs)
    return x.T @ x


def stats_of(hessian: Tensor) -> LinearStats:
    stats = LinearStats(len(hessian), {"hessian"})
    stats.add(torch.linalg.cholesky(hessian).T)
    return stats.finish()


def error(weight, original: Tensor, hessian: Tensor) -> float:
    difference = weight.dense().float() - original
    return float(((difference @ hessian) * difference).sum())


@pytest.mark.parametrize("books", [1, 2])
@pytest.mark.parametrize("beam", [1, 3])
def test_every_step_lowers_the_error_that_it_is_about(books, beam):
    hessian, values = damped(hessian_of(), 0.01), matrix()
    search = Search(values, hessian, AQLM(**SMALL, books=books).start(values), beam)
    errors = [search.error()]
    for number in range(3):
        for step in (lambda n=number: search.improve_indices(n), search.solve_books, search.solve_scales):
            step()
            errors.append(search.error())
    assert all(after <= before * (1 + 1e-5) for before, after in pairwise(errors))
    assert errors[-1] < 0.7 * errors[0]
    assert errors[-1] == pytest.approx(error(search.found, values, hessian), rel=1e-3)


def test_with_plain_inputs_and_one_book_entries_are_the_nearest():
    values = matrix()
    search = Search(values, torch.eye(24), AQLM(**SMALL).start(values), beam=1)
    search.improve_indices(0)
    vectors = (values / search.found.scale).view(-1, 4)
    assert torch.equal(search.found.indices[0].flatten().long(), nearest(vectors, search.found.books[0]))


def test_solved_books_are_where_the_gradient_is_zero():
    hessian, values = damped(hessian_of(), 0.01), matrix()
    search = Search(values, hessian, AQLM(**SMALL, books=2).start(values), beam=1)
    before = float(search._pulled_back((search.found.dense() - values) @ hessian).norm())
    search.solve_books(steps=400)
    assert float(search._pulled_back((search.found.dense() - values) @ hessian).norm()) < 1e-2 * before


def test_it_beats_a_grid_of_as_many_bits():
    values, hessian = matrix(128, 128), hessian_of(128)
    found = AQLM(length=2, entries=16).linear(values, stats_of(hessian), None)
    grid = GPTQ(bits=2, group_size=64).linear(values, stats_of(hessian), None)
    assert isinstance(found, Codebook) and found.axis == 1
    assert found.nbytes < grid.nbytes and error(found, values, hessian) < 0.8 * error(grid, values, hessian)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_plan_knows_the_bytes(dtype):
    values, step = matrix().to(dtype), AQLM(**SMALL, books=2, rounds=1)
    made = step.linear(values, stats_of(hessian_of()), None)
    assert made.nbytes == step.outline(values.to("meta"), stats_of(hessian_of()), None).nbytes and made.dtype == dtype


def test_layers_that_saw_no_token_and_rows_of_zeros_do_no_harm():
    values = matrix()
    values[3] = 0
    assert AQLM(**SMALL, rounds=1).linear(values, LinearStats(24, {"hessian"}), None).dense().isfinite().all()
