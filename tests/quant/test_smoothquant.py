"""SmoothQuant: the function stays, and the maxima are where alpha puts them."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress.block import Block
from compress.checkpoint import Checkpoint
from compress.manifest import Manifest
from compress.quant.rtn import RTN
from compress.quant.smoothquant import SmoothQuant, smoothing_scale
from compress.skeleton import Skeleton
from compress.stats import LinearStats
from compress.weights import Dense, LowRank, structure

FAMILIES = ["llama", "llama-untied", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "gpt2", "opt", "gpt_neox"]
positive = st.floats(2**-10, 2**10, width=32)


@pytest.fixture
def make_block(make_checkpoint, tokens):
    def make(family: str = "llama", change=lambda local, weight: weight) -> Block:
        skeleton = Skeleton(Checkpoint(make_checkpoint(family)))
        weights = {local: change(local, weight) for local, weight in skeleton.read_weights(0).items()}
        inputs = next(iter(skeleton.embed([tokens])))
        block = Block(skeleton, 0, weights, skeleton.read_others(0))
        block.inputs, block.selected = inputs, frozenset(weights)
        block.stats = {local: maxima(block, local) for local in weights}
        return block

    return make


def maxima(block: Block, local: str) -> LinearStats:
    assert block.inputs is not None
    stats = LinearStats(block.weights[local].shape[1], {"absmax"})
    stats.add(block.layer_inputs([local], block.inputs)[local])
    return stats


@given(st.lists(st.tuples(positive, positive), min_size=1, max_size=20), st.floats(0, 1))
def test_alpha_shares_the_range_out(pairs, alpha):
    activations, weights = torch.tensor(pairs).unbind(1)
    scale = smoothing_scale(activations, weights, alpha)
    product = activations * weights
    torch.testing.assert_close(activations / scale, product ** (1 - alpha), rtol=1e-3, atol=0)
    torch.testing.assert_close(weights * scale, product**alpha, rtol=1e-3, atol=0)


def test_inputs_that_were_never_active_stay():
    assert smoothing_scale(torch.tensor([0.0, 4.0]), torch.tensor([1e3, 0.0]), 0.5)[0] == 1
    assert bool(smoothing_scale(torch.zeros(3), torch.zeros(3), 0.5).eq(1).all())


@pytest.mark.parametrize("family", FAMILIES)
def test_alpha_one_makes_activations_one_and_alpha_zero_weights(family, make_block):
    for alpha in (0.0, 1.0):
        block = make_block(family)
        SmoothQuant(alpha=alpha).block(block)
        for edge in block.skeleton.arch.norms:
            found = maxima(block, edge.readers[0]).absmax
            if alpha == 0:
                found = torch.stack([block.weights[reader].dense().abs().amax(0) for reader in edge.readers]).amax(0)
            torch.testing.assert_close(found, torch.ones_like(found), rtol=1e-4, atol=0)
            for reader in edge.readers:
                torch.testing.assert_close(block.stats[reader].absmax, maxima(block, reader).absmax, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.05)], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_stay(family, dtype, tolerance, make_checkpoint, make_pass, run_stages, assert_reloads, reload, tokens):
    source = make_checkpoint(family, dtype)
    artifact = run_stages(source, [make_pass("smoothquant")], dtype="float32")
    model = assert_reloads(artifact, atol=1e-5)
    with torch.no_grad():
        expected, found = reload(source)(tokens).logits, model(tokens).logits
    assert (found - expected).abs().max() < tolerance * expected.abs().max()
    assert json.loads((artifact / "config.json").read_text())["model_type"] == family.partition("-")[0]
    skeletons = [Skeleton(Checkpoint(path)) for path in (source, artifact)]
    arch = skeletons[0].arch
    before, after = (skeleton.read_weights(1) for skeleton in skeletons)
    moved = {reader for edge in arch.norms for reader in edge.readers}
    assert {local for local in before if not before[local].dense().equal(after[local].dense())} == moved
    assert all(record.weight_error == 0 for record in Manifest.read(artifact).modules.values())


def test_masks_and_ranks_stay_and_outliers_are_smoothed_in_the_factor_that_reads_them(make_block):
    def change(local, weight):
        values = weight.dense()
        if local.endswith("v_proj"):
            left, singular, right = torch.linalg.svd(values, full_matrices=False)
            return LowRank(Dense((singular[:, None] * right)[:16]), Dense(left[:, :16].contiguous()))
        return Dense(values).masked(torch.rand(values.shape) < 0.5)

    block = make_block(change=change)
    before = {local: structure(weight) for local, weight in block.weights.items()}
    expected = block.run(block.inputs)
    SmoothQuant(alpha=0).block(block)
    torch.testing.assert_close(block.run(block.inputs), expected, rtol=1e-4, atol=1e-4)
    for local, weight in block.weights.items():
        after = structure(weight)
        assert after.rank == before[local].rank and (after.mask is None or after.mask.equal(before[local].mask))
    value = block.weights["self_attn.v_proj"]
    assert isinstance(value, LowRank)
    matrices = [block.weights["self_attn.q_proj"], block.weights["self_attn.k_proj"], value.down]
    largest = torch.stack([matrix.dense().abs().amax(0) for matrix in matrices]).amax(0)
    torch.testing.assert_close(largest, torch.ones(64), rtol=1e-4, atol=0)


@pytest.mark.parametrize("left_out", ["quantized", "not targeted"])
def test_groups_that_cannot_move_are_left_with_a_warning(left_out, make_block, caplog):
    block = make_block()
    if left_out == "quantized":
        grid = RTN(group_size=16).linear(block.weights["self_attn.q_proj"].dense(), LinearStats(64, ()), None)
        block.set("self_attn.q_proj", grid)
    else:
        block.selected = block.selected - {"self_attn.q_proj"}
    before, gains = dict(block.weights), dict(block.others)
    with caplog.at_level(logging.WARNING, "compress"):
        SmoothQuant().block(block)
    (record,) = caplog.records
    assert "model.layers.0.self_attn.v_proj" in record.message and "quantized or not targeted" in record.message
    assert block.others["input_layernorm.weight"].equal(gains["input_layernorm.weight"])
    assert all(block.weights[local] is before[local] for local in before if "mlp.gate" not in local and "mlp.up" not in local)
    assert not block.others["post_attention_layernorm.weight"].equal(gains["post_attention_layernorm.weight"])


def test_layers_that_nobody_targets_cause_no_warning(make_block, caplog):
    block = make_block()
    block.selected = frozenset({"mlp.gate_proj", "mlp.up_proj"})
    with caplog.at_level(logging.WARNING, "compress"):
        SmoothQuant().block(block)
    assert not caplog.records
