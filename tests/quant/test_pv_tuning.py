"""PV-Tuning: codes move where gradients pull, a few at a time, and never away from the buffer."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from compress.checkpoint import Checkpoint
from compress.distill.losses import forward_kl
from compress.filling import fill_linear
from compress.loader import build
from compress.quant.aqlm import AQLM
from compress.quant.buffered import Buffered
from compress.quant.pv_tuning import PVTuning
from compress.quant.rtn import RTN
from compress.quant.vptq import VPTQ
from compress.skeleton import Skeleton
from compress.stats import LinearStats
from compress.train import TrainResult, train
from compress.weights import Codebook, Dense, LowRank, Masked, Quantized, Weight, spec_of
from compress.weights.composed import unmasked

FORMS = ["vectors", "sums", "columns", "grid", "masked grid"]
SMALL = {"entries": 16, "iterations": 5}


def coded(form: str, weight: Tensor) -> Weight:
    stats = LinearStats(weight.shape[1], {"hessian"})
    stats.add(torch.eye(weight.shape[1]))
    if form in ("grid", "masked grid"):
        grid = RTN(bits=2, group_size=16, symmetric=form == "masked grid").linear(weight, stats, None)
        return grid.masked(weight.abs() > weight.abs().median()) if form == "masked grid" else grid
    settings = {"vectors": {"length": 4}, "sums": {"length": 8, "books": 2}, "columns": {"length": 4}}[form]
    return (VPTQ if form == "columns" else AQLM)(**SMALL, **settings).linear(weight, stats.finish(), None)


def codes_of(weight: Weight) -> Tensor:
    """(vectors, numbers): what each vector of weights is coded by."""
    inner = unmasked(weight.base if isinstance(weight, Buffered) else weight)
    if isinstance(inner, Codebook):
        return inner.indices.flatten(1).T
    assert isinstance(inner, Quantized)
    return inner.codes.flatten().unsqueeze(1)


def n_changed(before: Weight, after: Weight) -> int:
    return int((codes_of(before) != codes_of(after)).any(1).sum())


@pytest.fixture(scope="module")
def matrix() -> Tensor:
    return torch.randn(32, 48, generator=torch.Generator().manual_seed(0))


def pulled(form: str, matrix: Tensor, by: float = 0.5) -> Buffered:
    """A coded matrix whose buffer has moved."""
    begun = Buffered.start(coded(form, matrix), 1.0)
    move = torch.randn(matrix.shape, generator=torch.Generator().manual_seed(1))
    return begun.rebuild(begun.parameters() | {"buffer": begun.buffer + by * move})


def distance(weight: Buffered) -> float:
    gap = weight.buffer - weight.base.dense(torch.float32)
    return float((gap if weight.mask is None else gap * weight.mask).square().sum())


@pytest.mark.parametrize("form", FORMS)
def test_at_first_it_is_the_base_and_gradients_go_to_both(form, matrix):
    base = coded(form, matrix)
    begun = Buffered.start(base, 0.5)
    assert begun.dense().equal(base.dense()) and n_changed(begun, begun.recoded(1.0, 1.0, 1)) == 0
    assert begun.shares()["buffer"] == pytest.approx(0.5 * float(base.dense().square().mean().sqrt()))
    values = {name: value.clone().requires_grad_() for name, value in begun.parameters().items()}
    weights = torch.randn(matrix.shape, generator=torch.Generator().manual_seed(2))
    (begun.rebuild(values).dense() * weights).sum().backward()
    assert values["buffer"].grad.equal(weights if begun.mask is None else weights * begun.mask)
    own = {name: value.clone().requires_grad_() for name, value in base.parameters().items()}
    (base.rebuild(own).dense() * weights).sum().backward()
    assert all(values[name].grad.equal(value.grad) for name, value in own.items())


@pytest.mark.parametrize("form", FORMS)
def test_few_codes_change_and_come_nearer_to_the_buffer(form, matrix):
    before = pulled(form, matrix)
    n_vectors = len(codes_of(before))
    assert n_changed(before, before.recoded(0.0, 1.0, 5)) == 0
    for most in (0.01, 0.1):
        after = before.recoded(most, 1.0, 5)
        assert 0 < n_changed(before, after) <= torch.tensor(most * n_vectors).ceil()
        assert distance(after) < distance(before)
        assert all(value is before.parameters()[name] for name, value in after.parameters().items())
    everything = before.recoded(1.0, 10.0, 5)
    assert distance(everything) < distance(after) and n_changed(everything, everything.recoded(1.0, 10.0, 5)) == 0
    if before.mask is not None:
        assert not everything.base.dense()[~before.mask].any()


def test_codes_that_go_from_one_end_of_their_range_to_the_other_are_as_far_as_they_are():
    grid = Quantized(torch.full((1, 16), -100, dtype=torch.int8), torch.ones(1, 1), None, 8)
    begun = Buffered.start(grid, 1.0)
    moved = replace(begun, buffer=begun.buffer.clone().index_fill_(1, torch.tensor([3]), 100.0))  # by half of the norm, 400
    assert n_changed(begun, moved.recoded(1.0, 0.49, 1)) == 0 and n_changed(begun, moved.recoded(1.0, 0.51, 1)) == 1


@pytest.mark.parametrize("form", FORMS)
def test_no_step_is_longer_than_what_is_trusted(form, matrix):
    before, norm = pulled(form, matrix), float(coded(form, matrix).dense().norm())
    counts = []
    for trust in (0.0, 0.15, 0.3, 1.0):
        after = before.recoded(1.0, trust, 1)
        assert float((after.base.dense() - before.base.dense()).norm()) <= trust * norm * (1 + 1e-5)
        counts.append(n_changed(before, after))
    assert counts[0] == 0 and all(fewer < more for fewer, more in pairwise(counts))


def test_with_one_book_entries_are_the_nearest_and_grids_are_rounded(matrix):
    vectors = pulled("vectors", matrix).recoded(1.0, 10.0, 1)
    assert isinstance(vectors.base, Codebook)
    wanted = (vectors.buffer / vectors.base.scale).view(-1, 1, 4)
    nearest = (wanted - vectors.base.books[0]).square().sum(2).argmin(1)
    assert vectors.base.indices.flatten().equal(nearest.int())
    grid = pulled("grid", matrix).recoded(1.0, 10.0, 1)
    assert isinstance(grid.base, Quantized)
    levels = [replace(grid.base, codes=torch.full_like(grid.base.codes, code)).dense() for code in range(-2, 2)]
    least = (grid.buffer.unsqueeze(2) - torch.stack(levels, 2)).abs().amin(2)
    assert (grid.buffer - grid.base.dense()).abs().allclose(least)


def test_a_buffer_can_be_pulled_back(matrix):
    before = pulled("vectors", matrix)
    assert before.pulled(0.0) is before and before.pulled(1.0).buffer.equal(before.base.dense())
    assert distance(before.pulled(0.5)) == pytest.approx(0.25 * distance(before), rel=1e-4)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=64, bos_token_id=1, eos_token_id=2, initializer_range=0.2,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(0, 64, (32, 16), generator=torch.Generator().manual_seed(0))


def compressed(model: PreTrainedModel, form: str) -> tuple[PreTrainedModel, dict[str, Weight]]:
    student, weights = copy.deepcopy(model), {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            weights[name] = coded(form, module.weight.detach())
            layer = build(spec_of(weights[name]), module.in_features, module.out_features, False)
            fill_linear(layer, weights[name], "cpu", torch.float32)
            student.set_submodule(name, layer)
    return student, weights


def fit(model: PreTrainedModel, tokens: Tensor, directory: Path, form: str, progress=lambda *_: None, **settings) -> TrainResult:
    student, weights = compressed(model, form)
    step = PVTuning(**{"steps": 12, "batch_size": 8, "hold_out": 0.0} | settings)
    return train(student, weights, model, tokens, step, seed=0, device="cpu", directory=directory, progress=progress,
                 save_every=5)  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_without_changes_of_codes_it_is_distillation_of_the_rest(form, model, tokens, tmp_path):
    weights = compressed(model, form)[1]
    result = fit(model, tokens, tmp_path, form, max_code_change=0.0, steps=3)
    for name, weight in result.weights.items():
        assert type(weight) is type(weights[name]) and n_changed(weights[name], weight) == 0
        assert not weight.dense().equal(weights[name].dense())


@pytest.mark.parametrize("form", ["columns", "sums", "grid"])
def test_moving_codes_distils_further(form, model, tokens, tmp_path):
    settings = {"steps": 30, "code_learning_rate": 0.06, "max_code_change": 0.03, "schedule": "linear"}
    still = fit(model, tokens, tmp_path / "still", form, **settings | {"max_code_change": 0.0})
    moved = fit(model, tokens, tmp_path / "moved", form, **settings)
    assert sum(moved.history[-4:]) < 0.95 * sum(still.history[-4:])
    weights = compressed(model, form)[1]
    assert any(n_changed(weights[name], weight) for name, weight in moved.weights.items())


def test_an_interrupted_run_ends_with_the_same_codes(model, tokens, tmp_path):
    def stop_at_seven(done: int, *_) -> None:
        if done == 7:
            raise KeyboardInterrupt

    expected = fit(model, tokens, tmp_path / "once", "sums", code_learning_rate=0.3)
    with pytest.raises(KeyboardInterrupt):
        fit(model, tokens, tmp_path / "twice", "sums", stop_at_seven, code_learning_rate=0.3)
    seen: list[int] = []
    result = fit(model, tokens, tmp_path / "twice", "sums", lambda done, *_: seen.append(done), code_learning_rate=0.3)
    assert seen == [5, *range(6, 13)] and result.history == expected.history
    before = compressed(model, "sums")[1]
    assert any(n_changed(before[name], weight) for name, weight in expected.weights.items())
    for name, weight in expected.weights.items():
        assert n_changed(weight, result.weights[name]) == 0 and weight.dense().equal(result.weights[name].dense())


def kl(student: PreTrainedModel, model: PreTrainedModel, tokens: Tensor, weights: dict[str, Buffered]) -> Tensor:
    """Of a dense student with these weights."""
    for name, weight in weights.items():
        student.get_submodule(name).weight.data = weight.base.dense()
    return forward_kl(student(tokens).logits, model(tokens).logits.detach()).mean()


@pytest.mark.parametrize("form", ["vectors", "columns"])
def test_a_trusted_change_of_codes_lowers_the_loss_on_the_same_batch(form, model, tokens):
    student, weights = copy.deepcopy(model), compressed(model, form)[1]
    start = {name: Buffered.start(weight, 1.0) for name, weight in weights.items()}
    (loss := kl(student, model, tokens, start)).backward()
    slopes, after = {name: student.get_submodule(name).weight.grad.clone() for name in start}, []
    for trust in (0.1, 0.2):
        moved = {}
        for name, weight in start.items():
            buffer = weight.buffer - 2 * float(weight.buffer.norm() / slopes[name].norm()) * slopes[name]
            moved[name] = weight.rebuild(weight.parameters() | {"buffer": buffer}).recoded(1.0, trust, 5)
        assert any(n_changed(weights[name], weight) for name, weight in moved.items())
        after.append(float(kl(student, model, tokens, moved).detach()))
    assert after[0] <= float(loss.detach())


def test_factors_are_handled_one_by_one_and_other_forms_left_alone(matrix):
    step, draw = PVTuning(), torch.Generator()
    dense, rounding = Dense(matrix), RTN(bits=8, group_size=-1, activations="int8").linear(matrix, LinearStats(48, ()), None)
    for weight in (dense, dense.masked(matrix > 0), rounding, LowRank(dense, dense)):
        assert step.adapt(weight, draw) is weight and step.choose(1, weight) is None and step.settle(weight) is weight
    for form in FORMS:
        base = coded(form, matrix)
        begun = step.adapt(base, draw)
        assert isinstance(begun, Buffered) and step.settle(begun) is base and step.choose(0, begun) is None
    assert isinstance(coded("masked grid", matrix), Masked)


@pytest.mark.parametrize("method", ["vptq", "aqlm", "rtn"])
def test_an_artifact_opens_to_what_was_trained(method, llama, make_pass, run_stages, assert_reloads):
    small = {"bits": 2} if method == "rtn" else {"length": 2, "entries": 16}
    first = run_stages(llama, [make_pass(method, **small)])
    artifact = run_stages(first, [make_pass("pv_tuning", steps=4, code_learning_rate=0.3, max_code_change=0.05)])
    assert_reloads(artifact, atol=1e-5)
    before, after = (Skeleton(Checkpoint(path)).read_weights(0) for path in (first, artifact))
    assert any(n_changed(before[name], weight) for name, weight in after.items())
    assert all(weight.nbytes == before[name].nbytes for name, weight in after.items())


def test_plan_says_where_there_are_no_codes_to_move(cli, llama):
    for before, told in (
        ([], True),
        (["wanda"], True),
        (["rtn:bits=4"], False),
        (["svd", "rtn:bits=4"], False),
        (["vptq"], False),
    ):
        warnings = json.loads(cli("plan", llama, *before, "pv_tuning", "--json").out)["warnings"]
        assert any("no layer has codes to move" in warning for warning in warnings) == told, (before, warnings)
