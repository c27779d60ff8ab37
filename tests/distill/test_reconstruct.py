"""Reconstruct: a block comes closer to its targets in every form that its layers can have, and never further from them."""

from __future__ import annotations

import pytest
import torch

from compress import methods
from compress.descent import output_error
from compress.distill.reconstruct import Reconstruct
from compress.passes import BlockPass
from compress.quant.rtn import RTN
from compress.weights import Dense, LowRank, Masked, Quantized, Sum
from compress.weights.composed import unmasked

STEP = Reconstruct(iterations=20, batch_size=4, learning_rate=3e-3)


def masked(weight):
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.6
    return Masked(Dense(weight * mask), mask)


def rounded(weight):
    return RTN(bits=2, group_size=16, symmetric=False).linear(weight, None, None)


def low_rank(weight, form=Dense):
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    return LowRank(form((s.sqrt()[:16, None] * v[:16]).contiguous()), form((u[:, :16] * s.sqrt()[:16]).contiguous()))


def corrected(weight):
    first = rounded(weight)
    u, s, v = torch.linalg.svd(weight - first.dense(), full_matrices=False)
    return Sum((first, LowRank(Dense(s[:4, None] * v[:4]), Dense(u[:, :4].contiguous()))))


FORMS = {
    "dense": lambda weight: Dense(weight + 0.1 * weight.std() * torch.randn_like(weight)),
    "masked": masked, "quantized": rounded, "low_rank": low_rank, "sum": corrected,
    "masked_grid": lambda weight: rounded(weight).masked(masked(weight).mask),
    "quantized_factors": lambda weight: low_rank(weight, rounded),
}  # fmt: skip


def error_of(block) -> float:
    with torch.no_grad():
        return float(output_error(block, {}, block.inputs, block.targets))


@pytest.fixture
def compressed(make_block):
    """``compressed(form, family)``: a block all of whose layers have that form, still to give what the dense one gave."""

    def make(form: str, family: str = "llama"):
        block = make_block(family)
        for local, weight in list(block.weights.items()):
            block.set(local, FORMS[form](weight.dense()))
        return block

    return make


def structure_of(weight):
    """What must not move: masks, grids but for their codes and scales, and ranks."""
    if isinstance(weight, Masked):
        return weight.kept.tolist(), structure_of(weight.inner)
    if isinstance(weight, Quantized):
        return type(weight), weight.bits, weight.zero_point.tolist(), weight.scale.shape
    if isinstance(weight, LowRank):
        return weight.rank, structure_of(weight.down), structure_of(weight.up)
    return [structure_of(part) for part in weight.parts] if isinstance(weight, Sum) else type(weight)


@pytest.mark.parametrize("form", FORMS)
def test_the_outputs_come_closer_and_the_form_stays(form, compressed):
    torch.manual_seed(0)
    block = compressed(form)
    before, kept = error_of(block), {local: structure_of(weight) for local, weight in block.weights.items()}
    dtypes = {local: weight.dtype for local, weight in block.weights.items()}
    STEP.block(block)
    assert error_of(block) < 0.95 * before
    assert {local: structure_of(weight) for local, weight in block.weights.items()} == kept
    assert {local: weight.dtype for local, weight in block.weights.items()} == dtypes


@pytest.mark.parametrize("form", ["quantized", "masked_grid"])
def test_codes_move_within_their_range_or_stay(form, compressed):
    for codes in (True, False):
        block = compressed(form)
        worst = error_of(block)
        before = {local: unmasked(weight).codes for local, weight in block.weights.items()}
        STEP.model_copy(update={"codes": codes, "learning_rate": 2e-2}).block(block)
        after = {local: unmasked(weight).codes for local, weight in block.weights.items()}
        assert all(value.dtype == torch.int8 and value.min() >= -2 and value.max() <= 1 for value in after.values())
        assert all(value.equal(before[local]) for local, value in after.items()) != codes
        assert error_of(block) < worst


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "llama-untied"])
def test_norms_and_biases_move_unless_only_weights_are_trained(family, compressed):
    for trains in ("blocks", "weights"):
        block = compressed("masked", family)
        before, others = error_of(block), {name: value.clone() for name, value in block.others.items()}
        STEP.model_copy(update={"trains": trains}).block(block)
        assert error_of(block) < before
        moved = {name for name, value in block.others.items() if not value.equal(others[name])}
        assert moved == (others.keys() if trains == "blocks" else set())
        for name, value in block.others.items():  # what it computes with is what will be stored
            assert block.module.state_dict()[name].equal(value)


@pytest.mark.parametrize("form", ["masked", "quantized"])
def test_no_rate_makes_it_worse(form, compressed):
    """What is judged by is held out; with so wild a rate nothing but the start is left, of grids the quantizer's codes too."""
    block, wild = compressed(form), STEP.model_copy(update={"learning_rate": 1e3})
    before = {local: weight.dense() for local, weight in block.weights.items()}
    wild.block(block)
    assert all(weight.dense().equal(before[local]) for local, weight in block.weights.items())


@pytest.mark.parametrize("step", [STEP, STEP.model_copy(update={"iterations": 0})])
def test_nothing_to_repair_or_no_steps_leave_every_bit(step, make_block, compressed):
    block = make_block() if step.iterations else compressed("masked")
    before = {local: weight.dense() for local, weight in block.weights.items()} | dict(block.others)
    step.block(block)
    after = {local: weight.dense() for local, weight in block.weights.items()} | block.others
    assert all(value.equal(before[name]) for name, value in after.items())


def test_layers_that_are_not_selected_stay(compressed):
    block = compressed("masked")
    kept = block.weights["mlp.down_proj"]
    block.selected -= {"mlp.down_proj"}
    STEP.block(block)
    assert block.weights["mlp.down_proj"] is kept


def test_a_run_can_be_repeated(compressed):
    first, second = compressed("masked"), compressed("masked")
    for block in (first, second):
        STEP.block(block)
    assert all(weight.dense().equal(second.weights[name].dense()) for name, weight in first.weights.items())


def test_it_is_a_pass_of_the_stream_with_settings_for_every_effort():
    assert issubclass(Reconstruct, BlockPass) and Reconstruct().learning_tokens(128, 512) == 200 * 4 * 512
    for effort in Reconstruct.efforts.values():
        assert methods.build("reconstruct", effort)


def test_bfloat16_throughout(make_block):
    """Activations and blocks in bfloat16, as on a GPU; what is trained is in float32."""
    block = make_block("llama-untied", dtype=torch.bfloat16)
    assert block.inputs.dtype == torch.bfloat16
    for local, weight in list(block.weights.items()):
        block.set(local, masked(weight.dense()))
    before = error_of(block)
    STEP.block(block)
    assert error_of(block) < before
    assert all(value.dtype == torch.bfloat16 for value in block.others.values())
