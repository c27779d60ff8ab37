"""Every scheme, alone and with others: stock transformers opens the artifact to the very logits that were computed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from compress.checkpoint import Checkpoint
from compress.errors import BadInput
from compress.export import compressed_tensors
from compress.manifest import Manifest
from compress.methods import parse
from compress.pipeline import plan
from compress.recipe import Recipe
from compress.skeleton import Skeleton
from compress.weights import FloatQuantized, Quantized

SCHEMES = [
    "rtn:activations=int8", "rtn:bits=8,group_size=-1,activations=int8", "rtn:bits=8,group_size=16,activations=fp8",
    "rtn:bits=3,group_size=16,activations=int4", "rtn:symmetric=false,group_size=16,activations=int8",
    "rtn:bits=8,group_size=-1,symmetric=false,activations=int8", "fp8", "fp8:activations=none", "fp8:scheme=tensor",
    "mxfp4", "mxfp4:mse=false", "nvfp4", "nvfp4:mse=false",
]  # fmt: skip
MIXED = [
    ("rtn:bits=3,group_size=16,symmetric=false,skip=*down_proj+lm_head", "rtn:symmetric=false,group_size=32"),
    ("rtn:symmetric=false,group_size=96",),
    ("rtn:symmetric=false,group_size=16", "fp8:targets=*.mlp.*"),
    ("fp8", "rtn:targets=*down_proj,activations=int8", "rtn:bits=8,group_size=-1,activations=int8,targets=*o_proj"),
    ("svd:ratio=0.6", "rtn:symmetric=false,bits=5,group_size=16"),
]  # fmt: skip


def quantization_of(artifact: Path) -> dict:
    return json.loads((artifact / "config.json").read_text())["quantization_config"]


def check_bytes(artifact: Path) -> None:
    """Every layer's tensors take what its weight says; outlined with meta tensors it says the same."""
    stored = load_file(artifact / "model.safetensors")
    skeleton, records = Skeleton(Checkpoint(artifact)), Manifest.read(artifact).modules
    for index in range(len(skeleton.blocks)):
        outlined = skeleton.read_weights(index, meta=True)
        for local, weight in skeleton.read_weights(index).items():
            name = skeleton.module_name(index, local)
            in_file = sum(t.nbytes for key, t in stored.items() if key.startswith(name + ".") and not key.endswith("bias"))
            assert weight.nbytes == outlined[local].nbytes == records[name].nbytes == in_file, name


@pytest.mark.parametrize(("family", "step"), [*(("llama", step) for step in SCHEMES), ("gpt2", "fp8"), ("gpt2", "nvfp4")])
def test_scheme_opens_exactly(step, family, make_checkpoint, run_stages, assert_reloads):
    artifact = run_stages(make_checkpoint(family), [step])
    assert_reloads(artifact)
    check_bytes(artifact)


@pytest.mark.parametrize("step", SCHEMES[2::2])
def test_bfloat16_weights_open_exactly_in_float32(step, make_checkpoint, run_stages, assert_reloads):
    artifact = run_stages(make_checkpoint("llama", torch.bfloat16), [step], dtype="float32")
    assert_reloads(artifact)


