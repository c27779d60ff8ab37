"""A decoder block in the hands of a pass: scales move along every edge without a change of its function, replaced matrices
compute what installed ones do, and gradients reach them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from compress.arch import ARCHITECTURES, Edge, architecture
from compress.block import Block, rescaled
from compress.checkpoint import Checkpoint
from compress.quant.rtn import RTN
from compress.skeleton import Skeleton
from compress.stats import OF_INPUTS, LinearStats
from compress.weights import Dense, LowRank, Masked, Outliers, Quantized, Sum, Weight

FAMILIES = [
    "llama", "llama-untied", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "gpt2", "opt", "gpt_neox",
]  # fmt: skip
SOURCES = {
    "gemma2": {"input_layernorm", "pre_feedforward_layernorm", "mlp.up_proj"},
    "phi3": {"input_layernorm", "post_attention_layernorm"},
    "gpt2": {"ln_1", "ln_2"},
    "opt": {"self_attn_layer_norm", "final_layer_norm", "self_attn.v_proj", "fc1"},
    "gpt_neox": {"input_layernorm", "post_attention_layernorm"},
}  # by family, where they are not Llama's with grouped queries
GROUPED = {"input_layernorm", "post_attention_layernorm", "mlp.up_proj"}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def low_rank(weight: Weight) -> LowRank:
    left, values, right = torch.linalg.svd(weight.dense(), full_matrices=False)
    return LowRank(Dense(values[:24, None] * right[:24]), Dense(left[:, :24].contiguous()))


def pruned(weight: Weight) -> Masked:
    return Dense(weight.dense()).masked(draw(*weight.shape) > -0.3)


FORMS: dict[str, Callable[[Weight], Weight]] = {
    "dense": lambda weight: weight,
    "masked": pruned,
    "low-rank": low_rank,
    "sum": lambda weight: Sum((pruned(weight), low_rank(weight))),
}


@pytest.fixture(scope="module")
def make_block(make_checkpoint, tokens):
    """``make_block(family, dtype, form, **config changes)`` -> (block with all layers selected, inputs)."""

    def make(family: str = "llama", dtype: torch.dtype = torch.float64, form: str = "dense", **changes) -> tuple[Block, Tensor]:
        skeleton = Skeleton(Checkpoint(make_checkpoint(family, **changes)), dtype=dtype)
        weights = {local: FORMS[form](weight) for local, weight in skeleton.read_weights(0).items()}
        rows = next(iter(skeleton.embed([tokens])))
        block = Block(skeleton, 0, weights, skeleton.read_others(0))
        block.selected = frozenset(weights)
        return block, rows

    return make


def all_edges(block: Block) -> list[Edge]:
    return [*block.edges("norms"), *block.edges("products")]


def scale_for(block: Block, edge: Edge, powers_of_two: bool) -> Tensor:
    exponent = 1.5 * draw(block.weights[edge.readers[0]].shape[1], seed=3)
    return 2.0 ** (exponent.round() if powers_of_two else exponent)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_scales_move_along_every_edge_without_changing_the_function(family, form, make_block):
    block, rows = make_block(family, form=form)
    assert {edge.source for edge in all_edges(block)} == SOURCES.get(family, GROUPED)
    for edge in all_edges(block):
        expected, before = block.run(rows), dict(block.weights)
        scale = scale_for(block, edge, powers_of_two=family != "gemma2")
        block.fold(edge, scale)
        torch.testing.assert_close(block.run(rows), expected, rtol=0, atol=2e-5 if family == "gemma2" else 1e-11)
        for reader in edge.readers:
            moved = before[reader].dense() * scale
            torch.testing.assert_close(block.weights[reader].dense(), moved, rtol=1e-5, atol=1e-5)
            assert type(block.weights[reader]) is type(before[reader])
            torch.testing.assert_close(block.before[reader].dense(), block.weights[reader].dense())
            mask = before[reader].mask
            assert mask is None or mask.equal(block.weights[reader].mask)


@pytest.mark.parametrize("dtype, stored, tolerance", [
    (torch.float64, torch.float32, 1e-5), (torch.float32, torch.float32, 1e-4), (torch.float32, torch.bfloat16, 0.05),
])  # fmt: skip
@pytest.mark.parametrize("family", ["llama-untied", "gemma2", "gpt2", "opt"])
def test_any_positive_scale_moves(family, dtype, stored, tolerance, make_checkpoint, tokens):
    skeleton = Skeleton(Checkpoint(make_checkpoint(family, stored)), dtype=dtype)
    rows = next(iter(skeleton.embed([tokens])))
    block = Block(skeleton, 0, skeleton.read_weights(0), skeleton.read_others(0))
    block.selected = frozenset(block.weights)
    expected = block.run(rows)
    for edge in all_edges(block):
        block.fold(edge, scale_for(block, edge, powers_of_two=False))
    assert (block.run(rows) - expected).abs().max() < tolerance * expected.abs().max()
    assert {tensor.dtype for tensor in block.others.values()} == {weight.dtype for weight in block.weights.values()} == {stored}


def test_values_are_moved_to_and_from_biases(make_block):
    """v and o of equal shapes, with biases on both."""
    block, rows = make_block("llama-untied", num_key_value_heads=4)
    edge = next(edge for edge in block.edges("products") if edge.source == "self_attn.v_proj")
    expected, bias = block.run(rows), block.others["self_attn.v_proj.bias"]
    block.fold(edge, torch.full((64,), 4.0))
    assert block.others["self_attn.v_proj.bias"].equal(bias / 4)
    torch.testing.assert_close(block.run(rows), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_follow_a_fold(family, make_block):
    block, rows = make_block(family, torch.float32)
    for edge in all_edges(block):
        own = {local: gather(block, local, rows) for local in block.weights}
        block.stats = dict(own)
        block.fold(edge, scale_for(block, edge, powers_of_two=False))
        for local, stats in block.stats.items():
            assert (stats is own[local]) == (local not in edge.readers)
            for name in OF_INPUTS:
                expected = getattr(gather(block, local, rows), name)
                torch.testing.assert_close(getattr(stats, name), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def gather(block: Block, local: str, rows: Tensor) -> LinearStats:
    stats = LinearStats(block.weights[local].shape[1], OF_INPUTS)
    stats.add(block.layer_inputs([local], rows)[local])
    return stats.finish()


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_only_positive_finite_scales_move(value, make_block):
    block, _ = make_block()
    edge = block.edges("norms")[0]
    with pytest.raises(ValueError, match="positive and finite"):
        block.fold(edge, torch.full((64,), value))


def test_edges_need_floating_point_layers_that_are_all_selected(make_block):
    block, _ = make_block()
    block.selected = frozenset(block.weights) - {"self_attn.q_proj", "mlp.up_proj"}
    assert not all_edges(block)
    block.selected = frozenset(block.weights)
    grid = RTN(group_size=16).linear(block.weights["mlp.gate_proj"].dense(), LinearStats(64, ()), None)
    block.set("mlp.gate_proj", grid)
    assert {edge.source for edge in all_edges(block)} == {"input_layernorm", "mlp.up_proj"}
    with pytest.raises(TypeError, match="Quantized"):
        rescaled(grid, columns=torch.ones(64))
    down = block.weights["mlp.down_proj"]
    block.set("mlp.down_proj", Sum((down, Outliers.of(down.dense(), down.dense() > 0.5))))
    assert {edge.source for edge in all_edges(block)} == {"input_layernorm"}


def test_a_grid_that_became_dense_again_can_be_moved(make_block):
    """Records compare with the layer of the stage's start in the present scaling, whatever that was."""
    block, _ = make_block()
    edge = block.edges("norms")[1]
    grid = RTN(group_size=16).linear(block.weights["mlp.up_proj"].dense(), LinearStats(64, ()), None)
    block.before["mlp.up_proj"] = grid
    block.fold(edge, torch.full((64,), 2.0))
    assert block.before["mlp.up_proj"].dense().equal(grid.dense() * 2)


