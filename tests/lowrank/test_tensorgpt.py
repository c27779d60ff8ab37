"""Factored embeddings: exactness, sizes, readers, and chains with other passes."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from compress.checkpoint import Checkpoint
from compress.errors import BadInput
from compress.export import to as export_to
from compress.loader import KINDS as MODULES
from compress.lowrank.tensor_train import balanced
from compress.lowrank.tensorgpt import TensorGPT, numbers
from compress.manifest import Manifest
from compress.pipeline import plan
from compress.recipe import Recipe
from compress.skeleton import Skeleton
from compress.weights import KINDS, TableFactors, TableTrains

FORMS = ["tensorgpt", "tensorgpt:cores=3", "tensorgpt:form=matrix"]


@pytest.mark.parametrize("cores", [2, 3])
def test_full_bonds_are_exact_and_two_cores_lose_each_rows_own_tail(cores):
    table = torch.randn(20, 60, dtype=torch.float64)
    digits = balanced(60, cores)
    step = TensorGPT(cores=cores, ratio=0.5)
    found = step.factorise(table)
    assert isinstance(found, TableTrains) and found.digits == digits
    assert found.numel == 20 * numbers(digits, found.bonds) <= 0.5 * table.numel()
    assert numbers(digits, tuple(bond + 1 for bond in found.bonds)) > 0.5 * 60 or cores == 3
    if cores == 2:
        (bond,) = found.bonds
        tails = torch.linalg.svdvals(table.view(20, *digits))[:, bond:].square().sum(1)
        torch.testing.assert_close((table - found.dense()).square().sum(1), tails, rtol=1e-10, atol=1e-12)
    trains = torch.einsum("ti,tj->tij", torch.randn(20, digits[0]), torch.randn(20, 60 // digits[0])).flatten(1)
    if cores == 2:
        torch.testing.assert_close(step.factorise(trains).dense(), trains, rtol=0, atol=1e-5)


def test_rows_do_not_depend_on_each_other():
    table = torch.randn(10, 64)
    torch.testing.assert_close(TensorGPT().factorise(table).dense()[3:5], TensorGPT().factorise(table[3:5]).dense())


def test_the_matrix_form_is_the_best_of_its_rank():
    table = torch.randn(50, 24, dtype=torch.float64)
    found = TensorGPT(form="matrix").factorise(table)
    assert isinstance(found, TableFactors) and found.rank == int(0.5 * 50 * 24 / 74)
    tail = torch.linalg.svdvals(table)[found.rank :].square().sum()
    torch.testing.assert_close((table - found.dense()).square().sum(), tail, rtol=1e-10, atol=0)


@pytest.mark.parametrize("settings", [{}, {"cores": 3}, {"form": "matrix"}], ids=str)
def test_the_loader_looks_up_and_scores_by_the_same_matrix(settings):
    weight, x, ids = TensorGPT(**settings).factorise(torch.randn(30, 60)), torch.randn(2, 3, 60), torch.tensor([[3, 0], [29, 7]])
    module = MODULES[weight.kind](60, 30, False, **weight.sizes(), children={})
    for name, tensor in weight.tensors().items():
        assert getattr(module, name).shape == tensor.shape
        getattr(module, name).data = tensor
    torch.testing.assert_close(module.matrix(), weight.dense(), rtol=0, atol=0)
    torch.testing.assert_close(module(ids), weight.dense()[ids], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(module.scores(x), x @ weight.dense().T, rtol=1e-5, atol=1e-4)
    again = KINDS[weight.kind].assemble((0, 0), weight.sizes(), weight.tensors(), {})
    assert again.shape == weight.shape == (30, 60) and again.nbytes == weight.nbytes == 4 * weight.numel
    halved = weight.rebuild({name: value / 2 for name, value in weight.parameters().items()})
    assert halved.dense().norm() < 0.6 * weight.dense().norm()


@pytest.mark.parametrize(
    ("family", "step"), [("llama", FORMS[0]), ("llama-untied", FORMS[1]), ("gemma2", FORMS[2]), ("gpt2", FORMS[2])]
)
def test_opens_saves_bytes_and_exports(family, step, make_checkpoint, run_stages, assert_reloads, reload, tokens, tmp_path):
    source = make_checkpoint(family)
    artifact = run_stages(source, [step])
    model = assert_reloads(artifact, atol=1e-5)
    (record,) = Manifest.read(artifact).tables.values()
    stored, before = (load_file(path / "model.safetensors") for path in (artifact, source))
    sizes = [sum(tensor.nbytes for tensor in tensors.values()) for tensors in (stored, before)]
    assert sizes[0] == sizes[1] - record.dense_nbytes + record.nbytes and record.nbytes <= 0.5 * record.dense_nbytes
    predicted = plan(Recipe.parse({"model": str(source), "passes": [step], "evaluation": None})).predicted_bytes
    assert abs(predicted - (artifact / "model.safetensors").stat().st_size) < 0.02 * predicted
    Skeleton(Checkpoint(artifact)).check()
    dense = reload(export_to("dense", artifact, tmp_path / "dense"))
    with torch.no_grad():
        torch.testing.assert_close(dense(input_ids=tokens).logits, model(input_ids=tokens).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "passes", [["tensorgpt:form=matrix", "gptq:group_size=16"], ["svd_llm", "tensorgpt"], ["tensorgpt", "embeddings:bits=4"]]
)
def test_chains(passes, llama, run_stages, assert_reloads):
    artifact = run_stages(llama, passes)
    assert_reloads(artifact, atol=1e-5)
    (record,) = Manifest.read(artifact).tables.values()
    assert record.kind == ("table" if "embeddings" in passes[1] else "table_factors" if "matrix" in passes[0] else "table_trains")


def test_what_cannot_be_is_refused(make_pass, llama, run_stages):
    with pytest.raises(BadInput, match=r"need ratio=0\.250 at least"):
        run_stages(llama, ["tensorgpt:ratio=0.1"])
    with pytest.raises(BadInput, match=r"embedding is (on a grid|compressed)"):
        run_stages(llama, ["tensorgpt", make_pass("logit_kd", trains="everything")])
    artifact = run_stages(llama, ["tensorgpt:ratio=1"])
    assert not Manifest.read(artifact).tables
