"""Every supported architecture: streamed it computes what transformers computes, and its artifacts open."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.arch import ARCHITECTURES
from compress.checkpoint import Checkpoint
from compress.errors import BadInput
from compress.manifest import Manifest
from compress.skeleton import Skeleton
from compress.stream import forward

FAMILIES = [
    "llama", "llama-untied", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "gpt2", "opt", "gpt_neox",
]  # fmt: skip
METHODS = ["gptq", "wanda", "svd_llm"]


def logits_of(model, tokens):
    with torch.no_grad():
        return model(input_ids=tokens).logits


def test_every_supported_architecture_is_tried_here():
    assert {family.partition("-")[0] for family in FAMILIES} == set(ARCHITECTURES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_logits_are_those_of_transformers(family, dtype, make_checkpoint, reload, tokens):
    directory = make_checkpoint(family, dtype)
    skeleton = Skeleton(Checkpoint(directory))
    skeleton.check()
    expected = logits_of(reload(directory), tokens)
    assert torch.equal(forward(skeleton, tokens), expected)
    assert torch.equal(forward(skeleton, tokens[:, :1]), logits_of(reload(directory), tokens[:, :1]))  # and once more


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_compressed_model_opens_in_stock_transformers(
    family, method, make_checkpoint, make_pass, run_stages, assert_reloads, tokens
):
    artifact = run_stages(make_checkpoint(family), [make_pass(method)])
    model = assert_reloads(artifact)
    skeleton = Skeleton(Checkpoint(artifact))
    skeleton.check()
    assert torch.equal(forward(skeleton, tokens), logits_of(model, tokens))
    manifest = Manifest.read(artifact)
    assert set(manifest.modules) == set(skeleton.linear_names())
    assert {record.kind for record in manifest.modules.values()} == {
        {"gptq": "quantized", "wanda": "masked", "svd_llm": "low_rank"}[method]
    }


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("first", METHODS)
def test_training_what_compression_left(family, first, make_checkpoint, make_pass, run_stages, assert_reloads):
    artifact = run_stages(make_checkpoint(family), [make_pass(first), make_pass("logit_kd", trains="everything")])
    assert_reloads(artifact, atol=1e-5)  # the training stage computes all layers in one go
    untrained = run_stages(make_checkpoint(family), [make_pass(first)])
    trained, before = load_file(artifact / "model.safetensors"), load_file(untrained / "model.safetensors")
    changed = {name for name in trained if not torch.equal(trained[name], before[name])}
    frozen = {name for name in trained if name.endswith(("weight_packed", "weight_shape"))}
    assert changed | frozen == set(trained), "some tensors were not trained"
    assert not changed & frozen


def test_weights_without_the_base_models_prefix_are_found(make_checkpoint, tmp_path, reload, tokens):
    """As the gpt2 of the hub is stored."""
    source, bare = make_checkpoint("gpt2"), tmp_path / "bare"
    shutil.copytree(source, bare)
    tensors = load_file(source / "model.safetensors")
    renamed = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    assert renamed.keys() != tensors.keys()
    save_file(renamed, bare / "model.safetensors", metadata={"format": "pt"})
    skeleton = Skeleton(Checkpoint(bare))
    skeleton.check()
    assert torch.equal(forward(skeleton, tokens), logits_of(reload(source), tokens))


def test_an_embedding_stored_only_as_the_tied_head_is_found(llama, tmp_path, reload, tokens):
    other = tmp_path / "head-only"
    shutil.copytree(llama, other)
    tensors = load_file(llama / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    skeleton = Skeleton(Checkpoint(other))
    skeleton.check()
    assert torch.equal(forward(skeleton, tokens), logits_of(reload(llama), tokens))


@pytest.mark.parametrize(
    ("model_type", "told"),
    [
        ("qwen2_moe", "mixture-of-experts layers are not handled yet"),
        ("mixtral", r"compress/arch\.py"),
        ("lama", "did you mean 'llama'"),
        ("mamba", r"row \(block path and input groups\) in compress/arch\.py"),
    ],
)
def test_unsupported_model_types_are_refused_by_name(model_type, told, llama, tmp_path):
    directory = tmp_path / "unknown"
    shutil.copytree(llama, directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"model_type": model_type}))
    with pytest.raises(BadInput, match=told) as error:
        Checkpoint(directory)
    assert repr(model_type) in str(error.value)
