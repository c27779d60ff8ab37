"""The training loop on tiny random models: what it lowers, what it must not touch, and that it resumes bit for bit."""

from __future__ import annotations

import copy
import multiprocessing
import os
import socket
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    OPTConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from compress.distill.logit_kd import LogitKD
from compress.distill.losses import forward_kl
from compress.errors import BadInput, CompressError
from compress.loader import LowRankLinear
from compress.passes import Needs
from compress.signals import head_of
from compress.train import TrainResult, train
from compress.train_pass import TrainPass
from compress.trainable import TrainableLinear, recomputed_blocks
from compress.training_state import STATE_FILE
from compress.weights import Dense, LowRank, Quantized, Weight, assert_structure_kept, structure

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


def make(config) -> PreTrainedModel:
    torch.manual_seed(0)
    # Weights of the default size give almost uniform predictions, from which nothing could be learnt.
    config.initializer_range = 0.2
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small are faster on one thread, above all where the machine has other work."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return make(LlamaConfig(**SHAPE, attention_bias=True))


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(0, VOCABULARY, (64, 32), generator=torch.Generator().manual_seed(0))


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


@pytest.mark.parametrize("how", [masked, quantized, low_rank, lambda w: quantized(w).masked(masked(w).mask)],
                         ids=["masked", "quantized", "low_rank", "masked_quantized"])  # fmt: skip
def test_distillation_lowers_held_out_kl_and_keeps_structure(how, llama, tokens, tmp_path):
    student, weights = compressed(llama, how)
    teacher_before, frozen = tensors_of(llama), student.model.embed_tokens.weight.clone()
    before = held_out_kl(student, llama)
    result = fit(student, weights, llama, tokens, tmp_path)
    assert held_out_kl(student, llama) < 0.9 * before
    assert len(result.history) == 20 and result.history[-1] < result.history[0]
    for name, weight in result.weights.items():
        assert type(weight) is type(weights[name])
        assert_structure_kept(name, structure(weights[name]), weight)
        for ours, theirs in zip(fixed_parts(weight), fixed_parts(weights[name]), strict=True):
            assert torch.equal(ours, theirs), name
        if not isinstance(weight, LowRank):
            assert torch.equal(student.get_submodule(name).weight, weight.dense())
            assert not torch.equal(weight.dense(), weights[name].dense())
    assert torch.equal(student.model.embed_tokens.weight, frozen)
    assert_same_tensors(tensors_of(llama), teacher_before)


