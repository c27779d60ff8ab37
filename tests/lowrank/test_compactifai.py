"""Tensor trains: exactness, the truncation identity, budgets, weighing, and what passes, readers and training make of them."""

from __future__ import annotations

from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from compress.apply import apply, outline
from compress.filling import fill_linear
from compress.loader import build
from compress.lowrank.compactifai import CompactifAI
from compress.lowrank.tensor_train import balanced, least_discarded, separated, train
from compress.manifest import Manifest
from compress.methods import parse
from compress.quant.rtn import RTN
from compress.stats import LinearStats
from compress.trainable import trainable
from compress.weights import Dense, Masked, Quantized, TensorTrain, Weight, spec_of, structure
from compress.weights.tensor_train import contraction
from tests.inputs import stats_of


def chain(shape: tuple[int, int] = (24, 40), **options) -> TensorTrain:
    torch.manual_seed(0)
    found = CompactifAI(weighted=False, **options).linear(torch.randn(shape), LinearStats(shape[1], ()), None)
    assert isinstance(found, TensorTrain)
    return found


def installed(weight: Weight, bias: bool = False) -> torch.nn.Module:
    n_outputs, n_inputs = weight.shape
    module = build(spec_of(weight), n_inputs, n_outputs, bias)
    fill_linear(module, weight, "cpu", torch.float32)
    return module


@given(st.integers(1, 5000), st.integers(1, 3))
def test_factors_are_balanced(size, count):
    factors = balanced(size, count)
    assert prod(factors) == size and len(factors) == count
    if count == 2:
        assert factors[0] == max(d for d in range(1, size + 1) if size % d == 0 and d * d <= size)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (7, 12), (64, 64)])
def test_full_bonds_are_exact(shape):
    weight = torch.randn(shape, dtype=torch.float64)
    for count in (2, 3):
        rows, columns = (balanced(size, count) for size in shape)
        order = [axis for i in range(count) for axis in (i, count + i)]
        tensor = weight.reshape(*rows, *columns).permute(order).reshape([m * n for m, n in zip(rows, columns, strict=True)])
        bonds = [min(prod(tensor.shape[:i]), prod(tensor.shape[i:])) for i in range(1, count)]
        product = train(tensor, bonds)
        found = product[0]
        for core in product[1:]:
            found = torch.tensordot(found, core, dims=1)
        torch.testing.assert_close(found.reshape(tensor.shape), tensor, rtol=0, atol=1e-10)


def test_two_cores_lose_the_tail_of_the_permuted_spectrum():
    """Of the permuted matrix, not of the matrix itself."""
    weight = torch.randn(24, 40, dtype=torch.float64)
    found = CompactifAI(weighted=False, rank=9).linear(weight, LinearStats(40, ()), None)
    assert isinstance(found, TensorTrain) and found.bonds == (9,) and (found.rows, found.columns) == ((4, 6), (5, 8))
    left, right = (core.dense() for core in found.cores)  # (m bond, n), (m, bond n)
    product = torch.einsum("abi,cbj->acij", left.view(4, 9, 5), right.view(6, 9, 8)).reshape(24, 40)
    permuted = weight.view(4, 6, 5, 8).permute(0, 2, 1, 3).reshape(20, 48)
    tail = torch.linalg.svdvals(permuted)[9:].square().sum()
    torch.testing.assert_close((weight - product).square().sum(), tail, rtol=1e-10, atol=0)
    torch.testing.assert_close(found.dense(torch.float64), product, rtol=0, atol=1e-5)


@settings(max_examples=30)
@given(st.integers(4, 60), st.integers(4, 60), st.floats(0.05, 0.99), st.sampled_from([2, 3]))
def test_the_budget_is_met_and_the_memory_is_what_the_bonds_say(n_outputs, n_inputs, ratio, count):
    weight = torch.randn(n_outputs, n_inputs)
    found = CompactifAI(ratio=ratio, cores=count, weighted=False).linear(weight, LinearStats(n_inputs, ()), None)
    if not isinstance(found, TensorTrain):
        return
    bonds = (1, *found.bonds, 1)
    numel = sum(bonds[i] * m * n * bonds[i + 1] for i, (m, n) in enumerate(zip(found.rows, found.columns, strict=True)))
    smallest = sum(m * n for m, n in zip(found.rows, found.columns, strict=True))
    assert found.numel == numel <= max(ratio * weight.numel(), smallest) and numel < weight.numel()
    assert found.nbytes == 4 * numel == sum(tensor.nbytes for core in found.cores for tensor in [core.dense()])


def test_three_bonds_are_the_best_of_all_that_fit():
    generator = torch.Generator().manual_seed(0)
    spectra = [torch.rand(12, generator=generator).sort(descending=True).values for _ in range(2)]
    sizes, budget = (12, 15, 12), 600
    tails = [[float(values[k:].sum()) for k in range(13)] for values in spectra]

    def fits(first: int, second: int) -> bool:
        return first * sizes[0] + first * sizes[1] * second + second * sizes[2] <= budget

    best = min(tails[0][a] + tails[1][b] for a in range(1, 13) for b in range(1, 13) if fits(a, b))
    first, second = least_discarded(sizes, spectra, budget) or (0, 0)
    assert fits(first, second) and tails[0][first] + tails[1][second] == pytest.approx(best)
    assert least_discarded(sizes, spectra, 30) is None


