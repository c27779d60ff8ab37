"""Gradual pruning: its schedule, its masks, and that a run which was stopped ends with the same ones."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from compress.distill.losses import cross_entropy, per_token
from compress.errors import BadInput
from compress.filling import fill_linear
from compress.loader import build
from compress.pipeline import plan
from compress.prune.gradual import Gradual
from compress.prune.thinned import Thinned
from compress.recipe import Recipe
from compress.train import TrainResult, train
from compress.train_pass import Signal
from compress.weights import Dense, LowRank, Masked, Quantized, Weight, spec_of

VOCABULARY = 128


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(0, VOCABULARY, (32, 16), generator=torch.Generator().manual_seed(0))


def step(**settings) -> Gradual:
    return Gradual(**{"steps": 12, "batch_size": 4, "learning_rate": 1e-2, "every": 2, "sparsity": 0.75} | settings)


def fit(model, tokens, directory: Path, gradual: Gradual, how=Dense, progress=lambda *_: None, save_every=50) -> TrainResult:
    """Train a copy of the model; how: the weight of each linear layer from its matrix."""
    student = copy.deepcopy(model)
    linears = {name: m for name, m in student.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"}
    weights = {name: how(module.weight.data) for name, module in linears.items()}
    for name, weight in weights.items():
        if spec := spec_of(weight):
            module = build(spec, weight.shape[1], weight.shape[0], False)
            fill_linear(module, weight, "cpu", torch.float32)
            student.set_submodule(name, module)
    teacher = model if gradual.needs.teacher else None
    return train(student, weights, teacher, tokens, gradual, seed=0, device="cpu", directory=directory, progress=progress,
                 save_every=save_every)  # fmt: skip


def test_schedule():
    gradual = Gradual(sparsity=0.8, steps=101, start=0.0, end=1.0)
    assert gradual.span == (0, 100)
    rates = [gradual.sparsity_at(index) for index in range(101)]
    assert rates[0] == 0 and rates[-1] == 0.8 and rates[50] == pytest.approx(0.7)
    assert all(earlier < later for earlier, later in pairwise(rates))
    part = Gradual(sparsity=0.8, steps=100, start=0.2, end=0.6)
    assert part.span == (20, 60) and {part.sparsity_at(index) for index in range(21)} == {0.0}
    assert part.sparsity_at(40) == pytest.approx(0.7) and {part.sparsity_at(index) for index in range(60, 100)} == {0.8}


def masks(gradual: Gradual, values: Tensor, indices: Iterable[int]) -> dict[int, Tensor | None]:
    """What is chosen of these values before each of the steps."""
    chosen = {index: gradual.choose(index, Thinned.start(values, None)) for index in indices}
    return {index: None if weight is None else weight.mask for index, weight in chosen.items()}


@pytest.mark.parametrize(
    "settings", [{"steps": 1}, {"steps": 2}, {"steps": 7, "end": 1.0}, {"steps": 9, "start": 0.5, "end": 0.5}]
)
def test_the_last_choice_comes_before_the_last_step_and_is_exact(settings):
    gradual = Gradual(sparsity=0.6, every=4, **settings)
    values, last = torch.randn(10, 20), gradual.span[1]
    chosen = masks(gradual, values, range(gradual.steps))
    assert last < gradual.steps and chosen[last] is not None and int(chosen[last].sum()) == 80
    assert all(mask is None for index, mask in chosen.items() if index > last)


def test_masks_follow_the_schedule_and_the_pattern():
    values = torch.randn(8, 24)
    gradual = Gradual(sparsity=0.75, steps=100, end=0.8, every=10, pattern="row")
    chosen = masks(gradual, values, range(100))
    assert [index for index, mask in chosen.items() if mask is not None] == [10, 20, 30, 40, 50, 60, 70, 80]
    for index, mask in chosen.items():
        assert mask is None or set((~mask).sum(1).tolist()) == {int(24 * gradual.sparsity_at(index))}
    groups = Gradual(pattern="1:4", steps=100, end=0.8, every=10)
    kept = [mask.unflatten(1, (-1, 4)).sum(-1) for mask in masks(groups, values, range(10, 90, 10)).values()]
    assert all(len(set(counts.flatten().tolist())) == 1 for counts in kept)
    assert [int(counts[0, 0]) for counts in kept] == [4, 3, 2, 2, 2, 2, 2, 1]


@pytest.mark.parametrize("pattern", ["tensor", "row", "1:4"])
def test_what_is_kept_is_exact(pattern, model, tokens, tmp_path):
    result = fit(model, tokens, tmp_path, step(pattern=pattern))
    for name, weight in result.weights.items():
        assert isinstance(weight, Masked) and isinstance(weight.inner, Dense)
        removed = (~weight.kept).unflatten(1, (-1, 4)).sum(-1) if pattern == "1:4" else (~weight.kept).sum(1)
        assert int((~weight.kept).sum()) == weight.kept.numel() * 3 // 4 and weight.dense()[~weight.kept].count_nonzero() == 0
        assert pattern == "tensor" or len(set(removed.flatten().tolist())) == 1
        assert not weight.dense().equal(model.get_submodule(name).weight * weight.kept), "kept weights were trained"
    assert result.history[-1] < max(result.history)


def test_removed_weights_may_return(model, tokens, tmp_path):
    seen: dict[int, list[Tensor]] = {}

    class Watched(Gradual):
        def choose(self, index: int, weight: Weight) -> Weight | None:
            if (chosen := super().choose(index, weight)) is not None:
                seen.setdefault(index, []).append(chosen.mask)
            return chosen

    watched = Watched(**step(learning_rate=0.05, steps=24, every=1, end=1.0).model_dump())
    final = fit(model, tokens, tmp_path, watched).weights
    assert all(torch.equal(weight.mask, mask) for weight, mask in zip(final.values(), seen[watched.span[1]], strict=True))
    pairs = [(a, b) for index in list(seen)[1:] for a, b in zip(seen[index - 1], seen[index], strict=True)]
    assert any(bool((b & ~a).any()) for a, b in pairs)


def test_earlier_masks_ranks_and_grids_are_kept(model, tokens, tmp_path):
    generator = torch.Generator().manual_seed(3)
    earlier: dict[int, Tensor] = {}

    def how(weight: Tensor) -> Weight:
        kind = len(earlier) % 4
        earlier[len(earlier)] = mask = torch.rand(weight.shape, generator=generator) < (0.1 if kind == 1 else 0.6)
        if kind == 2:
            scale = weight.abs().amax(1, keepdim=True) / 3
            return Quantized((weight / scale).round().to(torch.int8), scale, None, 3)
        return LowRank(Dense(weight[:8].clone()), Dense(weight[:, :8].clone())) if kind == 3 else Dense(weight).masked(mask)

    weights = fit(model, tokens, tmp_path, step(), how).weights.values()
    for kind, (weight, mask) in enumerate(zip(weights, earlier.values(), strict=True)):
        if kind % 4 == 2:
            assert isinstance(weight, Quantized)
        elif kind % 4 == 3:
            assert isinstance(weight, LowRank)
            assert all(int(part.mask.sum()) == part.mask.numel() // 4 for part in (weight.down, weight.up))
        else:
            assert not (weight.mask & ~mask).any()
            assert int(weight.mask.sum()) == min(int(mask.sum()), mask.numel() // 4)


def test_an_interrupted_run_ends_with_the_same_masks(model, tokens, tmp_path):
    gradual = step(every=4, end=0.7, learning_rate=0.05)

    def stop_at_seven(done: int, *_) -> None:
        if done == 7:
            raise KeyboardInterrupt

    expected = fit(model, tokens, tmp_path / "once", gradual, save_every=6)  # saved between two choices of masks
    with pytest.raises(KeyboardInterrupt):
        fit(model, tokens, tmp_path / "twice", gradual, progress=stop_at_seven, save_every=6)
    seen: list[int] = []
    result = fit(model, tokens, tmp_path / "twice", gradual, progress=lambda done, *_: seen.append(done), save_every=6)
    assert seen == [6, *range(7, 13)] and result.history == expected.history
    again = fit(model, tokens, tmp_path / "twice", gradual)
    for name, weight in expected.weights.items():
        for other in (result.weights[name], again.weights[name]):
            assert other.mask.equal(weight.mask) and other.dense().equal(weight.dense())


def test_next_token_loss_needs_no_teacher(model, tokens, tmp_path):
    gradual = step(objective="ce", steps=3, batch_size=32)
    assert not gradual.needs.teacher and step().needs.teacher
    with torch.no_grad():
        hidden = model.get_decoder()(tokens).last_hidden_state[:, :-1].flatten(0, 1)
        expected = nn.functional.cross_entropy(model.lm_head(hidden), tokens[:, 1:].flatten())
        losses = per_token(cross_entropy, Signal(hidden, model.lm_head), None, tokens[:, 1:].flatten(), chunk=100)
    torch.testing.assert_close(losses.mean(), expected)
    assert fit(model, tokens, tmp_path, gradual).history[0] == pytest.approx(float(expected), rel=1e-5)


def test_a_plan_knows_the_masks(llama):
    def predicted(*passes: str) -> int:
        return plan(Recipe.parse({"model": str(llama), "passes": list(passes)})).predicted_bytes

    assert predicted("gradual:sparsity=0.75", "pack") == predicted("magnitude:sparsity=0.75", "pack") < predicted("gradual")
    with pytest.raises(BadInput, match="multiples of 7"):
        predicted("gradual:pattern=2:7")


def test_settings():
    assert Gradual(pattern="2:4").sparsity == 0.5
    for wrong in ({"pattern": "3:2"}, {"pattern": "2:4", "sparsity": 0.7}, {"start": 0.7, "end": 0.5}, {"objective": "mse"}):
        with pytest.raises(ValidationError):
            Gradual(**wrong)
