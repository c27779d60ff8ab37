"""The kv_cache pass: stock transformers rounds as the engine does, before and after other stages, and the scales fit."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from compress.activations import Range, intercept
from compress.errors import BadInput
from compress.export import to as export_to
from compress.manifest import Manifest
from compress.methods import parse
from compress.pipeline import plan
from compress.recipe import Recipe
from compress.verify import verify_artifact

STEPS = ["kv_cache", "kv_cache:kind=int", "kv_cache:bits=4", "kv_cache:bits=4,dynamic=false", "kv_cache:dynamic=true"]


@pytest.mark.parametrize(
    ("family", "step"), [*(("llama", step) for step in STEPS), ("gemma2", "kv_cache"), ("phi3", "kv_cache:bits=3")]
)  # fmt: skip
def test_opens_exactly(family, step, make_checkpoint, run_stages, assert_reloads, reload, tokens):
    source = make_checkpoint(family)
    artifact = run_stages(source, [step])
    model = assert_reloads(artifact)
    with torch.no_grad():
        assert not model(input_ids=tokens).logits.equal(reload(source)(input_ids=tokens).logits)
    assert Manifest.read(artifact).tier == "native-quantized"
    predicted = plan(Recipe.parse({"model": str(source), "passes": [step], "evaluation": None}))
    assert abs(predicted.predicted_bytes - (artifact / "model.safetensors").stat().st_size) < 0.01 * predicted.predicted_bytes


def test_default_is_what_vllm_takes(llama, run_stages):
    artifact = run_stages(llama, ["kv_cache"])
    scheme = json.loads((artifact / "config.json").read_text())["quantization_config"]["kv_cache_scheme"]
    assert scheme == {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, "strategy": "tensor"}
    stored = load_file(artifact / "model.safetensors")
    for index in range(2):
        for name in ("k_scale", "v_scale"):
            assert stored[f"model.layers.{index}.self_attn.{name}"].shape == (1,)


def test_scales_are_the_largest_of_the_calibration_text(llama, run_stages, reload, calibration, tokenizer):
    from compress.calibration import read_text, windows

    artifact = run_stages(llama, ["kv_cache:kind=int"])
    texts, origin = read_text(calibration.data, calibration.column, calibration.split)
    chosen = windows(tokenizer, texts, origin, n=calibration.samples, length=calibration.length, seed=0).tokens
    model, seen = reload(llama), {}
    for index, layer in enumerate(model.model.layers):
        intercept(layer.self_attn, lambda which, x, i=index: seen.__setitem__((i, which), float(x.abs().max())) or x)
    with torch.no_grad():
        model(input_ids=chosen, use_cache=False)
    stored = load_file(artifact / "model.safetensors")
    for (index, which), largest in seen.items():
        assert stored[f"model.layers.{index}.self_attn.{which}_scale"].item() == pytest.approx(largest / 127.5, rel=1e-5)


@pytest.mark.parametrize(
    "steps",
    [
        ("kv_cache:bits=4", "svd_llm"), ("kv_cache", "rtn:symmetric=false,group_size=16"), ("embeddings", "kv_cache"),
        ("rtn:symmetric=false,group_size=16", "kv_cache"), ("kv_cache", "embeddings"), ("kv_cache", "kv_cache:bits=4"),
    ],
    ids=str,
)  # fmt: skip
def test_chains(steps, llama, run_stages, assert_reloads):
    artifact = run_stages(llama, list(steps))
    assert_reloads(artifact)
    quantization = json.loads((artifact / "config.json").read_text())["quantization_config"]
    assert quantization["kv_cache_scheme"]["num_bits"] == [parse(s) for s in steps if s.startswith("kv_cache")][-1].bits


def test_streamed_verification_rounds_too(llama, run_stages):
    artifact = run_stages(llama, ["kv_cache", "fp8"])
    assert verify_artifact(artifact, full=False).max_difference == 0  # in a process of its own


def test_training_keeps_the_rounding(llama, make_pass, run_stages, assert_reloads):
    assert_reloads(run_stages(llama, ["kv_cache", make_pass("logit_kd")]), atol=1e-5)


def test_dense_export_drops_it(llama, run_stages, reload, tokens, tmp_path):
    dense = export_to("dense", run_stages(llama, ["kv_cache"]), tmp_path / "dense")
    with torch.no_grad():
        assert reload(dense)(input_ids=tokens).logits.equal(reload(llama)(input_ids=tokens).logits)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "opt"])
def test_attention_that_readers_do_not_know(family, make_checkpoint, run_stages):
    with pytest.raises(BadInput, match="does not know the attention"):
        run_stages(make_checkpoint(family), ["kv_cache"])


def test_four_bit_floats_with_a_rounded_cache_are_for_bfloat16(llama, run_stages):
    with pytest.raises(BadInput, match="bfloat16 only"):
        run_stages(llama, ["nvfp4", "kv_cache"])


def test_settings():
    with pytest.raises(BadInput, match="kind=float has 8 bits"):
        parse("kv_cache:kind=float,bits=4")
    assert Range(8, True).half == 448 and Range(4, False).half == 7.5
