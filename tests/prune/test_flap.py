"""FLAP: fluctuation, the competition of blocks, and biases that stand for what is constant."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.checkpoint import Checkpoint
from compress.narrow import Kept, attention, n_neurons
from compress.prune.flap import FLAP, fluctuation, offsets, standardised
from compress.skeleton import Skeleton
from compress.stats import LinearStats


def test_fluctuation_is_the_variance_times_the_squared_norm():
    weight, x = torch.randn(8, 5), torch.randn(300, 5) * torch.tensor([1, 2, 3, 0.01, 0]) + 5
    stats = LinearStats(5, {"sum", "sqnorm"})
    stats.add(x)
    expected = x.double().var(0, correction=0) * weight.double().square().sum(0)
    torch.testing.assert_close(fluctuation(weight, stats.finish()), expected, rtol=1e-2, atol=1e-4)


def test_standardised_scores_have_no_mean_and_unit_deviation():
    scores = standardised(torch.rand(50, dtype=torch.float64) * 7 + 3)
    assert float(scores.mean()) == pytest.approx(0, abs=1e-9) and float(scores.std(correction=0)) == pytest.approx(1)
    assert standardised(torch.ones(4, dtype=torch.float64)).tolist() == [0] * 4


def test_offsets_are_the_mean_of_what_goes(llama):
    model, means = Skeleton(Checkpoint(llama)), torch.rand(112)
    kept = Kept(torch.arange(12, 112))
    (found,) = offsets(model, 0, kept, {"mlp.down_proj": means.tolist()}).values()
    weight = model.read_weight(0, "mlp.down_proj").dense()
    torch.testing.assert_close(found, weight[:, :12] @ means[:12])
    assert offsets(model, 0, Kept(), {}) == {} and offsets(model, 0, kept, {})["mlp.down_proj"].is_meta


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("family", ["opt", "gpt2"])
def test_constant_neurons_go_and_their_bias_makes_it_exact(
    family, uniform, make_checkpoint, run_stages, reload, tokens, tmp_path
):
    """16 neurons of each block put out the activation of their bias, whatever comes in."""
    source = tmp_path / "lamed"
    shutil.copytree(make_checkpoint(family), source)
    tensors, model = load_file(source / "model.safetensors"), Skeleton(Checkpoint(source))
    (name,) = model.arch.neurons.sources
    for index in range(2):
        full = model.module_name(index, name)
        matrix = tensors[f"{full}.weight"]
        (matrix.T if model.is_conv1d(name) else matrix)[40:56] = 0
        tensors[f"{full}.bias"][40:56] = 1.5
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    settings = {"units": ("neurons",), "sparsity": 16 / 112, "round_to": 16, "uniform": uniform}
    with torch.no_grad():
        expected = reload(source)(input_ids=tokens).logits
        with_bias, without = (
            reload(run_stages(source, [FLAP(**settings, compensate=compensate)])) for compensate in (True, False)
        )
        torch.testing.assert_close(with_bias(input_ids=tokens).logits, expected, rtol=0, atol=2e-4)
        assert (without(input_ids=tokens).logits - expected).abs().max() > 0.01
    assert with_bias.config.model_type == family or not uniform  # it has that bias anyway


def test_blocks_and_kinds_compete_by_their_parameters(llama):
    """Neurons of block 0 and a group of heads of block 1 are of least score: they go, and nothing else."""
    model = Skeleton(Checkpoint(llama))
    neurons = [[0.0] * 48 + [2.0] * 64, [2.0] * 112]
    found = {"neurons": neurons, "heads": [[2.0] * 4, [0, 0, 2.0, 2.0]], "groups": [[2.0, 2.0], [0.0, 2.0]]}
    share = (48 * 3 * 64 + 64 * 16 * 6) / (2 * (112 * 3 * 64 + 2 * 64 * 16 * 6))
    step = FLAP(sparsity=share, round_to=16, compensate=False)
    narrower = Skeleton(step.surgery(model, found).alter(model))
    assert [n_neurons(narrower, index) for index in range(2)] == [64, 112]
    assert [attention(narrower, index) for index in range(2)] == [(4, 2, 16), (2, 1, 16)]


def test_biases_of_their_own_need_the_loader_and_nothing_removed_needs_none(llama):
    model = Skeleton(Checkpoint(llama))
    for settings, shim in (
        ({}, True),
        ({"uniform": True}, True),
        ({"uniform": True, "compensate": False}, False),
        ({"sparsity": 0}, False),
    ):
        assert bool(FLAP(**{"sparsity": 0.5, **settings}).surgery(model).alter(model).structure) == shim