def fixed_parts(weight: Weight) -> list[Tensor]:
    """Codes, zero points and masks."""
    parts: list[Tensor] = []

    def collect(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            parts.append(tensor)
        return tensor

    weight.map(collect)
    return parts


def test_low_rank_factors_are_written_back_with_their_bias(llama, tokens, tmp_path):
    student, weights = compressed(llama, low_rank)
    bias = student.model.layers[0].self_attn.q_proj.up.bias.clone()
    trained = fit(student, weights, llama, tokens, tmp_path, steps=3).weights["model.layers.0.self_attn.q_proj"]
    module = student.model.layers[0].self_attn.q_proj
    assert isinstance(trained, LowRank) and isinstance(module, LowRankLinear)
    assert torch.equal(module.down.weight, trained.down.dense()) and torch.equal(module.up.weight, trained.up.dense())
    assert not torch.equal(module.up.bias, bias)


def test_conv1d_models_are_trained(tokens, tmp_path):
    teacher = make(GPT2Config(**GPT2_SHAPE)).eval()
    student, weights = compressed(teacher, masked)
    before = held_out_kl(student.eval(), teacher)
    result = fit(student, weights, teacher, tokens, tmp_path)
    assert held_out_kl(student, teacher) < 0.9 * before
    for name, weight in result.weights.items():
        stored = student.get_submodule(name).weight
        assert stored.is_contiguous() and torch.equal(stored.T, weight.dense())
        assert_structure_kept(name, structure(weights[name]), weight)


def test_storage_dtypes_are_kept(llama, tokens, tmp_path):
    student, weights = compressed(llama, masked, torch.bfloat16)
    student.bfloat16()
    result = fit(student, weights, llama, tokens, tmp_path, steps=3)
    assert {weight.dtype for weight in result.weights.values()} == {torch.bfloat16}
    assert {value.dtype for value in student.parameters()} == {torch.bfloat16}
    for name, weight in result.weights.items():
        assert torch.equal(student.get_submodule(name).weight, weight.dense())


def test_the_teacher_itself_has_no_loss_and_stays(llama, tokens, tmp_path):
    student, weights = compressed(llama, Dense)
    result = fit(student, weights, llama, tokens, tmp_path, steps=5, learning_rate=1e-5)
    assert max(result.history) < 1e-5
    for name, weight in result.weights.items():
        assert (weight.dense() - weights[name].dense()).abs().max() < 1e-4


@pytest.mark.parametrize("trains", ["weights", "blocks", "everything"])
def test_what_is_trained(trains, llama, tokens, tmp_path):
    student, weights = compressed(llama, masked)
    before = tensors_of(student)
    fit(student, weights, llama, tokens, tmp_path, steps=2, trains=trains)
    moved = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
    linears = {f"{name}.weight" for name in weights}
    small = {name for name, value in before.items() if value.dim() == 1}
    assert moved == {"weights": linears, "blocks": linears | small, "everything": set(before)}[trains]


def test_parts_of_a_batch_add_up_to_the_batch(llama, tokens, tmp_path):
    whole, weights = compressed(llama, masked)
    parts = copy.deepcopy(whole)
    one = fit(whole, weights, llama, tokens, tmp_path / "whole", steps=3, learning_rate=1e-4)
    two = fit(parts, weights, llama, tokens, tmp_path / "parts", steps=3, learning_rate=1e-4, accumulate=2)
    torch.testing.assert_close(torch.tensor(one.history), torch.tensor(two.history), rtol=1e-4, atol=0)


def test_same_seed_same_bits_and_no_trace_in_the_process(llama, tokens, tmp_path):
    accelerate_states = (AcceleratorState, PartialState, GradientState)
    for state in accelerate_states:  # lm-eval, in an earlier test, makes an Accelerator too and leaves it
        state._shared_state.clear()
    Accelerator(cpu=True, mixed_precision="bf16")  # the caller's own, with other settings
    states = [dict(state._shared_state) for state in accelerate_states]
    random_state, environment = torch.get_rng_state(), dict(os.environ)
    students, results = [], []
    for run, seed in enumerate((0, 0, 1)):
        student, weights = compressed(llama, masked)
        flags = [value.requires_grad for value in student.parameters()]
        results.append(fit(student.train(), weights, llama, tokens, tmp_path / str(run), steps=4, seed=seed))
        students.append(student)
        assert student.training and flags == [value.requires_grad for value in student.parameters()]
        assert all(value.grad is None for value in student.parameters())
    assert_same_tensors(tensors_of(students[0]), tensors_of(students[1]))
    assert results[0].history == results[1].history != results[2].history
    assert torch.equal(torch.get_rng_state(), random_state) and dict(os.environ) == environment
    assert [dict(state._shared_state) for state in accelerate_states] == states
    for state in accelerate_states:
        state._shared_state.clear()


@pytest.mark.parametrize("how", [masked, low_rank], ids=["masked", "low_rank"])
def test_an_interrupted_run_resumes_bit_for_bit(how, llama, tokens, tmp_path):
    undisturbed, weights = compressed(llama, how)
    interrupted, resumed = copy.deepcopy(undisturbed), copy.deepcopy(undisturbed)
    settings = {"steps": 12, "save_every": 4, "weight_decay": 0.1}
    expected = fit(undisturbed, weights, llama, tokens, tmp_path / "undisturbed", **settings)

    def stop_at_six(done: int, total: int, message: str) -> None:
        if done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(interrupted, weights, llama, tokens, tmp_path / "stopped", progress=stop_at_six, **settings)
    assert not any(isinstance(module, TrainableLinear) for module in interrupted.modules())
    seen: list[int] = []
    result = fit(resumed, weights, llama, tokens, tmp_path / "stopped",
                 progress=lambda done, total, message: seen.append(done), **settings)  # fmt: skip
    assert seen == [4, *range(5, 13)]
    assert result.history == expected.history
    assert_same_tensors(tensors_of(resumed), tensors_of(undisturbed))
    assert [path.name for path in (tmp_path / "stopped").iterdir()] == [STATE_FILE]


def test_a_finished_run_returns_at_once_and_other_settings_start_anew(llama, tokens, tmp_path, caplog):
    student, weights = compressed(llama, masked)
    first, second, third = student, copy.deepcopy(student), copy.deepcopy(student)
    expected = fit(first, weights, llama, tokens, tmp_path, steps=3)
    seen: list[str] = []
    again = fit(second, weights, llama, tokens, tmp_path, steps=3, progress=lambda *call: seen.append(call[2]))
    assert seen == ["resumed"] and again.history == expected.history
    assert_same_tensors(tensors_of(first), tensors_of(second))
    other = fit(third, weights, llama, tokens, tmp_path, steps=3, temperature=2.0)
    assert other.history != expected.history and "starts anew" in caplog.text


def test_a_loss_that_is_not_finite_names_the_step_and_a_remedy(llama, tokens, tmp_path):
    student, weights = compressed(llama, masked)
    with pytest.raises(CompressError, match=r"step \d+ of 20; try a smaller learning rate, such as learning_rate=1e\+28"):
        fit(student, weights, llama, tokens, tmp_path, learning_rate=1e29)
    assert not any(isinstance(module, TrainableLinear) for module in student.modules())


def test_bad_requests_are_refused_before_any_work(llama, tokens, tmp_path):
    student, weights = compressed(llama, masked)
    with pytest.raises(BadInput, match="teacher"):
        fit(student, weights, None, tokens, tmp_path)
    with pytest.raises(BadInput, match="tokens"):
        fit(student, weights, llama, tokens[:, :1], tmp_path)


class NextToken(TrainPass):
    """A loss without a teacher."""

    def loss(self, student, teacher, batch):
        assert teacher is None
        return F.cross_entropy(student.head(student.hidden), batch.targets)


def test_a_loss_without_a_teacher_is_that_of_the_next_token(llama, tokens, tmp_path):
    student, weights = compressed(llama, masked)
    with torch.no_grad():
        logits = student(tokens[:1]).logits
        expected = F.cross_entropy(logits[0, :-1], tokens[0, 1:])
    result = train(student, weights, None, tokens[:1], NextToken(steps=5, batch_size=1, learning_rate=1e-3, warmup=0.0),
                   seed=0, device="cpu", directory=Path(tmp_path), progress=silent)  # fmt: skip
    assert result.history[0] == pytest.approx(float(expected), rel=1e-5)
    assert result.history[-1] < result.history[0]


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SHAPE),
        GPT2Config(**GPT2_SHAPE),
        Gemma2Config(**SHAPE, head_dim=16, final_logit_softcapping=2.0),
        GraniteConfig(**SHAPE, logits_scaling=8.0),
        Cohere2Config(**SHAPE),
        OPTConfig(**{name: value for name, value in SHAPE.items() if name in vars(OPTConfig())}, word_embed_proj_dim=32),
    ],
    ids=lambda config: config.model_type,
)
def test_head_of_gives_the_logits_of_the_model(config, tokens):
    model = make(config).eval()
    with torch.no_grad():
        hidden = model.get_decoder()(input_ids=tokens[:2], use_cache=False).last_hidden_state
        torch.testing.assert_close(head_of(model)(hidden), model(tokens[:2]).logits)


