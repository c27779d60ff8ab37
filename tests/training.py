"""What tests of the training loop share: tiny random models, compressed in each way, and how they are trained."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from compress.distill.logit_kd import LogitKD
from compress.distill.losses import forward_kl
from compress.loader import LowRankLinear
from compress.train import TrainResult, train
from compress.weights import Dense, LowRank, Quantized, Weight

VOCABULARY = 128
SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

GPT2_SHAPE = {
    "vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

TOKENS = torch.randint(0, VOCABULARY, (64, 32), generator=torch.Generator().manual_seed(0))


def make(config) -> PreTrainedModel:
    torch.manual_seed(0)
    # Weights of the default size give almost uniform predictions, from which nothing could be learnt.
    config.initializer_range = 0.2
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def masked(weight: Tensor) -> Weight:
    return Dense(weight).masked(weight.abs() > weight.abs().median())


def quantized(weight: Tensor, bits: int = 3, group_size: int = 16) -> Quantized:
    groups = weight.float().reshape(weight.shape[0], -1, group_size)
    scale = groups.abs().amax(-1) / (2 ** (bits - 1) - 1)
    codes = (groups / scale.unsqueeze(-1)).round().to(torch.int8).reshape(weight.shape)
    return Quantized(codes, scale.to(weight.dtype), None, bits)


def low_rank(weight: Tensor) -> LowRank:
    left, values, right = torch.linalg.svd(weight.float(), full_matrices=False)
    rank = len(values) // 2
    up, down = left[:, :rank] * values[:rank].sqrt(), values[:rank].sqrt()[:, None] * right[:rank]
    return LowRank(quantized(down.to(weight.dtype)), masked(up.to(weight.dtype)))


def factors(weight: LowRank, bias: Tensor | None) -> LowRankLinear:
    """What a loader puts in the place of a linear layer that has become two."""
    module = LowRankLinear(weight.shape[1], weight.shape[0], bias is not None, weight.rank, {})
    module.down.weight.data, module.up.weight.data = weight.down.dense(torch.float32), weight.up.dense(torch.float32)
    if bias is not None:
        module.up.bias.data = bias.clone()
    return module


def compressed(teacher: PreTrainedModel, how, dtype=torch.float32) -> tuple[PreTrainedModel, dict[str, Weight]]:
    """A student whose block linears are ``how(weight)``, and their representations."""
    student, weights = copy.deepcopy(teacher), {}
    linears = [(n, m) for n, m in student.named_modules() if isinstance(m, nn.Linear | Conv1D) and n != "lm_head"]
    for name, module in linears:
        transposed = isinstance(module, Conv1D)
        matrix = module.weight.data.T if transposed else module.weight.data
        weight = weights[name] = how(matrix.to(dtype).contiguous())
        if isinstance(weight, LowRank):
            student.set_submodule(name, factors(weight, None if module.bias is None else module.bias.data))
        else:
            dense = weight.dense(torch.float32)
            module.weight.data = dense.T.contiguous() if transposed else dense
    return student, weights


@torch.no_grad()
def held_out_kl(student: PreTrainedModel, teacher: PreTrainedModel) -> float:
    unseen = torch.randint(0, VOCABULARY, (16, 32), generator=torch.Generator().manual_seed(1))
    return float(forward_kl(student(unseen).logits, teacher(unseen).logits).mean())


def silent(done: int, total: int, message: str) -> None:
    pass


def fit(student, weights, teacher, tokens, directory, progress=silent, save_every=50, seed=0, **settings) -> TrainResult:
    step = LogitKD(**{"steps": 20, "batch_size": 4, "learning_rate": 1e-2} | settings)
    return train(student, weights, teacher, tokens, step, seed=seed, device="cpu", directory=directory,
                 progress=progress, save_every=save_every)  # fmt: skip


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_tensors(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def fixed_parts(weight: Weight) -> list[Tensor]:
    """Codes, zero points and masks."""
    parts: list[Tensor] = []

    def collect(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            parts.append(tensor)
        return tensor

    weight.map(collect)
    return parts


def uneven(tokens: Tensor) -> Tensor:
    """Of every window another number of tokens counts, of one none."""
    counted = torch.arange(tokens.shape[1]) >= (torch.arange(len(tokens)) % tokens.shape[1]).unsqueeze(1)
    counted[3] = False
    return counted
