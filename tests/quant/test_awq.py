"""AWQ: its scales, its clipping, and what they buy; masks, factors and grids that earlier passes left."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from compress.block import Block
from compress.checkpoint import Checkpoint
from compress.quant.awq import AWQ, activation_scale
from compress.quant.clip import clip_groups, group_moments
from compress.quant.grids import dequantize, quantize
from compress.quant.rtn import RTN
from compress.skeleton import Skeleton
from compress.stats import LinearStats
from compress.weights import Affine, Dense, LowRank, Masked, Quantized, Sum, Weight, structure

NO_STATS = LinearStats(64, ())
SETTINGS = {"bits": 3, "group_size": 16}


@pytest.fixture
def make_block(make_checkpoint, tokens):
    """``make_block(family, weights=..., **config changes)`` -> block with statistics, some inputs being large."""

    def make(family: str = "llama", change=lambda local, weight: weight, **changes) -> Block:
        skeleton = Skeleton(Checkpoint(make_checkpoint(family, **changes)))
        others = skeleton.read_others(0)
        for edge in skeleton.arch.norms:
            others[f"{edge.source}.weight"][::9] += 20
        weights = {local: change(local, weight) for local, weight in skeleton.read_weights(0).items()}
        inputs = next(iter(skeleton.embed([tokens])))
        block = Block(skeleton, 0, weights, others)
        block.inputs, block.selected = inputs, frozenset(weights)
        for local in weights:
            stats = LinearStats(weights[local].shape[1], {"abssum"})
            stats.add(block.layer_inputs([local], inputs)[local])
            block.stats[local] = stats
        return block

    return make


def dense_weights(block: Block) -> dict[str, Tensor]:
    return {local: weight.dense() for local, weight in block.weights.items()}


def error_of(block: Block, step: AWQ) -> float:
    assert block.inputs is not None
    expected = block.run(block.inputs)
    step.block(block)
    return float((block.run(block.inputs) - expected).square().sum())


def clip_by_definition(weight: Tensor, x: Tensor, step: AWQ, group_size: int) -> Tensor:
    """One group of one row at a time, on its products with the inputs (tokens, in)."""
    result = weight.clone()
    for row in range(len(weight)):
        for start in range(0, weight.shape[1], group_size):
            group, inputs = weight[row : row + 1, start : start + group_size], x[:, start : start + group_size]
            least = float("inf")
            for i in range(10):
                clipped = group.clamp(-(1 - i / 20) * group.abs().max(), (1 - i / 20) * group.abs().max())
                grid = step.fit(clipped, torch.float32)
                error = float(((dequantize(quantize(clipped, grid), grid) - group) @ inputs.T).square().sum())
                if error < least * (1 - 1e-5):
                    least, result[row, start : start + group_size] = error, clipped[0]
    return result


# scales


@given(
    mean=st.lists(st.floats(0, 1e3, width=32), min_size=1, max_size=20).map(torch.tensor),
    alpha=st.sampled_from([i / 20 for i in range(20)]),
)
def test_scales_are_positive_and_centred_on_one(mean, alpha):
    scale = activation_scale(mean, alpha)
    active = scale[mean > 0]
    assert bool((scale > 0).all() and scale.isfinite().all() and (scale[mean == 0] == 1).all())
    if len(active):
        assert float(active.max() * active.min()) == pytest.approx(1, rel=1e-4)
        order = mean[mean > 0].argsort()
        assert bool((active[order].diff() >= -1e-5 * active.max()).all())
    if alpha == 0:
        assert torch.equal(scale, torch.ones_like(mean))


def test_with_no_scaling_it_is_rounding_to_nearest(make_block, monkeypatch):
    monkeypatch.setattr("compress.quant.awq._N_ALPHAS", 1)  # alpha = 0 alone
    block = make_block()
    before = dict(block.weights)
    AWQ(clip=False, **SETTINGS).block(block)
    for local, weight in block.weights.items():
        assert isinstance(weight, Quantized)
        assert weight.dense().equal(RTN(**SETTINGS).linear(before[local].dense(), NO_STATS, None).dense())


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "gemma2"])
def test_only_scales_and_codes_change(family, make_block):
    """Without rounding, the block with its norms as AWQ left them computes what it did."""
    block = make_block(family)
    expected = block.run(block.inputs)
    gains = dict(block.others)
    AWQ(clip=False, **SETTINGS).block(block)
    assert any(not gains[name].equal(block.others[name]) for name in gains)
    for local, weight in block.before.items():  # which follow every scale
        block.set(local, weight)
    torch.testing.assert_close(block.run(block.inputs), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_the_scale_is_the_best_of_those_tried(make_block):
    block = make_block()
    edge, rows = block.edges("norms")[1], (block.inputs[:1], block.inputs[1:])
    step = AWQ(**SETTINGS)
    found = step._best_scale(block, edge, "mlp", rows)
    stats = block.stats[edge.readers[0]]
    scales = [activation_scale(stats.abssum / stats.n, i / 20) for i in range(20)]
    exact = block.isolate("mlp", block.inputs)({})

    def loss(scale: Tensor) -> float:
        rounded = {reader: step.rounded_in(scale, block.weights[reader]) for reader in edge.readers}
        return float((block.isolate("mlp", block.inputs)(rounded) - exact).square().mean())

    losses = [loss(scale) for scale in scales]
    assert loss(found) == pytest.approx(min(losses), rel=1e-5) and min(losses) < 0.9 * losses[0]


def test_large_activations_are_rounded_better_than_by_rtn(make_block):
    plain = make_block()
    expected = plain.run(plain.inputs)
    for local, weight in plain.weights.items():
        plain.set(local, RTN(**SETTINGS).linear(weight.dense(), NO_STATS, None))
    nearest = float((plain.run(plain.inputs) - expected).square().sum())
    scaled = error_of(make_block(), AWQ(clip=False, **SETTINGS))
    assert scaled < 0.8 * nearest
    assert error_of(make_block(), AWQ(**SETTINGS)) < 0.8 * nearest


def test_it_is_deterministic_and_looks_at_no_more_tokens_than_it_is_told(make_block):
    results = []
    for damaged in (False, True):
        block = make_block()
        if damaged:
            block.inputs = torch.cat([block.inputs[:1], torch.full_like(block.inputs[1:], torch.nan)])
        AWQ(search_tokens=40, **SETTINGS).block(block)  # one sequence
        results.append(block)
    for local, weight in results[0].weights.items():
        assert weight.dense().equal(results[1].weights[local].dense())


# clipping


@pytest.mark.parametrize("symmetric", [True, False])
def test_clipping_is_by_the_error_of_partial_products(symmetric):
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(5, 32, generator=generator), torch.randn(50, 32, generator=generator)
    weight[:, 3] *= 6
    step = AWQ(bits=3, group_size=8, symmetric=symmetric)
    moments = group_moments(x.view(2, 25, 32), 4)
    assert moments.shape == (4, 8, 8)
    found = clip_groups(weight, moments, lambda part: step.fit(part, torch.float32))
    torch.testing.assert_close(found, clip_by_definition(weight, x, step, 8))
    assert not found.equal(weight)


def test_clipping_in_parts_is_clipping(monkeypatch):
    weight, x = torch.randn(7, 32), torch.randn(50, 32)
    step, moments = AWQ(**SETTINGS), group_moments(x, 2)
    whole = clip_groups(weight, moments, lambda part: step.fit(part, torch.float32))
    monkeypatch.setattr("compress.quant.clip._SEARCH_ELEMENTS", 64)
    assert clip_groups(weight, moments, lambda part: step.fit(part, torch.float32)).equal(whole)


def test_inputs_that_were_never_active_are_not_clipped():
    weight = torch.randn(3, 16)
    assert clip_groups(weight, torch.zeros(1, 16, 16), lambda part: AWQ().fit(part, torch.float32)).equal(weight)


@pytest.mark.parametrize("family, kept", [("llama", {"q", "k"}), ("gpt2", {"c_attn"}), ("gpt_neox", {"query_key_value"})])
def test_queries_and_keys_are_not_clipped(family, kept, make_block):
    block = make_block(family)
    before = dense_weights(block)
    step = AWQ(bits=2, group_size=16)
    step._clip(block, (block.inputs,))
    untouched = {local for local, weight in block.weights.items() if weight.dense().equal(before[local])}
    assert {local.rpartition(".")[2].removesuffix("_proj") for local in untouched} == kept


# what earlier passes left


def dress(local: str, weight: Weight) -> Weight:
    """Every kind of weight in one block."""
    values = weight.dense()
    left, singular, right = torch.linalg.svd(values, full_matrices=False)
    factors = LowRank(Dense((singular[:, None] * right)[:32]), Dense(left[:, :32].contiguous()))
    kept = torch.rand(values.shape, generator=torch.Generator().manual_seed(1)) < 0.6
    if local.endswith(("q_proj", "up_proj")):
        return factors
    if local.endswith(("k_proj", "gate_proj")):
        return Dense(values).masked(kept)
    if local.endswith("v_proj"):
        return Sum((Dense(values).masked(kept), factors))
    if local.endswith("down_proj"):
        return LowRank(factors.down.masked(torch.rand(factors.down.shape) < 0.6), factors.up)
    grid = RTN(bits=4, group_size=16).linear(values, NO_STATS, None)
    assert isinstance(grid, Quantized)
    return Affine(grid.codes, grid.scale, torch.zeros_like(grid.scale), 4)


@pytest.mark.parametrize("symmetric", [True, False])
def test_masks_and_factors_are_kept(symmetric, make_block):
    block = make_block(change=dress)
    before = {local: structure(weight) for local, weight in block.weights.items()}
    assert [edge.source for edge in [*block.edges("norms"), *block.edges("products")]] == [
        "input_layernorm", "post_attention_layernorm", "mlp.up_proj",
    ]  # fmt: skip
    AWQ(symmetric=symmetric, **SETTINGS).block(block)
    for local, weight in block.weights.items():
        after = structure(weight)
        assert (after.rank, after.parts.keys()) == (before[local].rank, before[local].parts.keys())
        assert before[local].mask is None or after.mask.equal(before[local].mask)
    for name, weight in block.matrices().items():
        inner = weight.inner if isinstance(weight, Masked) else weight
        assert isinstance(inner, Quantized) and (inner.bits, inner.zero_point is None) == (3, symmetric), name
        assert weight.mask is None or not weight.dense()[~weight.mask].any()
    assert isinstance(block.weights["self_attn.o_proj"], Quantized)


def test_a_layer_on_a_grid_keeps_its_siblings_in_place(make_block):
    block = make_block(change=lambda local, w: RTN(group_size=16).linear(w.dense(), NO_STATS, None) if "k_proj" in local else w)
    gain = block.others["input_layernorm.weight"]
    AWQ(**SETTINGS).block(block)
    assert block.others["input_layernorm.weight"].equal(gain)
    assert {weight.bits for weight in block.weights.values()} == {3}


def test_layers_that_are_not_targeted_stay_as_they_are(make_block):
    block = make_block()
    before = dense_weights(block)
    block.selected = frozenset({"mlp.down_proj", "self_attn.q_proj"})
    gains = dict(block.others)
    AWQ(**SETTINGS).block(block)
    assert {local for local in before if not before[local].equal(block.weights[local].dense())} == block.selected
    assert all(gains[name].equal(block.others[name]) for name in gains)


@pytest.mark.parametrize("family", ["llama", "llama-untied", "qwen3", "gemma2", "phi3", "gpt2", "opt", "gpt_neox"])
def test_artifacts_open_on_every_architecture(family, make_checkpoint, make_pass, run_stages, assert_reloads):
    artifact = run_stages(make_checkpoint(family), [make_pass("awq", group_size=16)])
    assert_reloads(artifact, atol=1e-5)
