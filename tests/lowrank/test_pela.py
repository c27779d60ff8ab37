"""Factors move towards the original's hidden states, and a penalty on how far they have gone."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from compress.adapted import Shifted
from compress.loader import LowRankLinear
from compress.lowrank.pela import PELA
from compress.train import TrainResult, train
from compress.weights import Dense, LowRank, Quantized, Weight


def test_it_begins_where_the_factors_are_and_ends_in_their_form():
    step, generator = PELA(), torch.Generator()
    values = torch.randn(6, 8, generator=generator.manual_seed(0)).bfloat16()
    for weight in (Dense(values), Dense(values).masked(values > 0)):
        form = step.adapt(weight, generator)
        assert isinstance(form, Shifted) and torch.equal(form.dense(), weight.dense()) and form.nbytes == weight.nbytes
        settled = step.settle(form.rebuild({"shift": torch.ones(6, 8).bfloat16()}))
        assert type(settled) is type(weight) and settled.dtype == torch.bfloat16
        expected = (values.float() + 1).bfloat16()
        assert torch.equal(settled.dense(), expected if weight.mask is None else expected * weight.mask)
    grid = Quantized(torch.zeros(6, 8, dtype=torch.int8), torch.ones(6, 1), None, 4)
    assert step.adapt(grid, generator) is grid


def low_rank(matrix: Tensor, rank: int) -> LowRank:
    left, sizes, right = torch.linalg.svd(matrix, full_matrices=False)
    return LowRank(Dense(sizes[:rank, None] * right[:rank]), Dense(left[:, :rank].contiguous()))


def fit(teacher, tokens: Tensor, directory: Path, **settings) -> tuple[dict[str, Weight], TrainResult]:
    """What factors were before, and what training made of them."""
    student, weights = copy.deepcopy(teacher), {}
    for name in [name for name, _ in teacher.named_modules() if name.endswith("_proj")]:
        weight = weights[name] = low_rank(teacher.get_submodule(name).weight.data, rank=6)
        module = LowRankLinear(weight.shape[1], weight.shape[0], False, weight.rank, {})
        module.down.weight.data, module.up.weight.data = weight.down.dense(), weight.up.dense()
        student.set_submodule(name, module)
    step = PELA(steps=20, batch_size=2, learning_rate=1e-2, schedule="constant", **settings)
    return weights, train(
        student, weights, teacher, tokens, step, seed=0, device="cpu", directory=directory, progress=lambda *call: None
    )


def test_states_come_closer_and_a_penalty_keeps_the_factors_near(tmp_path):
    """Adam moves by the learning rate a step, and decay takes back rate * penalty of what was moved."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, initializer_range=0.5, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    teacher = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tokens = torch.randint(32, (44, 8), generator=torch.Generator().manual_seed(0))
    moved = []
    for penalty in (0.0, 50.0):
        before, result = fit(teacher, tokens, tmp_path / str(penalty), weight_decay=penalty)
        assert all(isinstance(weight, LowRank) and isinstance(weight.up, Dense) for weight in result.weights.values())
        assert penalty or result.history[-1] < 0.9 * result.history[0]
        moved.append(sum(float((result.weights[name].dense() - weight.dense()).norm()) for name, weight in before.items()))
    assert 0 < moved[1] < 0.5 * moved[0]
