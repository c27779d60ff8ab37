"""The embeddings pass: stock or shim by the model, exact reloads, chains in any order, exports, sizes."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from compress.checkpoint import Checkpoint
from compress.errors import BadInput
from compress.export import to as export_to
from compress.manifest import Manifest
from compress.methods import parse
from compress.pipeline import plan
from compress.recipe import Recipe
from compress.skeleton import Skeleton
from compress.stored_tables import Table as LoadedTable
from compress.weights import Table

FAMILIES = [
    ("llama", "embeddings", "shim"), ("llama", "embeddings:bits=3,group_size=16,mse=true", "shim"),
    ("llama-untied", "embeddings", "native-quantized"), ("llama-untied", "embeddings:head=false", "native-quantized"),
    ("llama-untied", "embeddings:bits=4", "shim"), ("gemma2", "embeddings", "shim"), ("gpt2", "embeddings:bits=5", "shim"),
    ("opt", "embeddings", "shim"), ("gpt_neox", "embeddings", "native-quantized"),
]  # fmt: skip


def tensor_bytes(artifact) -> int:
    return sum(tensor.nbytes for tensor in load_file(artifact / "model.safetensors").values())


@pytest.mark.parametrize(("family", "step", "tier"), FAMILIES)
def test_opens_exactly_in_the_right_tier(family, step, tier, make_checkpoint, run_stages, assert_reloads):
    source = make_checkpoint(family)
    artifact = run_stages(source, [step])
    assert_reloads(artifact, remote=tier == "shim")
    manifest, bits = Manifest.read(artifact), parse(step).bits
    assert manifest.tier == tier and all(record.bits == bits for record in manifest.tables.values())
    untouched = tensor_bytes(source) - sum(record.dense_nbytes for record in manifest.tables.values())
    assert tensor_bytes(artifact) == untouched + sum(record.nbytes for record in manifest.tables.values())
    predicted = plan(Recipe.parse({"model": str(source), "passes": [step], "evaluation": None}))
    assert predicted.tier == tier
    assert abs(predicted.predicted_bytes - (artifact / "model.safetensors").stat().st_size) < 0.02 * predicted.predicted_bytes
    Skeleton(Checkpoint(artifact)).check()


def test_a_shared_table_is_stored_once(llama, run_stages, reload, tokens):
    artifact = run_stages(llama, ["embeddings"])
    stored = load_file(artifact / "model.safetensors")
    assert stored["model.embed_tokens.packed"].shape == (256, 64) and "model.embed_tokens.weight" not in stored
    assert not any(name.startswith("lm_head") for name in stored)
    model = reload(artifact)
    generated = model.generate(tokens[:1, :8], max_new_tokens=4, do_sample=False)
    assert generated.shape == (1, 12)


@pytest.mark.parametrize("family", ["llama", "llama-untied"])
@pytest.mark.parametrize("then", ["gptq:group_size=16,symmetric=false", "svd_llm", "logit_kd:steps=2,batch_size=2,length=16"])
def test_later_stages_keep_the_table(then, family, make_checkpoint, run_stages, assert_reloads):
    artifact = run_stages(make_checkpoint(family), ["embeddings", then])
    assert_reloads(artifact, atol=1e-5 if "kd" in then else 0.0)
    records = Manifest.read(artifact).tables
    assert records and all(record.passes == ["embeddings"] for record in records.values())


@pytest.mark.parametrize("family", ["llama", "llama-untied"])
@pytest.mark.parametrize("first", ["rtn:symmetric=false,group_size=16", "svd_llm"])
def test_after_other_stages(first, family, make_checkpoint, run_stages, assert_reloads):
    artifact = run_stages(make_checkpoint(family), [first, "embeddings"])
    assert_reloads(artifact)


def test_bfloat16_tables_open_exactly_in_float32(make_checkpoint, run_stages, assert_reloads):
    for family in ("llama", "llama-untied"):
        artifact = run_stages(make_checkpoint(family, torch.bfloat16), ["embeddings", "rtn:group_size=16"], dtype="float32")
        assert_reloads(artifact)


@pytest.mark.parametrize("family", ["llama", "llama-untied"])
def test_dense_export(family, make_checkpoint, run_stages, reload, tokens, tmp_path):
    artifact = run_stages(make_checkpoint(family), ["embeddings"])
    dense = export_to("dense", artifact, tmp_path / "dense")
    with torch.no_grad():
        assert reload(dense)(input_ids=tokens).logits.equal(reload(artifact)(input_ids=tokens).logits)
    assert json.loads((dense / "config.json").read_text())["tie_word_embeddings"] == (family == "llama")


def test_training_everything_is_refused(llama, run_stages, make_pass):
    with pytest.raises(BadInput, match="embedding is compressed"):
        run_stages(llama, ["embeddings", make_pass("logit_kd", trains="everything")])


@given(bits=st.integers(2, 8), groups=st.sampled_from([1, 2, 4]), rows=st.integers(1, 9), seed=st.integers(0, 99))
def test_the_loader_computes_the_same_matrix(bits, groups, rows, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (rows, 16), generator=generator, dtype=torch.int8)
    table = Table(codes, torch.rand(rows, groups, generator=generator), bits)
    assert table.nbytes == sum(tensor.nbytes for tensor in table.tensors().values())
    module = LoadedTable(16, rows, False, **table.sizes(), children={})
    for name, tensor in table.tensors().items():
        assert getattr(module, name).shape == tensor.shape and getattr(module, name).dtype == tensor.dtype
        getattr(module, name).data = tensor
    ids = torch.randint(rows, (2, 3), generator=generator)
    assert module.matrix().equal(table.dense()) and module(ids).equal(table.dense()[ids])
    again = Table.assemble(table.shape, table.sizes(), table.tensors(), {})
    assert again.codes.equal(codes)


def test_a_plan_takes_the_head_that_a_rotation_unties_for_untied(llama, run_stages):
    """Passes over whole models are planned one after the other: the second sees what the first will have made."""
    chain = ["quarot", "gptq:bits=4", "embeddings:bits=8"]
    planned = plan(Recipe.parse({"model": str(llama), "passes": chain}))
    manifest = Manifest.read(run_stages(llama, chain))
    assert planned.tier == manifest.tier == "native-quantized"
    assert abs(planned.predicted_bytes - manifest.nbytes) < 0.01 * manifest.nbytes