def test_a_head_that_is_not_understood_is_refused(llama, tokens, tmp_path, monkeypatch):
    student, weights = compressed(llama, masked)
    forward = student.forward

    def doubled(**arguments):
        output = forward(**arguments)
        return type(output)(logits=2 * output.logits)

    monkeypatch.setattr(student, "forward", doubled)
    with pytest.raises(BadInput, match="llama"):
        fit(student, weights, llama, tokens, tmp_path)


def test_only_the_named_layers_and_factors_are_trained(llama, tokens, tmp_path):
    student, weights = compressed(llama, low_rank)
    weights |= {name: Dense(llama.get_submodule(name).weight.data.clone()) for name in weights if name.endswith("k_proj")}
    for name in weights:
        if name.endswith("k_proj"):
            student.set_submodule(name, copy.deepcopy(llama.get_submodule(name)))

    def moved(**settings) -> set[str]:
        one, before = copy.deepcopy(student), tensors_of(student)
        fit(one, weights, llama, tokens, tmp_path / str(settings), steps=2, **settings)
        return {name for name, value in one.state_dict().items() if not torch.equal(value, before[name])}

    factored = {name for name in weights if not name.endswith("k_proj")}
    assert moved(trains="factors") == {f"{name}.{part}.weight" for name in factored for part in ("down", "up")}
    assert moved(trains="factors", targets="*.up") == {f"{name}.up.weight" for name in factored}
    assert moved(trains="weights", skip="*.down+*.up") == {f"{n}.weight" for n in weights if n.endswith("k_proj")}