@pytest.mark.parametrize("changes, sources", [
    ({"do_layer_norm_before": False}, {"self_attn.v_proj", "fc1"}),
    ({"activation_function": "gelu"}, {"self_attn_layer_norm", "final_layer_norm", "self_attn.v_proj"}),
    ({"layer_norm_elementwise_affine": False}, {"self_attn.v_proj", "fc1"}),
])  # fmt: skip
def test_an_opt_model_has_the_edges_that_its_config_leaves(changes, sources, make_block):
    block, rows = make_block("opt", **changes)
    assert {edge.source for edge in all_edges(block)} == sources
    expected = block.run(rows)
    for edge in all_edges(block):
        block.fold(edge, scale_for(block, edge, powers_of_two=True))
    torch.testing.assert_close(block.run(rows), expected, rtol=0, atol=1e-11)


def test_a_stream_that_is_normed_cannot_be_rotated():
    assert architecture("opt", {"do_layer_norm_before": False}).writers is None
    assert architecture("opt", {}) == ARCHITECTURES["opt"] == architecture("opt")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "opt"])
def test_replaced_matrices_compute_what_installed_ones_do(family, form, make_block):
    block, rows = make_block(family, form=form)
    original = block.run(rows)
    fresh = {name: weight.dense() * (1 + 0.1 * draw(*weight.shape)) for name, weight in block.matrices().items()}
    norm = block.skeleton.arch.norms[0].source + ".weight"
    fresh[norm] = block.others[norm] * 1.25
    found = block.run(rows, fresh)
    assert block.run(rows).equal(original), "the block itself was changed"
    for name, values in fresh.items():
        if name == norm:
            block.set_other(name, values)
        else:
            mask = block.matrices()[name].mask
            block.replace(name, Dense(values) if mask is None else Masked(Dense(values), mask))
    assert block.run(rows).equal(found) and not found.equal(original)
    assert block.matrices().keys() | {norm} == fresh.keys()


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("form", ["dense", "low-rank"])
def test_gradients_of_replaced_matrices_are_those_of_the_modules_own(family, form, make_block):
    block, rows = make_block(family, form=form)
    norm = block.skeleton.arch.norms[0].source
    values = {name: weight.dense(torch.float64).requires_grad_() for name, weight in block.matrices().items()}
    values[f"{norm}.weight"] = block.others[f"{norm}.weight"].double().requires_grad_()
    block.run(rows, values).square().mean().backward()
    block.module.requires_grad_(True)
    block.run(rows).square().mean().backward()
    for name, value in values.items():
        module = block.module.get_submodule(name.removesuffix(".weight"))
        expected = module.weight.grad.T if type(module).__name__ == "Conv1D" else module.weight.grad
        assert value.grad is not None and value.grad.count_nonzero()
        torch.testing.assert_close(value.grad, expected, rtol=1e-6, atol=1e-9)


