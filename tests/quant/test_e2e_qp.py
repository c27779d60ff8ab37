"""E2E-QP: scales move and nothing else does, the loss falls, and a model without grids is refused before anything is computed."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from compress.errors import BadInput
from compress.manifest import Manifest
from compress.quant.e2e_qp import E2EQP

STEPS = {"steps": 30, "batch_size": 4, "learning_rate": 1e-2, "length": 24}


def tensors(artifact):
    return load_file(artifact / "model.safetensors")


@pytest.mark.parametrize("first", ["rtn:bits=2,group_size=16,symmetric=false", "wanda rtn:bits=3,group_size=16", "hqq:bits=2"])
def test_only_scales_move(first, llama, make_pass, run_stages):
    before, after = (tensors(run_stages(llama, [*first.split(), *step])) for step in ([], [E2EQP(**STEPS)]))
    assert before.keys() == after.keys()
    for name, value in after.items():
        assert value.equal(before[name]) != name.rpartition(".")[2].endswith("scale"), name


def test_layers_on_no_grid_stay_and_so_do_factors(llama, run_stages):
    first = ["svd:ratio=0.8,targets=*.mlp.*", "rtn:bits=3,group_size=16,targets=q_proj+*.down"]
    before, after = (tensors(run_stages(llama, [*first, *step], fuse=False)) for step in ([], [E2EQP(**STEPS)]))
    moved = {name for name, value in after.items() if not value.equal(before[name])}
    assert moved and all("q_proj" in name or "scale" in name for name in moved)


@pytest.mark.parametrize("objective", ["ce", *(pytest.param(each, marks=pytest.mark.slow) for each in ("kl", "tsld"))])
def test_the_held_out_loss_falls(objective, llama, run_stages):
    artifact = run_stages(llama, ["rtn:bits=2,group_size=16", E2EQP(objective=objective, hold_out=0.2, **STEPS)])
    held_out = Manifest.read(artifact).steps[-1].training["held_out"]
    assert held_out[-1][1] < held_out[0][1]
    assert E2EQP(objective=objective).needs.teacher == (objective != "ce")


def test_without_grids_there_is_nothing_to_train(llama, run_stages):
    with pytest.raises(BadInput, match="put a quantizer before it"):
        run_stages(llama, ["wanda", "e2e_qp"])


def test_it_is_the_second_half_of_the_recipe(llama, run_stages, assert_reloads):
    artifact = run_stages(llama, ["block_ap:bits=2,group_size=16,iterations=5", E2EQP(**STEPS)])
    assert_reloads(artifact, atol=1e-5)
    assert all(record.bits == 2 for record in Manifest.read(artifact).modules.values())
    assert torch.tensor([record.weight_error for record in Manifest.read(artifact).modules.values()]).gt(0).all()