@pytest.mark.parametrize(("fuse", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
@pytest.mark.parametrize("steps", MIXED, ids=str)
def test_mixed_schemes_open_exactly(steps, dtype, fuse, make_checkpoint, run_stages, assert_reloads):
    source = make_checkpoint("llama", dtype)
    artifact = run_stages(source, list(steps), dtype="float32", fuse=fuse)
    assert_reloads(artifact)
    check_bytes(artifact)
    assert quantization_of(artifact)["format"] in ("mixed-precision", "pack-quantized")
    assert "dequantize" not in quantization_of(artifact)
    predicted = plan(Recipe.parse({"model": str(source), "passes": list(steps), "evaluation": None, "dtype": "float32"}))
    found = (artifact / "model.safetensors").stat().st_size
    assert abs(predicted.predicted_bytes - found) < 0.02 * found


def test_the_standard_layout_where_one_scheme_is_all_there_is(llama, run_stages, assert_reloads):
    artifact = run_stages(llama, ["rtn:symmetric=false,group_size=16"])
    stored, config = load_file(artifact / "model.safetensors"), quantization_of(artifact)
    assert config["dequantize"] and stored["model.layers.0.mlp.up_proj.weight_zero_point"].dtype == torch.int32
    then = run_stages(artifact, ["rtn:bits=3,group_size=16,targets=*o_proj"])
    assert_reloads(then)
    check_bytes(then)
    stored, config = load_file(then / "model.safetensors"), quantization_of(then)
    assert "dequantize" not in config and stored["model.layers.0.mlp.up_proj.weight_zero_point"].dtype == torch.int8
    back = run_stages(then, ["rtn:symmetric=false,group_size=16"])
    assert_reloads(back)
    assert quantization_of(back)["dequantize"]


def test_w8a8_is_what_runtimes_know(llama, run_stages):
    artifact = run_stages(llama, ["rtn:bits=8,group_size=-1,activations=int8"])
    config = quantization_of(artifact)
    (group,) = config["config_groups"].values()
    assert config["format"] == group["format"] == "int-quantized" and group["targets"] == ["Linear"]
    assert group["input_activations"] == {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    stored = load_file(artifact / "model.safetensors")
    assert stored["model.layers.0.mlp.up_proj.weight"].dtype == torch.int8
    records = Manifest.read(artifact).modules.values()
    assert {record.activations for record in records} == {"int8"}


def test_four_bit_floats_beside_others_are_for_bfloat16(llama, make_checkpoint, run_stages, reload):
    with pytest.raises(BadInput, match="bfloat16 only"):
        run_stages(llama, ["nvfp4", "rtn:targets=*o_proj"])
    source = make_checkpoint("llama", torch.bfloat16)
    artifact = run_stages(source, ["nvfp4", "rtn:targets=*o_proj"], dtype="bfloat16")
    probe = load_file(artifact / "verification" / "probe.safetensors")
    with torch.no_grad():
        logits = reload(artifact, torch.bfloat16)(input_ids=probe["tokens"]).logits.float()
    assert logits.equal(probe["logits"])


@pytest.mark.parametrize("step", ["magnitude", "rtn:bits=3,group_size=16", "svd_llm", "wanda"])
@pytest.mark.parametrize("first", ["fp8", "rtn:bits=8,group_size=-1,activations=int8"])
def test_rounded_inputs_are_kept_or_given_up_by_later_stages(first, step, llama, run_stages, assert_reloads):
    artifact = run_stages(llama, [first, step], fuse=False)
    assert_reloads(artifact)
    kept = {record.activations for record in Manifest.read(artifact).modules.values()}
    assert kept == ({parse(first).activations} if step in ("magnitude", "wanda") else {None})


def test_encoding_is_undone_by_decoding():
    torch.manual_seed(0)
    codes = torch.randint(0, 16, (6, 32), dtype=torch.uint8)
    weights = [
        FloatQuantized(codes, torch.randint(100, 140, (6, 1), dtype=torch.uint8)),
        FloatQuantized(codes, torch.rand(6, 2).to(torch.float8_e4m3fn), torch.rand(1) + 1),
        FloatQuantized(torch.randn(6, 32).to(torch.float8_e4m3fn), torch.rand(6, 1), None, "fp8"),
        FloatQuantized(torch.randn(6, 32).to(torch.float8_e4m3fn), torch.rand(1, 1)),
        Quantized(codes.to(torch.int8) - 8, torch.rand(6, 2), None, 4, "int4"),
        Quantized(codes.to(torch.int8) - 8, torch.rand(6, 2), torch.randint(-8, 8, (6, 2), dtype=torch.int8), 4, None, True),
    ]
    for weight in weights:
        stored = {f"x.{key}": tensor for key, tensor in compressed_tensors.encode(weight).items()}
        assert sorted(f"x.{key}" for key in compressed_tensors.tensor_names(weight)) == sorted(stored)
        group = compressed_tensors.Scheme.of(weight).group()
        again = compressed_tensors.decode("x", stored.__getitem__, stored.__contains__, group)
        assert type(again) is type(weight) and again.inputs == weight.inputs and again.nbytes == weight.nbytes
        assert again.dense().equal(weight.dense()) and sum(t.nbytes for t in stored.values()) == weight.nbytes


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"input_activations": {"num_bits": 8, "type": "int", "strategy": "tensor", "dynamic": False}}, "per token"),
        ({"output_activations": {"num_bits": 8}}, "outputs"),
        ({"weights": {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]}}, "float/block"),
    ],
)  # fmt: skip
def test_foreign_schemes_that_are_not_read(change, words):
    group = {"weights": {"num_bits": 8, "type": "int", "strategy": "channel"}, **change}
    with pytest.raises(BadInput, match=words):
        compressed_tensors.decode("x", lambda _: torch.zeros(1), lambda _: True, group)


def test_groups_are_found_by_name_pattern_and_class():
    groups = {"a": {"targets": ["Linear"]}, "b": {"targets": ["re:.*mlp.*"]}, "c": {"targets": ["model.mlp.up"]}}
    for name, expected in (("model.mlp.up", "c"), ("model.mlp.down", "b"), ("model.o_proj", "a")):
        assert compressed_tensors.group_of(name, {"config_groups": groups}) is groups[expected]
