"""LASER: what a cut is, losses that are those of the changed models, and a search that never makes them worse."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from compress.checkpoint import Checkpoint
from compress.lowrank.laser import LASER, UNCUT, Cut, losses_with, reduced
from compress.manifest import Manifest
from compress.skeleton import Skeleton
from compress.walk import Walk
from compress.weights import Dense, Masked


def loss_of(model, tokens: Tensor) -> float:
    logits = model(input_ids=tokens).logits[:, :-1].flatten(0, 1)
    return float(torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten()))


def test_a_cut_removes_the_least_ranks_and_nothing_else():
    weight, mask = torch.randn(24, 40), torch.rand(24, 40) < 0.5
    values = torch.linalg.svdvals(weight.double())
    for rate, rank in ((0.25, 18), (0.5, 12), (0.99, 1)):
        (cut,) = reduced(Dense(weight), [rate])
        assert torch.linalg.matrix_rank(cut.dense().double(), rtol=1e-5) == rank and cut.nbytes == Dense(weight).nbytes
        tail = values[rank:].square().sum()
        torch.testing.assert_close((cut.dense() - weight).double().square().sum(), tail, rtol=1e-4, atol=0)
        (masked,) = reduced(Masked(Dense(weight * mask), mask), [rate])
        assert masked.mask is not None and masked.mask.equal(mask) and not masked.dense()[~mask].any()
    (whole,) = reduced(Dense(weight), [0.0])
    assert whole.dense().equal(weight)


def test_losses_are_those_of_the_models_with_that_cut(llama, tokens, reload, tmp_path):
    skeleton = Skeleton(Checkpoint(llama))
    names = ["model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"]
    already = Cut("model.layers.0.self_attn.v_proj", 0.5)
    found = losses_with(Walk(skeleton, tokens, tmp_path), names, (0.5, 0.9), [already])
    assert found.keys() == {UNCUT, *(Cut(name, rate) for name in names for rate in (0.5, 0.9))}
    for cut, loss in found.items():
        model = reload(llama)
        with torch.no_grad():
            for name, rate in (already, *([cut] if cut != UNCUT else [])):
                matrix = model.get_submodule(name).weight
                matrix.copy_(next(reduced(Dense(matrix.clone()), [rate])).dense())
            assert loss == pytest.approx(loss_of(model, tokens), rel=1e-5)


def test_the_search_takes_the_best_and_only_what_helps(llama, tokens, tmp_path):
    walk = Walk(Skeleton(Checkpoint(llama)), tokens, tmp_path)
    step = LASER(layers=("mlp.*", "*.mlp.*"), rates=(0.3, 0.8), changes=2, windows=2, length=40)
    names = step.names(walk.skeleton)
    assert len(names) == 6
    first = losses_with(walk, sorted(names), step.rates, [])
    chosen = step.measure(walk)
    assert len(chosen) <= 2 and (not chosen) == (min(first.values()) == first[UNCUT])
    if chosen:
        assert first[Cut(*chosen[0])] == min(first.values()) < first[UNCUT]
        assert losses_with(walk, [], step.rates, [Cut(*each) for each in chosen])[UNCUT] < first[UNCUT]


def test_a_rate_cuts_every_layer_that_is_named(llama, run_stages, assert_reloads):
    artifact = run_stages(llama, [LASER(rate=0.5)])
    assert_reloads(artifact, atol=1e-5)
    before, after = (Skeleton(Checkpoint(directory)) for directory in (llama, artifact))
    for index in range(2):
        for local, weight in after.read_weights(index).items():
            same = weight.dense().equal(before.read_weight(index, local).dense())
            assert same == (index == 0 or "mlp" not in local)
    assert Manifest.read(artifact).nbytes == Checkpoint(llama).nbytes


def test_grids_are_left_as_they_are(llama, run_stages):
    quantized = run_stages(llama, ["rtn:targets=up_proj"])
    model = Skeleton(Checkpoint(quantized))
    assert [name.rpartition(".")[2] for name in LASER().names(model)] == ["gate_proj", "down_proj"]


def test_fields():
    assert LASER(rates="0.9+0.5").rates == (0.5, 0.9)  # type: ignore[arg-type]
    assert not LASER(rate=0.5).measures and LASER().measures
    for wrong in ({"rates": (0.0,)}, {"rates": (1.0,)}, {"rates": ()}, {"rate": 1.0}, {"changes": 0}):
        with pytest.raises(ValidationError):
            LASER.model_validate(wrong)