def test_matrices_are_those_of_selected_layers(make_block):
    block, _ = make_block()
    gate = block.weights["mlp.gate_proj"].dense()
    corrected = Sum((Dense(gate), low_rank(Dense(gate)), Outliers.of(gate, gate.abs() > 0.5)))
    block.set("mlp.gate_proj", corrected)
    block.selected = frozenset({"mlp.gate_proj", "mlp.down_proj"})
    parts = [f"mlp.gate_proj.parts.{part}" for part in ("0", "1.down", "1.up")]
    assert set(block.matrices()) == {*parts, "mlp.down_proj"}
    assert set(block.entries("mlp.gate_proj")) == {parts[0], parts[1], "mlp.gate_proj.parts.2"}
    assert set(block.entries("mlp.down_proj")) == {"mlp.down_proj"}


def test_replacing_a_part_keeps_the_others(make_block):
    block, rows = make_block(form="sum")
    before = block.weights["mlp.down_proj"]
    assert isinstance(before, Sum)
    grid = RTN(group_size=16).linear(block.matrices()["mlp.down_proj.parts.1.up"].dense(), LinearStats(24, ()), None)
    block.replace("mlp.down_proj.parts.1.up", grid)
    after = block.weights["mlp.down_proj"]
    assert isinstance(after, Sum) and isinstance(after.parts[1], LowRank) and isinstance(after.parts[1].up, Quantized)
    assert after.parts[0] is before.parts[0]
    assert after.parts[1].down.dense().equal(before.parts[1].children()["down"].dense())
    assert block.run(rows).isfinite().all() and block.before["mlp.down_proj"] is before


@pytest.mark.parametrize("family", FAMILIES)
def test_an_isolated_module_puts_out_what_it_does_in_the_block(family, make_block):
    block, rows = make_block(family)
    for group in block.skeleton.arch.groups:
        path = group[0].rpartition(".")[0] or group[0]
        module = block.isolate(path, rows)
        seen: list = []
        handle = block.module.get_submodule(path).register_forward_hook(lambda _, __, output, seen=seen: seen.append(output))
        block.run(rows)
        changed = {group[-1]: block.weights[group[-1]].dense() * 2}
        block.run(rows, changed)
        handle.remove()
        expected = [output[0] if isinstance(output, tuple) else output for output in seen]
        assert module({}).equal(expected[0]) and module(changed).equal(expected[1])
        assert not expected[0].equal(expected[1])


def test_grids_that_no_plain_module_holds_are_opened_for_a_pass_that_rounds(llama, make_pass, run_stages, assert_reloads):
    from compress.checkpoint import Checkpoint
    from compress.skeleton import Skeleton
    from compress.weights import Quantized

    artifact = run_stages(llama, [make_pass("hqq"), make_pass("autoround")])
    assert all(isinstance(weight, Quantized) for weight in Skeleton(Checkpoint(artifact)).read_weights(0).values())
    assert_reloads(artifact)
