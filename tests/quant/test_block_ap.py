"""Block-AP: rounding to nearest when nothing is learned, all of a grid moves otherwise, and less error of the block."""

from __future__ import annotations

import pytest
import torch

from compress import methods
from compress.descent import output_error
from compress.quant.block_ap import BlockAP
from compress.quant.rtn import RTN
from compress.weights import Dense, LowRank, Masked, Quantized, Sum

KINDS = [
    {"symmetric": False}, {"symmetric": True}, {"symmetric": True, "full_range": True}, {"activations": "int8", "symmetric": True}
]  # fmt: skip


def tuned(block, step):
    step.block(block)
    return block


def error_of(block) -> float:
    with torch.no_grad():
        return float(output_error(block, {}, block.inputs, block.targets))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS[:3], ids=str)
def test_no_steps_round_the_block_to_nearest(kind, dtype, make_block):
    block = make_block(dtype=dtype)
    original = dict(block.weights)
    tuned(block, BlockAP(bits=2, group_size=16, iterations=0, **kind))
    for name, weight in block.weights.items():
        nearest = RTN(bits=2, group_size=16, **kind).linear(original[name].dense(), None, None)
        assert type(weight) is Quantized and weight.codes.equal(nearest.codes) and weight.scale.equal(nearest.scale)
        assert kind["symmetric"] or weight.zero_point.equal(nearest.zero_point)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_blocks_outputs_come_closer(kind, make_block):
    step = BlockAP(bits=3, group_size=16, iterations=40, **kind)
    errors = [error_of(tuned(make_block(), step.model_copy(update={"iterations": n}))) for n in (0, 40)]
    assert errors[1] < 0.7 * errors[0]


def test_codes_scales_and_zero_points_all_move(make_block):
    step = BlockAP(bits=3, group_size=16, iterations=40, grid_rate=5e-2)
    before, after = (tuned(make_block(), step.model_copy(update={"iterations": n})).weights for n in (0, 40))
    for name, weight in after.items():
        assert weight.codes.min() >= -4 and weight.codes.max() <= 3
        assert not weight.scale.equal(before[name].scale) and not weight.codes.equal(before[name].codes)
    assert any(not weight.zero_point.equal(before[name].zero_point) for name, weight in after.items())


def test_no_rate_makes_it_worse(make_block):
    wild = BlockAP(bits=4, group_size=16, iterations=5, learning_rate=50.0, grid_rate=50.0)
    nearest = wild.model_copy(update={"iterations": 0})
    first, last = tuned(make_block(), nearest), tuned(make_block(), wild)
    assert all(weight.dense().equal(last.weights[name].dense()) for name, weight in first.weights.items())


def test_a_run_can_be_repeated(make_block):
    step = BlockAP(bits=3, group_size=16, iterations=4)
    first, second = (tuned(make_block(), step) for _ in range(2))
    assert all(weight.dense().equal(second.weights[name].dense()) for name, weight in first.weights.items())


def test_masks_factors_sums_and_unselected_layers(make_block):
    block, mask = make_block(), torch.rand(64, 64) < 0.5
    before = block.weights["self_attn.q_proj"].dense()
    block.set("self_attn.q_proj", Masked(Dense(before * mask), mask))
    block.set("self_attn.k_proj", LowRank(Dense(torch.randn(16, 64) / 8), Dense(torch.randn(32, 16) / 4)))
    coarse = RTN(bits=2, group_size=16).linear(block.weights["mlp.up_proj"].dense(), None, None)
    block.set("mlp.up_proj", Sum((coarse, LowRank(Dense(torch.randn(4, 64) / 8), Dense(torch.randn(112, 4) / 8)))))
    kept = block.weights["mlp.down_proj"]
    block.selected -= {"mlp.down_proj"}
    tuned(block, BlockAP(bits=4, group_size=16, iterations=6, grid_rate=5e-2))
    pruned, factors, parts = (block.weights[name] for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj"))
    assert isinstance(pruned, Masked) and pruned.mask.equal(mask) and not pruned.dense()[~mask].any()
    assert isinstance(factors, LowRank) and isinstance(factors.down, Quantized) and isinstance(factors.up, Quantized)
    assert isinstance(parts, Sum) and parts.parts[0].bits == 4 and isinstance(parts.parts[1].up, Quantized)
    assert block.weights["mlp.down_proj"] is kept


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_other_architectures(family, make_block):
    step = BlockAP(bits=3, group_size=16, iterations=12)
    nearest = step.model_copy(update={"iterations": 0})
    assert error_of(tuned(make_block(family), step)) < error_of(tuned(make_block(family), nearest))


def test_rounded_inputs_are_stored(llama, make_pass, run_stages, assert_reloads):
    step = make_pass("block_ap", group_size=16, symmetric=True, activations="int8", iterations=3)
    assert_reloads(run_stages(llama, [step]), atol=1e-5)


def test_efforts_are_settings():
    for effort in BlockAP.efforts.values():
        assert methods.build("block_ap", effort)
