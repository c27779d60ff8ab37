"""LoftQ: its residual in closed form, its limits, masks and factors, and training afterwards (INT2.1)."""

import pytest
import torch
from safetensors.torch import load_file

from compress.apply import apply, outline
from compress.checkpoint import Checkpoint
from compress.prune.magnitude import Magnitude
from compress.quant.loftq import LoftQ
from compress.quant.rtn import RTN
from compress.skeleton import Skeleton
from compress.stats import LinearStats
from compress.verify import PROBE
from compress.weights import Dense, LowRank, Masked, Quantized, Sum, Weight, leaves

NO_STATS = LinearStats(96, ())


def matrix(dtype: torch.dtype = torch.float64, shape: tuple[int, int] = (64, 96)) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def test_one_round_leaves_the_discarded_singular_values():
    weight = matrix()
    result = LoftQ(bits=2, group_size=32, rank=8, rounds=1).linear(weight, NO_STATS, None)
    assert isinstance(result, Sum)
    grid, low = result.parts
    assert isinstance(grid, Quantized) and isinstance(low, LowRank) and low.rank == 8
    nearest = RTN(bits=2, group_size=32).linear(weight, NO_STATS, None)
    assert grid.dense().equal(nearest.dense())
    residual = weight - grid.dense() - low.up.dense() @ low.down.dense()
    discarded = torch.linalg.svdvals(weight - grid.dense())[8:].square().sum()
    torch.testing.assert_close(residual.square().sum(), discarded, rtol=1e-10, atol=0)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_more_rounds_are_never_worse(bits):
    weight = matrix(torch.float32)
    errors = [
        (LoftQ(bits=bits, group_size=32, rank=12, rounds=n).linear(weight, NO_STATS, None).dense() - weight).norm()
        for n in (1, 2, 5)
    ]
    assert errors[0] >= errors[1] >= errors[2]
    assert errors[2] < errors[0] or bits == 2  # where a range that spans the extremes has too few points to gain by


def test_rank_zero_is_rounding_to_nearest():
    weight = matrix(torch.float32)
    for symmetric in (True, False):
        nearest = RTN(bits=3, symmetric=symmetric).linear(weight, NO_STATS, None)
        result = LoftQ(bits=3, symmetric=symmetric, rank=0).linear(weight, NO_STATS, None)
        assert isinstance(result, Quantized) and result.dense().equal(nearest.dense())


def test_a_matrix_on_its_grid_needs_no_correction():
    weight = RTN(bits=4, group_size=32).linear(matrix(torch.float32), NO_STATS, None).dense()
    result = LoftQ(bits=8, group_size=32, rank=4).linear(torch.zeros_like(weight), NO_STATS, None)
    assert result.dense().count_nonzero() == 0
    twice = LoftQ(bits=8, group_size=32, rank=4).linear(weight, NO_STATS, None)
    assert (twice.dense() - weight).norm() < 0.02 * weight.norm()


def test_small_and_masked_matrices_are_only_rounded(caplog):
    factors = LowRank(Dense(matrix(torch.float32, (8, 96))), Dense(matrix(torch.float32, (64, 8))))
    result = apply(LoftQ(bits=3, rank=16), factors, NO_STATS)
    assert isinstance(result, LowRank) and isinstance(result.down, Quantized) and isinstance(result.up, Quantized)
    pruned = Magnitude(sparsity=0.5).linear(matrix(torch.float32), NO_STATS, None)
    masked = apply(LoftQ(bits=3), pruned, NO_STATS)
    assert isinstance(masked, Masked) and isinstance(masked.inner, Quantized) and "fill its zeros" in caplog.text
    assert masked.dense().equal(apply(RTN(bits=3), pruned, NO_STATS).dense())


@pytest.mark.parametrize("settings", [{}, {"rank": 3, "symmetric": False}, {"rank": 60}, {"rank": 0}])
def test_outline_has_the_result_s_sizes(settings):
    weight, step = matrix(torch.float32), LoftQ(**settings)
    for before in (Dense(weight), Dense(weight).masked(weight > 0)):
        result, outlined = apply(step, before, NO_STATS), outline(step, before.map(lambda tensor: tensor.to("meta")))
        assert (type(outlined), outlined.nbytes) == (type(result), result.nbytes)


def weights_of(directory) -> dict[str, Weight]:
    skeleton = Skeleton(Checkpoint(directory))
    return {f"{index}.{k}": w for index in range(len(skeleton.blocks)) for k, w in skeleton.read_weights(index).items()}


def grids_of(weights: dict[str, Weight]) -> dict[str, Quantized]:
    found = [leaf for name, weight in weights.items() for leaf in leaves(name, weight)]
    return {name: leaf for name, leaf in found if isinstance(leaf, Quantized)}


def test_training_afterwards_keeps_the_codes_and_lowers_the_loss(llama, make_pass, run_stages, assert_reloads, reload):
    """The recipe of INT2.1: the codes stay, the factors learn the uncompressed model's predictions."""
    start = run_stages(llama, [make_pass("loftq", bits=2, group_size=16, rank=4)])
    step = make_pass("logit_kd", steps=60, learning_rate=1e-2, trains="weights")
    trained = run_stages(llama, [make_pass("loftq", bits=2, group_size=16, rank=4), step])
    assert_reloads(trained, atol=1e-5)
    before, after = weights_of(start), weights_of(trained)
    grids, later = grids_of(before), grids_of(after)
    assert len(grids) == 14 and grids.keys() == later.keys()
    for name, grid in grids.items():
        assert later[name].codes.equal(grid.codes), name
    assert all(not after[name].dense().equal(weight.dense()) for name, weight in before.items())

    tokens = load_file(trained / PROBE)["tokens"]

    def divergence(directory) -> float:
        with torch.no_grad():
            teacher, student = (reload(d)(input_ids=tokens).logits.log_softmax(-1) for d in (llama, directory))
        return float((teacher.exp() * (teacher - student)).sum(-1).mean())

    assert divergence(trained) < 0.85 * divergence(start)