def test_weights_of_inputs_that_are_products_of_their_digits_are_met_exactly():
    first, second = torch.rand(5) + 0.1, torch.rand(8) + 0.1
    scale = torch.outer(first, second).flatten()
    torch.testing.assert_close(torch.outer(*separated(scale, (5, 8))).flatten(), scale)
    x = torch.randn(4000, 40) * scale
    weight, stats = torch.randn(24, 40), stats_of(x)
    errors = []
    for weighted in (True, False):
        found = CompactifAI(ratio=0.5, weighted=weighted).linear(weight, stats, None)
        errors.append(float(((weight - found.dense()) @ x.T).norm()))
    assert errors[0] < 0.95 * errors[1]


@pytest.mark.parametrize("count", [2, 3])
def test_the_loader_contracts_and_multiplies_out_to_the_same(count):
    weight, x = chain(ratio=0.6, cores=count), torch.randn(2, 3, 40)
    module = installed(weight, bias=True)
    module.bias.data.normal_()
    expected = torch.nn.functional.linear(x, weight.dense(), module.bias)
    for module.opens in (0, 1):
        torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-5)
    cheap = chain((36, 36), rank=1, cores=count)
    assert contraction(cheap.rows, cheap.columns, cheap.bonds) < 36 * 36 and cheap.sizes()["opened"] == 0
    assert weight.sizes()["opened"] == 1


@pytest.mark.parametrize("count", [2, 3])
def test_statistics_are_carried_to_what_really_enters_each_core(count):
    weight, x = chain(ratio=0.6, cores=count), torch.randn(50, 40)
    module, seen, stats = installed(weight), {}, stats_of(x)
    for i, core in enumerate(module.cores):
        core.register_forward_pre_hook(lambda _, inputs, i=i: seen.__setitem__(i, inputs[0]))
    module(x)
    for i in range(count):
        entering, found = seen[i].flatten(0, -2), weight.entering(stats, weight.cores[:i])
        assert found.n == len(entering)
        torch.testing.assert_close(found.hessian, entering.T @ entering, rtol=1e-4, atol=1e-3)


def test_passes_reach_the_cores():
    weight, x = chain(ratio=0.6), torch.randn(50, 40)
    for step in ("gptq:group_size=-1", "rtn:group_size=-1", "wanda"):
        found = apply(parse(step), weight, stats_of(x))
        assert isinstance(found, TensorTrain) and found.bonds == weight.bonds
        assert all(isinstance(core, Masked if step == "wanda" else Quantized) for core in found.cores)
        planned = outline(parse(step), weight.map(lambda tensor: tensor.to("meta")))
        assert planned.nbytes == found.nbytes and planned.shape == found.shape
        assert structure(found).kind == "tensor_train"
    wide = TensorTrain((Dense(torch.empty(1 << 14, 8)), Dense(torch.empty(8, 1 << 15))), (8, 8), (8, 16))
    with pytest.raises(ValueError, match="too many for their statistics"):
        outline(parse("gptq"), wide)
    assert isinstance(outline(RTN(group_size=None), wide.map(lambda tensor: tensor.to("meta"))), TensorTrain)


def test_training_heals_the_cores():
    weight, target = chain(ratio=0.3), torch.randn(24, 40)
    layer = trainable(weight, None, torch.device("cpu"))
    optimiser = torch.optim.Adam(layer.parameters(), lr=0.02)
    for _ in range(150):
        loss = (layer(torch.eye(40)).T - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    trained = layer.trained()
    assert isinstance(trained, TensorTrain) and trained.bonds == weight.bonds
    assert (trained.dense() - target).norm() < 0.9 * (weight.dense() - target).norm()


@pytest.mark.parametrize(
    ("family", "then"),
    [("gpt2", []), ("llama-untied", ["gptq:group_size=16"]), ("llama-untied", ["rtn:group_size=-1,activations=int8"])],
)
def test_opens_exactly(family, then, make_checkpoint, run_stages, assert_reloads):
    artifact = run_stages(make_checkpoint(family), ["compactifai:ratio=0.5", *then])
    assert_reloads(artifact)
    records = Manifest.read(artifact).modules.values()
    assert all(record.kind == "tensor_train" and record.numel <= 0.5 * prod(record.shape) for record in records)


@pytest.mark.parametrize("rule", ["energy", "sensitivity"])
def test_a_shared_budget_is_met(rule, llama, run_stages):
    artifact = run_stages(llama, [f"compactifai:ratio=0.5,ranks={rule}"])
    records = Manifest.read(artifact).modules.values()
    total = sum(prod(record.shape) for record in records)
    assert 0.48 * total < sum(record.numel for record in records) <= 0.5 * total


def test_fields_and_what_is_left_whole():
    for wrong in ({"cores": 4}, {"ratio": 0.0}, {"cores": 3, "ranks": "energy"}, {"ranks": "type"}):
        with pytest.raises(ValidationError):
            CompactifAI.model_validate(wrong)
    weight, stats = torch.randn(24, 40), LinearStats(40, {"sqnorm"})
    for step in (CompactifAI(ratio=1.0), CompactifAI(rank=100), CompactifAI(cores=3, rank=100), CompactifAI(cores=3, ratio=0.01)):
        assert isinstance(step.linear(weight, stats, None), Dense) and isinstance(step.outline(weight, stats, None), Dense)
        assert isinstance(step.linear(weight, stats, weight > 0), Masked)
