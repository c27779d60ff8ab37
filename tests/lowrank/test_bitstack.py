"""BitStack: every block brings the matrix nearer, a block of full rank is exact, and the file holds what it says."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.checkpoint import Checkpoint
from compress.loader import KINDS as MODULES
from compress.lowrank.bitstack import BitStack, input_scale, leading_factors
from compress.skeleton import Skeleton
from compress.stats import LinearStats
from compress.weights import Quantized, SignedLowRank, prefix


def stats_of(n_inputs: int, n_tokens: int = 300) -> LinearStats:
    stats = LinearStats(n_inputs, {"sqnorm"})
    stats.add(torch.randn(n_tokens, n_inputs) * torch.linspace(0.2, 3, n_inputs))
    return stats.finish()


def stack_of(weight: torch.Tensor, stats: LinearStats, **chosen) -> SignedLowRank:
    found = BitStack(order="level", **chosen).linear(weight, stats, None)
    assert isinstance(found, SignedLowRank)
    return found


def residuals(stack: SignedLowRank, weight: torch.Tensor, scale: torch.Tensor) -> list[float]:
    return [float(((weight - prefix(stack, n + 1).dense(torch.float32)) * scale).norm()) for n in range(stack.n_parts)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_left_falls_with_every_block(dtype):
    weight, stats = torch.randn(72, 48).to(dtype), stats_of(48)
    scale = input_scale(stats)
    left = residuals(stack_of(weight, stats, blocks=8), weight.float(), scale)
    assert left[0] < (weight.float() * scale).norm()
    assert all(after < before for before, after in pairwise(left))


def test_each_block_is_the_best_of_its_rank_for_the_magnitudes():
    """In the scaled coordinates: sign(R) * |R| is R, and what a block leaves is the tail of |R|'s spectrum."""
    weight, stats = torch.randn(60, 40), stats_of(40)
    scale = input_scale(stats)
    stack = stack_of(weight, stats, blocks=3, rank=4)
    for count in range(3):
        rest = weight if count == 0 else weight - prefix(stack, count).dense()
        rest = (rest * scale).double()
        assert (torch.where(rest < 0, -1, 1) * rest.abs()).equal(rest)
        tail = torch.linalg.svdvals(rest.abs())[4:].square().sum().sqrt()
        after = ((weight - prefix(stack, count + 1).dense()) * scale).double().norm()
        assert float(after) == pytest.approx(float(tail), rel=0.02)  # a random spectrum hardly falls: the hardest to search


def test_one_block_of_full_rank_is_exact():
    weight = torch.randn(48, 32)
    found = stack_of(weight, stats_of(32), blocks=1, rank=1000)
    assert found.rank == 32
    torch.testing.assert_close(found.dense(), weight, rtol=0, atol=2e-5)


def test_leading_factors_of_a_low_rank_matrix_are_exact():
    matrix = torch.rand(50, 5) @ torch.rand(5, 30)
    down, up = leading_factors(matrix, 5)
    torch.testing.assert_close(up @ down, matrix, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(up.norm(dim=0), down.norm(dim=1), rtol=1e-4, atol=1e-5)


def test_inputs_without_tokens_or_signal():
    silent = LinearStats(32, {"sqnorm"}).finish()
    found = stack_of(torch.randn(16, 32), silent, blocks=2)
    assert found.dense().isfinite().all()
    stats = LinearStats(32, {"sqnorm"})
    stats.add(torch.cat([torch.randn(50, 30), torch.zeros(50, 2)], 1))
    assert (input_scale(stats.finish()) > 0).all()
    assert not stack_of(torch.zeros(16, 32), stats, blocks=2).dense().any()


@pytest.mark.parametrize(
    ("shape", "rank"),
    [((4096, 4096), 16), ((11008, 4096), 16), ((1024, 1024), 4), ((256, 256), 1), ((640, 256), 1), ((64, 64), 1)],
)
def test_a_block_costs_little_more_than_a_bit(shape, rank):
    step = BitStack()
    found = step.outline(torch.empty(shape, dtype=torch.bfloat16, device="meta"), LinearStats(shape[1], ()), None)
    assert isinstance(found, SignedLowRank) and found.rank == rank and found.n_parts == 16
    bits = 8 * prefix(found, 1).nbytes / (shape[0] * shape[1])
    assert bits == pytest.approx(1 + 16 * rank * sum(shape) / (shape[0] * shape[1]))
    assert bits < 1.16 or rank == 1
    sizes = [prefix(found, count).nbytes for count in range(1, 17)]
    assert sizes == [count * sizes[0] for count in range(1, 17)]


@given(st.integers(1, 9), st.integers(1, 11), st.integers(1, 3), st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_files_hold_the_same_matrix_and_readers_compute_it(n_outputs, n_inputs, rank, n_blocks):
    packed = torch.randint(0, 256, (n_blocks, -(-n_outputs * n_inputs // 8)), dtype=torch.uint8)
    stack = SignedLowRank(
        packed, torch.randn(n_blocks, n_outputs, rank), torch.randn(n_blocks, rank, n_inputs), (0.5,) * (n_blocks - 1)
    )
    module = MODULES[stack.kind](n_inputs, n_outputs, False, **stack.sizes(), children={})
    for name, tensor in stack.tensors().items():
        assert getattr(module, name).shape == tensor.shape and getattr(module, name).dtype == tensor.dtype
        getattr(module, name).data = tensor
    assert module.matrix().equal(stack.dense())
    again = type(stack).assemble(stack.shape, stack.sizes(), stack.tensors(), {})
    assert again.dense().equal(stack.dense()) and again.priorities == stack.priorities
    assert stack.nbytes == sum(tensor.nbytes for tensor in stack.tensors().values())
    outlined = stack.map(lambda tensor: tensor.to("meta"))
    assert outlined.nbytes == stack.nbytes and outlined.dense().shape == stack.shape


def test_removed_weights_are_refused():
    mask = torch.rand(16, 32) > 0.5
    for call in (BitStack().linear, BitStack().outline):
        with pytest.raises(ValueError, match="zeros of a pruned layer"):
            call(torch.randn(16, 32), stats_of(32), mask)


def test_a_pass_after_it_sees_one_matrix(llama, run_stages, assert_reloads):
    artifact = run_stages(llama, ["bitstack:blocks=2", "rtn:targets=*.down_proj"])
    assert_reloads(artifact)
    kinds = {local: type(weight) for local, weight in Skeleton(Checkpoint(artifact)).read_weights(0).items()}
    assert kinds.pop("mlp.down_proj") is Quantized and set(kinds.values()) == {SignedLowRank}
