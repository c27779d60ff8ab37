"""Channel permutation: the function stays in every architecture, statistics follow, and a pattern N:M never retains less."""

from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from compress.block import Block
from compress.checkpoint import Checkpoint
from compress.prune.assignment import assign
from compress.prune.permute import Permute, better_order, retained
from compress.prune.ria import RIA
from compress.prune.wanda import Wanda
from compress.skeleton import Skeleton
from compress.stats import OF_INPUTS, LinearStats
from compress.weights import Dense, LowRank, Masked, Weight

MOVED = {
    "llama-untied": {"self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"},
    "phi3": {"mlp.gate_up_proj", "mlp.down_proj"},
    "gpt2": {"mlp.c_fc", "mlp.c_proj"},
    "opt": {"self_attn.v_proj", "self_attn.out_proj", "fc1", "fc2"},
    "gpt_neox": {"mlp.dense_h_to_4h", "mlp.dense_4h_to_h"},
}  # by family; the others are as Llama
LLAMAS = dict.fromkeys(["mistral", "qwen2", "qwen3", "gemma2"], MOVED["llama-untied"])


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def make_block(make_checkpoint, tokens):
    """``make_block(family)`` -> (block with all layers selected and measured inputs, inputs of the block in float64)."""

    def make(family: str = "llama-untied", changed=lambda local, weight: weight) -> tuple[Block, torch.Tensor]:
        skeleton = Skeleton(Checkpoint(make_checkpoint(family)), dtype=torch.float64)
        (inputs,) = list(skeleton.embed([tokens]))
        weights = {local: changed(local, weight) for local, weight in skeleton.read_weights(0).items()}
        block = Block(skeleton, 0, weights, skeleton.read_others(0))
        block.selected = frozenset(weights)
        measure(block, inputs)
        return block, inputs

    return make


def measure(block: Block, inputs: torch.Tensor) -> None:
    for group in block.skeleton.arch.groups:
        stats = LinearStats(block.weights[group[0]].shape[1], OF_INPUTS)
        stats.add(block.layer_inputs([group[0]], inputs)[group[0]])
        block.stats |= dict.fromkeys(group, stats.finish())


def low_rank(local: str, weight: Weight) -> Weight:
    left, values, right = torch.linalg.svd(weight.dense(), full_matrices=False)
    return LowRank(Dense(values[:24, None] * right[:24]), Dense(left[:, :24].contiguous()))


@pytest.mark.parametrize("family", [*MOVED, *LLAMAS])
def test_function_stays_and_statistics_follow(family, make_block):
    block, inputs = make_block(family)
    before, outputs = dict(block.weights), block.run(inputs)
    Permute().block(block)
    moved = {local for local, weight in block.weights.items() if not weight.dense().equal(before[local].dense())}
    assert moved == (MOVED | LLAMAS)[family]
    torch.testing.assert_close(block.run(inputs), outputs, rtol=1e-10, atol=1e-10)
    assert all(block.before[local].dense().equal(weight.dense()) for local, weight in block.weights.items())
    for local, weight in block.weights.items():  # nothing but its order changes
        assert weight.dense().flatten().sort().values.equal(before[local].dense().flatten().sort().values)
    said = dict(block.stats)
    measure(block, inputs)
    for local, stats in block.stats.items():
        for name in ("sum", "sqnorm", "abssum", "absmax", "hessian", "covariance"):
            torch.testing.assert_close(said[local]._read(name), stats._read(name), rtol=1e-4, atol=1e-4)