class Half(TrainPass):
    """The next token, of the tokens that count, by way of a matrix of its own."""

    needs: ClassVar[Needs] = Needs(states=True)

    def aids(self, student_sizes, teacher_sizes):
        assert student_sizes == (64, 64, 64) and teacher_sizes == ()
        return nn.Linear(64, 64, bias=False)

    def loss(self, student, teacher, batch):
        assert torch.equal(batch.targets, batch.tokens[:, 16:].flatten())
        assert torch.equal(batch.windows, torch.arange(4).repeat_interleave(16))
        assert len(student.states) == 3 and len(student.hidden) == len(batch.targets)
        torch.testing.assert_close(student.states[-1], student.hidden)
        return F.cross_entropy(student.head(batch.aids(student.states[-1])), batch.targets)


def test_tokens_that_do_not_count_are_left_out_and_aids_are_trained(llama, tokens, tmp_path):
    student, weights = compressed(llama, masked)
    counted = torch.zeros_like(tokens, dtype=torch.bool)
    counted[:, 16:] = True
    result = train(student, weights, None, tokens, Half(steps=12, batch_size=4, learning_rate=1e-2), seed=0, device="cpu",
                   directory=tmp_path, progress=silent, counted=counted)  # fmt: skip
    assert result.history[-1] < result.history[0]


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "linear", "constant"])
def test_schedules_warm_up_to_the_peak_and_fall(schedule):
    step = LogitKD(steps=100, schedule=schedule, warmup=0.1, decay=0.25, learning_rate=2.0)
    rates = [step.learning_rate_at(index) for index in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (index + 1) for index in range(10)])
    assert rates[10] == 2.0 and all(later <= earlier for earlier, later in pairwise(rates[9:]))
    assert rates.count(2.0) == {"constant": 91, "wsd": 67}.get(schedule, 2)
    half, last = {"cosine": (1.0, 0.0006), "linear": (1.0, 0.0223), "wsd": (2.0, 0.08), "constant": (2.0, 2.0)}[schedule]
    assert rates[55] == pytest.approx(half) and rates[-1] == pytest.approx(last, rel=0.02)


def uneven(tokens: Tensor) -> Tensor:
    """Of every window another number of tokens counts, of one none."""
    counted = torch.arange(tokens.shape[1]) >= (torch.arange(len(tokens)) % tokens.shape[1]).unsqueeze(1)
    counted[3] = False
    return counted


def test_uneven_parts_count_by_their_tokens(llama, tokens, tmp_path):
    results = []
    for accumulate in (1, 2, 4):
        student, weights = compressed(llama, masked)
        step = LogitKD(steps=4, batch_size=4, learning_rate=1e-3, accumulate=accumulate, evaluate_every=2)
        results.append(train(student, weights, llama, tokens, step, seed=0, device="cpu", progress=silent,
                             directory=tmp_path / str(accumulate), counted=uneven(tokens)))  # fmt: skip
    for other in results[1:]:
        torch.testing.assert_close(torch.tensor(other.history), torch.tensor(results[0].history), rtol=1e-4, atol=0)
        torch.testing.assert_close(torch.tensor(other.held_out), torch.tensor(results[0].held_out), rtol=1e-4, atol=0)


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


class Noted(TrainPass):
    """Takes note of what it is trained on, and of what it is measured on."""

    def loss(self, student, teacher, batch):
        seen[torch.is_grad_enabled()].update(batch.rows.tolist())
        assert torch.equal(batch.tokens, NOTED_TOKENS[batch.rows])
        return F.cross_entropy(student.head(student.hidden), batch.targets)


seen: dict[bool, set[int]] = {True: set(), False: set()}
NOTED_TOKENS = torch.randint(0, VOCABULARY, (40, 8), generator=torch.Generator().manual_seed(2))


def test_held_out_windows_are_never_trained_on(llama, tmp_path):
    chosen = []
    for seed in (0, 0, 1):
        for found in seen.values():
            found.clear()
        student, weights = compressed(llama, masked)
        step = Noted(steps=8, batch_size=4, hold_out=0.2, evaluate_every=3)
        result = train(student, weights, None, NOTED_TOKENS, step, seed=seed, device="cpu",
                       directory=tmp_path / str(len(chosen)), progress=silent)  # fmt: skip
        assert [done for done, _ in result.held_out] == [0, 3, 6, 8]
        assert len(seen[False]) == 8 and seen[True] | seen[False] == set(range(40)) and not seen[True] & seen[False]
        chosen.append(frozenset(seen[False]))
    assert chosen[0] == chosen[1] != chosen[2]
    assert step.n_held_out(7) == 0 and step.n_held_out(8) == 4 and Noted(hold_out=0).n_held_out(800) == 0


