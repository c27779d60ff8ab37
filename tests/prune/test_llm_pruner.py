"""LLM-Pruner: gradients are those of the whole model, and importance is what the loss would change by."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from compress import methods
from compress.block import Block
from compress.checkpoint import Checkpoint
from compress.errors import BadInput
from compress.gradients import Gradients, gradients
from compress.prune.llm_pruner import LLMPruner, salience
from compress.skeleton import Skeleton
from compress.walk import Walk

FAMILIES = ("llama", "llama-untied", "qwen3", "gemma2", "phi3", "gpt2", "opt", "gpt_neox")


def loss_of(model, tokens: Tensor) -> Tensor:
    logits = model(input_ids=tokens).logits[:, :-1].float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def assert_near(found: Tensor, expected: Tensor) -> None:
    assert (found - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_the_whole_model(family, make_checkpoint, reload, tokens, tmp_path):
    source = make_checkpoint(family)
    skeleton, model = Skeleton(Checkpoint(source)), reload(source)
    matrices = {name: model.get_submodule(name).weight.requires_grad_() for name in skeleton.linear_names()}
    own = [torch.autograd.grad(loss_of(model, window), [*matrices.values()]) for window in tokens.split(1)]
    with torch.no_grad():  # as the engine calls it
        for seen in gradients(Walk(skeleton, tokens, tmp_path), tokens, squares=True):
            for local, gradient in seen.gradients.items():
                which = list(matrices).index(skeleton.module_name(seen.block.index, local))
                each = [grads[which].T if skeleton.is_conv1d(local) else grads[which] for grads in own]
                assert_near(gradient, sum(each) / len(each))
                assert_near(seen.squares[local], sum(value.square() for value in each) / len(each))


def test_layers_that_blocks_share_get_the_sum_of_their_gradients(llama, reload, run_stages, tokens, tmp_path):
    """Two equal blocks, of which one is then made to be the other's: its gradient is that of both together."""
    source = tmp_path / "twice"
    shutil.copytree(llama, source)
    tensors = load_file(source / "model.safetensors")
    tensors |= {n.replace("layers.0", "layers.1"): t.clone() for n, t in tensors.items() if "layers.0" in n}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    apart = Skeleton(Checkpoint(source))
    shared = Skeleton(apart.checkpoint.altered({}, {"model.layers.1": {"kind": "shared", "of": "model.layers.0"}}))
    with torch.no_grad():
        both = {seen.block.index: seen.gradients for seen in gradients(Walk(apart, tokens, tmp_path / "a"), tokens)}
        (one,) = gradients(Walk(shared, tokens, tmp_path / "b"), tokens)
    assert one.block.index == 0
    for local, gradient in one.gradients.items():
        assert_near(gradient, both[0][local] + both[1][local])


def test_importance_is_what_a_loss_changes_by_that_is_linear_in_a_weight():
    weight, slope = torch.randn(5, 7), torch.randn(5, 7)
    block: Block = None  # type: ignore[assignment]
    seen = Gradients(block, {"layer": weight}, {"layer": slope}, {"layer": slope.square()})
    changed = (weight * slope).sum() - (weight.masked_fill(torch.arange(35).view(5, 7) == 11, 0) * slope).sum()
    torch.testing.assert_close(salience(seen, "layer", "param_first")[1, 4], changed, rtol=1e-4, atol=1e-5)
    mixed = salience(seen, "layer", "param_first") - salience(seen, "layer", "param_second") / 2
    torch.testing.assert_close(salience(seen, "layer", "param_mix"), mixed)


@pytest.mark.parametrize("importance", ["param_first", "param_second", "param_mix", "vectorize"])
def test_twin_neurons_and_heads_are_equally_important_and_dead_ones_go_first(importance, llama, tokens, tmp_path):
    source = tmp_path / "twins"
    shutil.copytree(llama, source)
    tensors = load_file(source / "model.safetensors")
    for part in ("gate_proj", "up_proj"):
        tensors[f"model.layers.0.mlp.{part}.weight"][7] = tensors[f"model.layers.0.mlp.{part}.weight"][3]
    down = tensors["model.layers.0.mlp.down_proj.weight"]
    down[:, 7] = down[:, 3]
    down[:, 50] = 0
    queries, output = (tensors[f"model.layers.1.self_attn.{part}.weight"] for part in ("q_proj", "o_proj"))
    queries[16:32], output[:, 16:32] = queries[:16], output[:, :16]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    step = LLMPruner(importance=importance)
    with torch.no_grad():
        found = step.measure(Walk(Skeleton(Checkpoint(source)), tokens, tmp_path))
    neurons, heads = found["neurons"][0], found["heads"][1]
    assert neurons[3] == pytest.approx(neurons[7], rel=1e-3) and heads[0] == pytest.approx(heads[1], rel=1e-3)
    assert neurons[50] == 0 == min(neurons)


def test_windows_are_few_and_short():
    step = LLMPruner(windows=3, length=8)
    assert step.short(torch.zeros(5, 20)).shape == (3, 8) and step.short(torch.zeros(2, 5)).shape == (2, 5)
    assert step.short(torch.arange(20).view(20, 1)).tolist() == [list(range(8)), list(range(8, 16))]
    with pytest.raises(BadInput, match="one token"):
        step.short(torch.zeros(1, 1))
    with pytest.raises(BadInput, match="length"):
        methods.build("llm_pruner", {"length": 1})
