"""What trainable layers keep, and blocks that are computed again in the backward pass."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from compress.distill.logit_kd import LogitKD
from compress.distill.lora import LoRA
from compress.quant.bitnet import BitNet
from compress.quant.llm_qat import LLMQAT
from compress.trainable import TrainableLinear, outline_trained, recomputed_blocks
from compress.weights import Dense, Masked, bitmasked
from tests.training import compressed, fit, low_rank, masked


def test_what_is_taken_over_is_kept_without_copies_of_what_is_trained():
    layer = TrainableLinear(masked(torch.arange(12.0).view(3, 4)), None, torch.device("cpu"))
    (master,), mask = layer.masters, torch.eye(3, 4, dtype=torch.bool)
    others = master.detach() + 1
    layer.take(Masked(Dense(others), mask))
    assert master.equal(others) and layer.trained().dense().equal(others * mask)
    assert [value is master for value in layer.frame.parameters().values()] == [True]


@pytest.mark.parametrize("step", [LogitKD(), LoRA(rank=2), BitNet(), LLMQAT(bits=4)], ids=lambda step: step.method())
def test_a_plan_knows_what_a_bitmask_will_take_after_training(step):
    before = masked(torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16))
    before = before.masked(before.mask & (torch.arange(64 * 128).view(64, 128) % 4 == 0))
    outlined = replace(before.map(lambda tensor: tensor.to("meta")), n_kept=before.numel)
    after = step.settle(step.adapt(before, torch.Generator()))
    assert bitmasked(outline_trained(step, "layer", outlined)).nbytes == bitmasked(after).nbytes < after.nbytes


def saved_bytes(work) -> int:
    """Of all tensors that are kept for the backward pass."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        work()
    return sum(kept.values())


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "gpt2", "opt", "gpt_neox", "qwen3", "mistral"])
def test_recomputed_blocks_give_the_same_gradients_for_less_memory(family, tokens, make_checkpoint, reload):
    model = reload(make_checkpoint(family))

    def gradients() -> list[Tensor | None]:
        model.zero_grad()
        model(input_ids=tokens[:2], use_cache=False).logits.square().mean().backward()
        return [parameter.grad for parameter in model.parameters()]

    expected, memory = gradients(), saved_bytes(lambda: model(input_ids=tokens[:2], use_cache=False).logits)
    with recomputed_blocks(model):
        found, less = gradients(), saved_bytes(lambda: model(input_ids=tokens[:2], use_cache=False).logits)
    assert all(ours is theirs or torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    assert less < 0.5 * memory
    assert saved_bytes(lambda: model(input_ids=tokens[:2], use_cache=False).logits) == memory


def test_training_with_recomputed_blocks_is_the_same(llama, tokens, tmp_path):
    results = []
    for number, checkpointing in enumerate((False, True)):
        student, weights = compressed(llama, low_rank)
        results.append(fit(student, weights, llama, tokens, tmp_path / str(number), steps=4, checkpointing=checkpointing))
    assert results[0].history == results[1].history and results[0].held_out == results[1].held_out
