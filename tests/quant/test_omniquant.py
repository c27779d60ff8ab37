"""OmniQuant: without clipping it is rounding to nearest, moved factors leave the block's function, learning lessens its error."""

from __future__ import annotations

import pytest
import torch

from compress import methods
from compress.descent import output_error
from compress.quant.omniquant import Clipping, OmniQuant, factor_of, first_factor
from compress.weights import Dense, LowRank, Masked, Quantized

SETTINGS = {"bits": 3, "group_size": 16, "epochs": 4, "batch_size": 2}


def tuned(block, **settings):
    OmniQuant(**{**SETTINGS, **settings}).block(block)
    return block


def error_of(block) -> float:
    with torch.no_grad():
        return float(output_error(block, {}, block.inputs, block.targets))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unclipped_is_rounding_to_nearest(symmetric, dtype):
    torch.manual_seed(0)
    weight, step = Dense(torch.randn(6, 32).to(dtype)), OmniQuant(bits=3, group_size=16, symmetric=symmetric)
    clipping = Clipping(step, weight)
    with torch.no_grad():
        for logit in clipping.logits:
            logit.fill_(60)
    result, nearest = clipping.rounded(weight).weight(step, dtype, None), step.nearest(weight.dense(), None)
    assert isinstance(result, Quantized) and isinstance(nearest, Quantized)
    assert result.codes.equal(nearest.codes) and result.scale.equal(nearest.scale)
    assert symmetric or result.zero_point.equal(nearest.zero_point)


def test_clipping_starts_at_98_percent_of_the_range():
    weight, step = Dense(torch.randn(6, 32)), OmniQuant(group_size=16)
    clipping = Clipping(step, weight)
    share = clipping.rounded(weight).scale / step.fit(weight.dense(), torch.float32).scale
    torch.testing.assert_close(share, torch.full_like(share, torch.tensor(4.0).sigmoid().item()))


@pytest.mark.parametrize("family", ["llama", "llama-untied", "gemma2", "opt", "gpt2", "phi3"])
def test_moved_factors_leave_the_function(family, make_block):
    block = make_block(family)
    edges = [*block.edges("norms"), *block.edges("products")]
    assert edges
    scales = {edge: torch.rand(block.weights[edge.readers[0]].shape[1]) * 3 + 0.2 for edge in edges}
    moved, others = block.folded(scales)
    dense = {name: weight.dense() for name, weight in block.matrices(moved).items()}
    with torch.no_grad():
        outputs = block.run(block.inputs, dense | others)
        torch.testing.assert_close(outputs, block.targets, rtol=1e-3, atol=1e-3)
        for edge, scale in scales.items():
            block.fold(edge, scale)
        torch.testing.assert_close(block.run(block.inputs), block.targets, rtol=1e-3, atol=1e-3)
    for name, weight in block.matrices().items():  # what is learned with is what folding then makes
        torch.testing.assert_close(weight.dense(), dense[name])


def test_gradients_reach_factors_through_norms_matrices_and_grids(make_block):
    block = make_block("llama-untied", num_key_value_heads=4)
    logarithms = {
        edge: first_factor(block, edge).log().requires_grad_() for edge in block.edges("norms") + block.edges("products")
    }
    assert len(logarithms) == 4
    moved, others = block.folded({edge: factor_of(logarithm) for edge, logarithm in logarithms.items()})
    step = OmniQuant(bits=3, group_size=16, symmetric=False)
    clippings = {name: Clipping(step, weight) for name, weight in block.matrices().items()}
    replaced = others | {
        name: clippings[name].rounded(weight).values(weight.mask) for name, weight in block.matrices(moved).items()
    }
    output_error(block, replaced, block.inputs, block.targets).backward()
    for gradient in [logarithm.grad for logarithm in logarithms.values()] + [c.logits[0].grad for c in clippings.values()]:
        assert gradient is not None and bool(gradient.isfinite().all()) and bool(gradient.any())


