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
from compress.quant.hessian import make_plan
from compress.quant.vptq import VPTQ
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
    search = Search(values, hessian, AQLM(**SMALL, books=books).start(values, hessian), beam)
    errors = [search.error()]
    for number in range(3):
        for step in (lambda n=number: search.improve_indices(n), search.solve_books, search.solve_scales):
            step()
            errors.append(search.error())
    assert all(after <= before * (1 + 1e-5) for before, after in pairwise(errors))
    assert errors[-1] < 0.7 * errors[0]
    assert errors[-1] == pytest.approx(error(search.found, values, hessian), rel=1e-3)


@pytest.mark.parametrize("axis", [0, 1])
def test_both_ways_that_vectors_can_lie_are_searched_alike(axis):
    """The error of a matrix in vectors along its outputs falls at every step too; scales that depend on each other are solved."""
    hessian, values = damped(hessian_of(), 0.01), matrix()
    method = AQLM(**SMALL, rounds=0) if axis else VPTQ(**SMALL, rounds=0)
    found = method.linear(values, stats_of(hessian_of()), None)
    assert isinstance(found, Codebook) and found.axis == axis
    search = Search(values, hessian, found, beam=1)
    errors = [search.error()]
    for step in (search.solve_scales, search.solve_books, lambda: search.improve_indices(0), search.solve_scales):
        step()
        errors.append(search.error())
    assert all(after <= before * (1 + 1e-5) for before, after in pairwise(errors)) and errors[-1] < 0.95 * errors[0]
    assert errors[-1] == pytest.approx(error(search.found, values, hessian), rel=1e-3)


def test_where_inputs_share_few_directions_a_sweep_finds_a_lower_minimum_than_the_nearest_entries():
    """As those of real layers do: random Hessians do not show it."""
    draw = torch.Generator().manual_seed(5)
    shared = torch.randn(400, 4, generator=draw) @ torch.randn(4, 64, generator=draw)
    x = torch.randn(400, 64, generator=draw) + 10 * shared
    values, hessian, step = matrix(64, 64), damped(x.T @ x, 0.01), AQLM(length=2, entries=16, iterations=10)
    nearest_first = step.start(values, hessian)
    swept = step.swept(nearest_first, values, make_plan(x.T @ x, 0.01, act_order=True, run=2))
    searches = [Search(values, hessian, found, beam=1) for found in (nearest_first, swept)]
    assert searches[1].error() < 0.1 * searches[0].error()
    for search in searches:
        search.refine(10, tolerance=0)
    assert searches[1].error() < 0.8 * searches[0].error()


def test_with_plain_inputs_a_sweep_takes_the_nearest_entries():
    values, step = matrix(), AQLM(**SMALL, books=1)
    found = step.start(values, torch.eye(24))
    plan = make_plan(torch.diag(torch.rand(24) + 0.5), 0.01, act_order=True, run=4)
    even = make_plan(torch.eye(24), 0.01, act_order=True, run=4)
    assert step.swept(found, values, even).indices.equal(found.indices)
    assert plan.order.view(-1, 4).diff(dim=1).eq(1).all() and plan.order[::4].remainder(4).eq(0).all()


def test_with_plain_inputs_and_one_book_entries_are_the_nearest():
    values = matrix()
    search = Search(values, torch.eye(24), AQLM(**SMALL).start(values, torch.eye(24)), beam=1)
    search.improve_indices(0)
    vectors = (values / search.found.scale).view(-1, 4)
    assert torch.equal(search.found.indices[0].flatten().long(), nearest(vectors, search.found.books[0]))


def test_solved_books_are_where_the_gradient_is_zero():
    hessian, values = damped(hessian_of(), 0.01), matrix()
    search = Search(values, hessian, AQLM(**SMALL, books=2).start(values, hessian), beam=1)
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