def test_factors_move_and_masks_stay(make_block):
    block, inputs = make_block(changed=low_rank)
    before, outputs = dict(block.weights), block.run(inputs)
    Permute().block(block)
    assert isinstance(block.weights["mlp.down_proj"], LowRank)
    assert not block.weights["mlp.down_proj"].dense().equal(before["mlp.down_proj"].dense())
    torch.testing.assert_close(block.run(inputs), outputs, rtol=1e-10, atol=1e-10)
    block, _ = make_block(changed=lambda local, weight: weight.masked(weight.dense() > 0) if local == "mlp.up_proj" else weight)
    before = dict(block.weights)
    Permute(heads=False).block(block)
    assert isinstance(block.weights["mlp.up_proj"], Masked)
    assert all(weight is before[local] for local, weight in block.weights.items())


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8"])
@pytest.mark.parametrize(("key", "pruner"), [("ria", RIA), ("wanda", Wanda)])
def test_the_pruner_retains_more(pattern, key, pruner, make_block):
    def kept_scores(block: Block, local: str) -> float:
        return retained(pruner().scores(block.weights[local].dense(), block.stats[local]), pattern)

    block, _ = make_block()
    before = {local: kept_scores(block, local) for local in block.weights}
    Permute(scores=key, pattern=pattern).block(block)
    after = {local: kept_scores(block, local) for local in block.weights}
    for local, score in before.items():
        assert after[local] > score * (1.003 if local.endswith(("o_proj", "down_proj")) else 0.999999), local


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.integers(1, 8), st.sampled_from(["2:4", "1:4", "3:4", "1:2", "4:4", "2:8"]), st.integers(0, 10**6))
def test_order_never_retains_less_and_rounds_never_hurt(n_rows, n_groups, pattern, seed):
    size = int(pattern[-1])
    scores = draw(n_rows, n_groups * size, seed=seed).square()
    scores = scores if seed % 2 else (scores * 2).round()  # ties
    found = [retained(scores, pattern)]
    for rounds in (0, 1, 4):
        order = better_order(scores, pattern, rounds)
        assert order.sort().values.equal(torch.arange(len(order)))
        found.append(retained(scores[:, order], pattern))
    assert found == sorted(found)


def test_permuted_pattern_that_is_there_is_found():
    """Half of the channels matter, and lie so that 2:4 must give up most of them."""
    scores = torch.ones(6, 64)
    scores[:, :32] = 100 + draw(6, 32)
    order = better_order(scores, "2:4", 4)
    assert retained(scores[:, order], "2:4") == pytest.approx(float(scores[:, :32].sum()), rel=1e-6)
    assert retained(scores, "2:4") < 0.6 * float(scores[:, :32].sum())


def test_sets_that_the_pattern_does_not_divide_stay(make_block):
    block, _ = make_block("qwen3")  # heads of 24, 112 neurons
    before = dict(block.weights)
    Permute(pattern="3:7").block(block)
    assert block.weights["self_attn.o_proj"] is before["self_attn.o_proj"]
    assert block.weights["mlp.down_proj"] is not before["mlp.down_proj"]


def test_only_what_is_targeted_moves(make_block):
    block, _ = make_block()
    before = dict(block.weights)
    block.selected = frozenset({"mlp.down_proj", "mlp.up_proj", "self_attn.v_proj", "self_attn.o_proj"})
    Permute(heads=False).block(block)
    assert all(weight is before[local] for local, weight in block.weights.items())


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_assignment_is_the_best(n):
    for seed in range(4):
        gains = draw(n, n, seed=seed)
        gains = gains if seed else torch.zeros(n, n)
        owned = assign(gains, 1e-5)
        assert owned.sort().values.equal(torch.arange(n))
        best = max(sum(float(gains[i, j]) for i, j in enumerate(order)) for order in permutations(range(n)))
        assert float(gains[torch.arange(n), owned].sum()) >= best - 1e-4 * n


def test_assignment_of_many_is_a_permutation_and_good():
    gains = draw(200, 200)
    owned = assign(gains)
    assert owned.sort().values.equal(torch.arange(200))
    assert float(gains[torch.arange(200), owned].mean()) > 2.2  # of 200 draws the best is 2.7 on average
    with pytest.raises(ValueError, match="finite"):
        assign(torch.full((3, 3), float("nan")))


@pytest.mark.parametrize("pattern", ["row", "tensor", "4:2"])
def test_patterns_without_groups_are_refused(pattern):
    with pytest.raises(ValidationError, match="pattern"):
        Permute(pattern=pattern)
