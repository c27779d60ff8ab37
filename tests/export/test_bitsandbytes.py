"""The format of bitsandbytes: the tensors that library itself saves, whole artifacts in its real reader, and what is refused."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from compress.checkpoint import Checkpoint
from compress.errors import BadInput
from compress.export import bitsandbytes, layers
from compress.export import to as export_to
from compress.manifest import Manifest
from compress.pipeline import plan
from compress.recipe import Recipe
from compress.skeleton import Skeleton
from compress.stream import forward
from compress.verify import PROBE, verify_artifact
from compress.weights import Blockwise, LowRank, Masked, Quantized, RowInt8, Sum

pytestmark = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")

METHODS = {"nf4": {}, "fp4": {"double_quant": True}, "llm_int8": {}}
WIDE = {"gpt2": {"n_inner": 128}, "opt": {"ffn_dim": 128}, "qwen3": {"intermediate_size": 128, "head_dim": 32}}
"""Widths that bitsandbytes reads right on every processor (see :func:`compress.weights.blockwise.is_misread`), by family."""
FAMILIES = ["llama", "llama-untied", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "gpt2", "opt", "gpt_neox"]


@pytest.fixture(scope="module")
def readable(make_checkpoint):
    """``readable(family, dtype)``: a tiny checkpoint of such widths."""

    def make(family: str = "llama", dtype: torch.dtype = torch.float32) -> Path:
        return make_checkpoint(family, dtype, **WIDE.get(family, {"intermediate_size": 128}))

    return make


@pytest.fixture(scope="module")
def llama(readable) -> Path:
    return readable()


def logits_of(model, tokens):
    with torch.no_grad():
        return model(input_ids=tokens).logits


def config_of(directory: Path) -> dict:
    return json.loads((directory / "config.json").read_text())


@st.composite
def matrices(draw) -> Blockwise | RowInt8:
    shape = draw(st.integers(1, 24)), draw(st.integers(1, 70))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    stored = draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float16)))
    if draw(st.booleans()):
        codes = torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)
        return RowInt8(codes, torch.rand(shape[0], generator=generator), draw(st.sampled_from((6.0, 0.0))), stored)
    block_size, nested = draw(st.sampled_from((32, 64, 4096))), draw(st.booleans())
    codes = torch.randint(16, shape, generator=generator, dtype=torch.uint8)
    n_blocks = -(-codes.numel() // block_size)
    absmax = torch.rand(n_blocks, generator=generator)
    levels = torch.linspace(-1, 0.875, 16)
    arguments = (levels, draw(st.sampled_from(("nf4", "fp4"))), block_size, stored, torch.bfloat16)
    if not nested:
        return Blockwise(codes, absmax, *arguments)
    tables = torch.rand(-(-n_blocks // 256), generator=generator), torch.rand(256, generator=generator)
    return Blockwise(codes, (absmax * 255).to(torch.uint8), *arguments, *tables, draw(st.floats(0, 1)))


@settings(max_examples=60, deadline=None)
@given(matrices())
def test_what_is_written_is_read_back_and_counted(weight):
    tensors = bitsandbytes.encode(weight)
    assert sorted(tensors) == sorted(bitsandbytes.tensor_names(weight))
    assert sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) == weight.nbytes
    group = json.loads(json.dumps(bitsandbytes.group(weight)))
    again = bitsandbytes.decode("layer", lambda name: tensors[name[6:]], lambda name: name[6:] in tensors, group)
    assert type(again) is type(weight) and again.codes.equal(weight.codes) and again.dense().equal(weight.dense())
    assert (again.dtype, again.nbytes, bitsandbytes.group(again)) == (weight.dtype, weight.nbytes, group)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("key", "options", "wanted"),
    [
        ("nf4", {}, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
        ("nf4", {"double_quant": True}, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}),
        ("fp4", {}, {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}),
        ("llm_int8", {}, {"load_in_8bit": True}),
    ],
    ids=["nf4", "nf4 nested", "fp4", "llm_int8"],
)
def test_the_file_is_the_one_that_transformers_would_save(
    key, options, wanted, dtype, readable, make_pass, run_stages, reload, tokens, tmp_path
):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    source = readable("llama", dtype)
    artifact = run_stages(source, [make_pass(key, **options)])
    configuration = BitsAndBytesConfig(**wanted)
    AutoModelForCausalLM.from_pretrained(source, dtype=dtype, quantization_config=configuration).save_pretrained(tmp_path)
    ours, theirs = load_file(artifact / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and ours[name].equal(tensor), name
    config, other = (config_of(directory)["quantization_config"] for directory in (artifact, tmp_path))
    differing = {name for name in config | other if config.get(name) != other.get(name)}
    assert differing <= {"llm_int8_skip_modules", "bnb_4bit_compute_dtype"}
    theirs_again = Skeleton(Checkpoint(tmp_path), dtype=dtype)  # such checkpoints are sources too
    theirs_again.check()
    assert forward(theirs_again, tokens).equal(logits_of(reload(tmp_path, "auto"), tokens).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("key", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_architecture_opens_in_the_stock_reader(family, key, dtype, readable, make_pass, run_stages, reload, tokens):
    """In the dtypes of the file, whatever the run was told; biases, norms and Conv1D layers included."""
    artifact = run_stages(readable(family, dtype), [make_pass(key, **METHODS[key])], dtype="float32")
    config, manifest = config_of(artifact), Manifest.read(artifact)
    assert config["model_type"] == family.partition("-")[0] and manifest.tier == "native-quantized"
    assert manifest.compute_dtype == str(dtype).removeprefix("torch.")
    model, probe = reload(artifact, "auto"), load_file(artifact / PROBE)
    assert logits_of(model, probe["tokens"]).float().equal(probe["logits"])
    skeleton = Skeleton(Checkpoint(artifact), dtype=dtype)
    skeleton.check()
    assert forward(skeleton, tokens).equal(logits_of(model, tokens).float())


def test_the_dtype_of_the_product_is_the_one_asked_for(readable, make_pass, run_stages, assert_reloads):
    source = readable("llama")
    artifact = run_stages(source, [make_pass("nf4", compute_dtype="bfloat16")])
    assert config_of(artifact)["quantization_config"]["bnb_4bit_compute_dtype"] == "bfloat16"
    assert_reloads(artifact)
    probes = [load_file(a / PROBE)["logits"] for a in (artifact, run_stages(source, [make_pass("nf4")]))]
    assert not probes[0].equal(probes[1])


def test_outliers_of_the_inputs_are_handled_as_the_reader_does(llama, make_pass, run_stages, assert_reloads, tmp_path):
    import shutil

    loud = tmp_path / "loud"
    shutil.copytree(llama, loud)
    tensors = load_file(loud / "model.safetensors")
    for index in range(2):
        tensors[f"model.layers.{index}.input_layernorm.weight"][[3, 40]] *= 12
    save_file(tensors, loud / "model.safetensors", metadata={"format": "pt"})
    logits = []
    for threshold in (6.0, 0.0):
        artifact = run_stages(loud, [make_pass("llm_int8", threshold=threshold)])
        assert_reloads(artifact)
        logits.append(load_file(artifact / PROBE)["logits"])
    assert not logits[0].equal(logits[1])


@pytest.mark.parametrize("key", METHODS)
def test_low_rank_factors_and_parts_of_sums(key, llama, make_pass, run_stages, assert_reloads):
    import bitsandbytes as library

    step = make_pass(key, **METHODS[key])
    artifact = run_stages(llama, [make_pass("svd_llm", ratio=0.6), step])
    model = assert_reloads(artifact, remote=True)
    expected = library.nn.Linear8bitLt if key == "llm_int8" else library.nn.Linear4bit
    layer = model.get_submodule("model.layers.1.mlp.up_proj")
    assert type(layer.down) is type(layer.up) is expected
    weight = Skeleton(Checkpoint(artifact)).read_weights(1)["mlp.up_proj"]
    assert isinstance(weight, LowRank) and isinstance(weight.down, Blockwise | RowInt8)
    summed = run_stages(llama, [step, make_pass("lorc", factor_bits=None, rank=4)] if key == "nf4" else [step])
    assert_reloads(summed)
    if key == "nf4":
        weight = Skeleton(Checkpoint(summed)).read_weights(0)["mlp.up_proj"]
        assert isinstance(weight, Sum) and isinstance(weight.parts[0], Blockwise)


def test_layers_that_stay_dense_are_named(readable, make_pass, run_stages, assert_reloads):
    artifact = run_stages(readable("gpt2"), [make_pass("nf4", targets="*.h.1.*", skip="c_fc")])
    skipped = config_of(artifact)["quantization_config"]["llm_int8_skip_modules"]
    assert "lm_head" in skipped and "transformer.h.1.mlp.c_fc" in skipped and len(skipped) == 1 + 4 + 1
    assert_reloads(artifact)


def test_both_4_bit_kinds_share_an_artifact(llama, make_pass, run_stages, assert_reloads):
    steps = [make_pass("nf4", targets="mlp.*+*_proj", skip="q_proj"), make_pass("fp4", targets="q_proj", double_quant=True)]
    assert_reloads(run_stages(llama, steps))


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        (["nf4:targets=q_proj", "rtn:targets=k_proj"], "read by one library"),
        (["nf4:targets=q_proj", "llm_int8:targets=k_proj"], "either nf4 and fp4 or llm_int8"),
        (["nf4:targets=q_proj", "nf4:targets=k_proj,compute_dtype=bfloat16"], "the same settings"),
        (["llm_int8:targets=q_proj", "llm_int8:targets=k_proj,threshold=3"], "the same settings"),
    ],
)
def test_layers_that_no_one_config_describes_are_refused_before_compute(passes, message, llama):
    with pytest.raises(BadInput, match=message):
        plan(Recipe.parse({"passes": passes, "model": str(llama)}))


def test_a_plan_sizes_it(llama, make_pass, run_stages):
    for key, options in METHODS.items():
        recipe = Recipe.parse({"passes": [make_pass(key, **options)], "model": str(llama)})
        found = plan(recipe)
        assert found.tier == "native-quantized"
        assert found.predicted_bytes == pytest.approx(Manifest.read(run_stages(llama, list(recipe.passes))).nbytes, rel=0.01)


@pytest.mark.parametrize("key", METHODS)
def test_an_artifact_is_quantized_anew_or_made_dense(key, llama, make_pass, run_stages, assert_reloads, reload, tokens, tmp_path):
    artifact = run_stages(llama, [make_pass(key, **METHODS[key])])
    again = run_stages(artifact, [make_pass("gptq", group_size=16)])
    assert_reloads(again)
    assert config_of(again)["quantization_config"]["quant_method"] == "compressed-tensors"
    assert isinstance(Skeleton(Checkpoint(again)).read_weights(0)["mlp.up_proj"], Quantized)
    model = reload(export_to("dense", artifact, tmp_path / "dense"))
    weight = Skeleton(Checkpoint(artifact)).read_weights(1)["mlp.up_proj"]
    assert model.get_submodule("model.layers.1.mlp.up_proj").weight.equal(weight.dense())
    if key != "llm_int8":  # whose reader rounds inputs too
        torch.testing.assert_close(logits_of(model, tokens), logits_of(reload(artifact), tokens), rtol=0, atol=1e-4)


def test_a_mask_is_known_again(llama, make_pass, run_stages):
    artifact = run_stages(llama, [make_pass("wanda"), make_pass("nf4")])
    weight = Skeleton(Checkpoint(artifact)).read_weights(1)["mlp.up_proj"]
    assert isinstance(weight, Masked) and isinstance(weight.inner, Blockwise)
    assert Manifest.read(artifact).modules["model.layers.1.mlp.up_proj"].sparsity == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("key", METHODS)
def test_training_moves_scales_and_norms(key, llama, make_pass, run_stages, assert_reloads):
    chain = [make_pass(key, **METHODS[key]), make_pass("logit_kd", learning_rate=1e-2)]
    artifact = run_stages(llama, chain)
    assert_reloads(artifact, atol=1e-5)
    before, after = (
        Skeleton(Checkpoint(run_stages(llama, steps))).read_weights(1)["mlp.up_proj"] for steps in (chain[:1], chain)
    )
    assert after.codes.equal(before.codes)
    assert after.absmax.equal(before.absmax) == (key == "fp4")  # doubly quantized here


def test_it_verifies_block_by_block(readable, make_pass, run_stages):
    artifact = run_stages(readable("llama", torch.bfloat16), [make_pass("llm_int8")])
    assert verify_artifact(artifact, full=False).max_difference == 0


def test_without_the_library_it_is_said_before_compute(llama, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)  # what makes an import fail
    for key in METHODS:
        with pytest.raises(BadInput, match=r"pip install 'compress-lm\[bitsandbytes\]'"):
            plan(Recipe.parse({"passes": [key], "model": str(llama)}))


def test_other_storage_than_bytes_is_refused(llama, make_pass, run_stages, tmp_path):
    artifact = run_stages(llama, [make_pass("nf4")])
    tensors = load_file(artifact / "model.safetensors")
    source = layers.Source(tensors.__getitem__, tensors.__contains__, config_of(artifact)["quantization_config"])
    name = "model.layers.0.mlp.up_proj"
    assert isinstance(layers.read_weight(name, source), Blockwise)
    tensors[f"{name}.weight"] = tensors[f"{name}.weight"].squeeze().view(torch.bfloat16).unsqueeze(1)
    with pytest.raises(BadInput, match="stored as bytes"):
        layers.read_weight(name, source)


@pytest.mark.parametrize("shape", [(64, 128), (48, 64), (64, 112), (7, 96)])
def test_what_the_library_decodes_wrongly_here_is_known(shape):
    from compress.weights.blockwise import bitsandbytes as functions
    from compress.weights.blockwise import is_misread

    packed, state = functions().quantize_4bit(matrix := torch.randn(shape), quant_type="nf4", blocksize=64)
    _, in_one = functions().quantize_4bit(matrix.view(1, -1), quant_type="nf4", blocksize=64)
    expected = functions().dequantize_4bit(packed, in_one).view(shape)  # one row has no end within
    assert is_misread(shape, 64) or functions().dequantize_4bit(packed, state).equal(expected)
    assert not is_misread((64, 128), 64)


def test_artifacts_that_the_library_misreads_here_are_read_block_by_block(readable, make_pass, run_stages, monkeypatch, caplog):
    artifact = run_stages(readable(), [make_pass("nf4")])
    assert not bitsandbytes.misread_here(Checkpoint(artifact), "cpu")
    monkeypatch.setattr(bitsandbytes, "is_misread", lambda shape, block_size: True)  # as on another processor
    assert verify_artifact(artifact).how == "streamed" and "processor" in caplog.text
    assert not bitsandbytes.misread_here(Checkpoint(artifact), "cuda")