def test_early_stop_gives_back_the_best(llama, tokens, tmp_path):
    """A rate at which things get worse: the parameters of the start are the best, and come out."""
    student, weights = compressed(llama, masked)
    before = tensors_of(student)
    settings = {"learning_rate": 2.0, "warmup": 0.0, "steps": 20, "evaluate_every": 2, "patience": 2}
    messages: list[str] = []
    result = fit(student, weights, llama, tokens, tmp_path, progress=lambda *call: messages.append(call[2]), **settings)
    assert len(result.history) == 4 and [done for done, _ in result.held_out] == [0, 2, 4]
    assert result.n_steps == 0 and result.summary()["held_out_loss"] == result.held_out[0][1]
    assert_same_tensors(tensors_of(student), before)
    assert messages[-1] == f"loss {result.history[-1]:.4f}, held out {result.held_out[-1][1]:.4f}"

    again, _ = compressed(llama, masked)  # what has stopped goes on no more
    repeated = fit(again, weights, llama, tokens, tmp_path, **settings)
    assert repeated.history == result.history and repeated.held_out == result.held_out
    assert_same_tensors(tensors_of(again), before)


def test_an_early_stop_after_an_interruption_is_the_same(llama, tokens, tmp_path):
    settings = {"schedule": "constant", "learning_rate": 2e-2, "warmup": 0.2, "steps": 40, "save_every": 3}
    settings |= {"evaluate_every": 1, "patience": 1}
    undisturbed, weights = compressed(llama, masked)
    resumed = copy.deepcopy(undisturbed)
    expected = fit(undisturbed, weights, llama, tokens, tmp_path / "undisturbed", **settings)
    assert 0 < expected.n_steps < len(expected.history)

    def stop(done: int, total: int, message: str) -> None:
        if done == len(expected.history) - 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(copy.deepcopy(resumed), weights, llama, tokens, tmp_path / "stopped", progress=stop, **settings)
    found = fit(resumed, weights, llama, tokens, tmp_path / "stopped", **settings)
    assert (found.history, found.held_out, found.n_steps) == (expected.history, expected.held_out, expected.n_steps)
    assert_same_tensors(tensors_of(resumed), tensors_of(undisturbed))


def test_settings_that_disagree_are_refused(llama, tokens, tmp_path):
    for settings in ({"patience": 2, "hold_out": 0}, {"accumulate": 3}):
        with pytest.raises(ValueError, match=r"patience|accumulate"):
            LogitKD(**settings)
    student, weights = compressed(llama, masked)
    with pytest.raises(BadInput, match="too few to hold some out"):
        fit(student, weights, llama, tokens[:7], tmp_path, patience=1)


def share(rank: int, port: int, directory: Path, outcome: Any) -> None:
    """One of two processes that train together."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
    torch.set_num_threads(1)
    result = shared_run(directory, accumulate=2)
    if rank == 0:
        outcome.put((result.history, result.held_out, [weight.dense().numpy() for weight in result.weights.values()]))
    torch.distributed.destroy_process_group()


def shared_run(directory: Path, **settings) -> TrainResult:
    teacher = make(LlamaConfig(**SHAPE, attention_bias=True))
    student, weights = compressed(teacher, low_rank)
    tokens = torch.randint(0, VOCABULARY, (64, 32), generator=torch.Generator().manual_seed(0))
    step = LogitKD(steps=6, batch_size=8, learning_rate=1e-3, evaluate_every=2, hold_out=0.15, **settings)
    return train(student, weights, teacher, tokens, step, seed=0, device="cpu", directory=directory, progress=silent,
                 counted=uneven(tokens))  # fmt: skip


@pytest.mark.slow
def test_two_processes_compute_what_one_does(tmp_path):
    """Uneven numbers of tokens in every share, held-out windows that cannot be shared out evenly."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    outcome = context.Queue()
    processes = [context.Process(target=share, args=(rank, port, tmp_path / "two", outcome)) for rank in range(2)]
    for process in processes:
        process.start()
    history, held_out, values = outcome.get(timeout=300)
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    alone = shared_run(tmp_path / "one")
    torch.testing.assert_close(torch.tensor(history), torch.tensor(alone.history), rtol=1e-5, atol=0)
    torch.testing.assert_close(torch.tensor(held_out), torch.tensor(alone.held_out), rtol=1e-5, atol=0)
    for ours, theirs in zip(values, alone.weights.values(), strict=True):
        torch.testing.assert_close(torch.from_numpy(ours), theirs.dense(), rtol=1e-3, atol=1e-5)
