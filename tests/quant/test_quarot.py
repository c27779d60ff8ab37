"""QuaRot: the function stays, outliers spread, and what cannot be rotated is refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.checkpoint import Checkpoint
from compress.errors import BadInput
from compress.quant.quarot import mean_keeping_rotation
from compress.skeleton import Skeleton
from compress.stream import forward

ROTATABLE = ["llama", "llama-untied", "mistral", "qwen2", "qwen3", "phi3", "gpt2", "opt", "gpt_neox"]


def logits(directory, tokens, dtype=torch.float64):
    return forward(Skeleton(Checkpoint(directory), dtype=dtype), tokens)


@pytest.mark.parametrize("family", ROTATABLE)
def test_logits_stay(family, make_checkpoint, run_stages, assert_reloads, tokens):
    """In float64, from a float64 checkpoint, up to what the models themselves compute in float32."""
    source = make_checkpoint(family, torch.float64)
    artifact = run_stages(source, ["quarot"])
    before, after = logits(source, tokens), logits(artifact, tokens)
    assert float((after - before).abs().max()) < 2e-5 * float(before.abs().max())
    assert json.loads((artifact / "config.json").read_text())["tie_word_embeddings"] is False
    assert_reloads(run_stages(make_checkpoint(family), ["quarot"]))


def test_every_matrix_is_rotated_and_gains_are_gone(make_checkpoint, run_stages):
    source = make_checkpoint("llama")
    old, new = (Skeleton(Checkpoint(path)) for path in (source, run_stages(source, ["quarot"])))
    for index in range(2):
        changed = new.read_weights(index)
        for local, weight in old.read_weights(index).items():
            assert not torch.allclose(weight.dense(), changed[local].dense(), atol=1e-3)
        for name, value in new.read_others(index).items():
            assert "norm" not in name or bool((value == 1).all())


@pytest.fixture(scope="module")
def lopsided(make_checkpoint, tmp_path_factory):
    """A model in which a norm's gain makes one input of its readers thirty times as large as the others."""
    directory = tmp_path_factory.mktemp("lopsided") / "model"
    shutil.copytree(make_checkpoint("llama"), directory)
    tensors = load_file(directory / "model.safetensors")
    for index in range(2):
        tensors[f"model.layers.{index}.input_layernorm.weight"][5] = 30
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def test_an_outlier_channel_spreads(lopsided, run_stages):
    """Afterwards no input of the readers stands out."""
    rotated = Skeleton(Checkpoint(run_stages(lopsided, ["quarot"]))).read_weights(0)["self_attn.q_proj"].dense()
    tensors = load_file(lopsided / "model.safetensors")
    fused = tensors["model.layers.0.self_attn.q_proj.weight"] * tensors["model.layers.0.input_layernorm.weight"]

    def kurtosis(matrix):
        return float((matrix**4).mean() / (matrix**2).mean() ** 2)

    assert kurtosis(fused) > 20 and kurtosis(rotated) < 5


def test_rounding_inputs_loses_less_after_it(lopsided, run_stages, tokens):
    """The point of it: with four bits for weights and inputs, a model with an outlier channel stays closer to itself."""
    rounded = "rtn:bits=4,group_size=-1,activations=int4"
    dense, plain, turned = (
        logits(path, tokens, torch.float32)
        for path in (lopsided, run_stages(lopsided, [rounded]), run_stages(lopsided, ["quarot", rounded]))
    )
    assert (turned - dense).norm() < 0.8 * (plain - dense).norm()


@pytest.mark.parametrize("size", [7, 12, 64])
def test_rotation_around_the_mean(size):
    rotation = mean_keeping_rotation(size, 0)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(size, dtype=torch.float64))
    torch.testing.assert_close(rotation.sum(0), torch.ones(size, dtype=torch.float64))
    assert not torch.equal(rotation, mean_keeping_rotation(size, 1))


def test_low_rank_layers_are_rotated_through_their_outer_factors(make_checkpoint, run_stages, assert_reloads, tokens):
    factored = run_stages(make_checkpoint("llama"), ["svd:ratio=0.5"])
    rotated = run_stages(factored, ["quarot"])
    torch.testing.assert_close(logits(rotated, tokens), logits(factored, tokens), atol=1e-3, rtol=1e-3)
    assert_reloads(rotated)


@pytest.mark.parametrize("first", ["wanda", "rtn", "hqq", "spqr"])
def test_masks_and_grids_are_not_filled(first, make_checkpoint, run_stages):
    with pytest.raises(BadInput, match="put quarot before"):
        run_stages(make_checkpoint("llama"), [first, "quarot"])


def test_models_that_norm_their_outputs_are_refused(make_checkpoint, run_stages):
    with pytest.raises(BadInput, match="norms each layer's output"):
        run_stages(make_checkpoint("gemma2"), ["quarot"])