def test_first_factors_are_smoothquants(make_block):
    block = make_block()
    (edge, *_) = block.edges("norms")
    factor = first_factor(block, edge)
    largest = block.stats[edge.readers[0]].absmax
    weights = torch.stack([block.weights[local].dense().abs().amax(0) for local in edge.readers]).amax(0)
    torch.testing.assert_close(factor, (largest / weights).sqrt())
    torch.testing.assert_close(largest / factor, weights * factor)  # inputs and weights share the difficulty


@pytest.mark.parametrize("transform", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_learning_brings_the_outputs_closer(transform, symmetric, make_block):
    settings = {"transform": transform, "symmetric": symmetric, "learning_rate": 5e-2}
    start, end = (error_of(tuned(make_block(), epochs=epochs, **settings)) for epochs in (0, 6))
    assert end < 0.95 * start


def test_what_was_learned_is_what_is_stored(make_block):
    """The error at the kept parameters, with factors moved and folded, is that of the finished block."""
    block = make_block()
    folded = {edge: first_factor(block, edge) for edge in block.edges("norms") + block.edges("products")}
    step = OmniQuant(bits=3, group_size=16, transform=True, epochs=0)
    moved, others = block.folded(folded)
    clippings = {name: Clipping(step, weight) for name, weight in block.matrices().items()}
    replaced = others | {
        name: clippings[name].rounded(weight).values(weight.mask) for name, weight in block.matrices(moved).items()
    }
    with torch.no_grad():
        expected = float(output_error(block, replaced, block.inputs, block.targets))
    step.block(block)
    assert error_of(block) == pytest.approx(expected, rel=0.02)


def test_masks_factors_and_earlier_grids(make_block):
    block, mask = make_block("llama-untied"), torch.rand(64, 64) < 0.5
    block.set("self_attn.q_proj", Masked(Dense(block.weights["self_attn.q_proj"].dense() * mask), mask))
    block.set("self_attn.v_proj", LowRank(Dense(torch.randn(16, 64) / 8), Dense(torch.randn(32, 16) / 4)))
    grid = OmniQuant(bits=2, group_size=16).nearest(block.weights["mlp.gate_proj"].dense(), None)
    block.set("mlp.gate_proj", grid)
    assert len(block.edges("norms")) == 1  # none into a grid
    tuned(block, transform=True)
    pruned, factors = block.weights["self_attn.q_proj"], block.weights["self_attn.v_proj"]
    assert isinstance(pruned, Masked) and pruned.mask.equal(mask) and not pruned.dense()[~mask].any()
    assert isinstance(factors, LowRank) and isinstance(factors.down, Quantized) and isinstance(factors.up, Quantized)
    assert isinstance(block.weights["mlp.gate_proj"], Quantized) and block.weights["mlp.gate_proj"].bits == 3


def test_a_low_rank_source_with_a_bias(make_block):
    block = make_block("llama-untied", num_key_value_heads=4)
    block.set("self_attn.v_proj", LowRank(Dense(torch.randn(16, 64) / 8), Dense(torch.randn(64, 16) / 4)))
    (edge,) = (edge for edge in block.edges("products") if edge.source == "self_attn.v_proj")
    with torch.no_grad():
        before = block.run(block.inputs)
        moved, others = block.folded({edge: torch.rand(64) + 0.5})
        dense = {name: weight.dense() for name, weight in block.matrices(moved).items()}
        torch.testing.assert_close(block.run(block.inputs, dense | others), before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("transform", [True, False])
def test_rounded_inputs_are_learned_with_and_stored(transform, llama, make_pass, run_stages, assert_reloads):
    step = make_pass("omniquant", bits=4, group_size=16, activations="int8", epochs=1, transform=transform)
    assert_reloads(run_stages(llama, [step]))


def test_learning_makes_up_for_rounded_inputs(make_block):
    settings = {"activations": "int4", "bits": 4}
    assert OmniQuant(**settings).transforms and not OmniQuant().transforms
    start, end = (error_of(tuned(make_block(), epochs=epochs, **settings)) for epochs in (0, 8))
    assert end < 0.95 * start


def test_settings_that_contradict_each_other():
    with pytest.raises(ValueError, match="mse"):
        OmniQuant(mse=True, transform=True)
    for effort in OmniQuant.efforts.values():
        assert methods.build("omniquant", effort)
