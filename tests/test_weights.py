"""Representations: dense values, sizes, composition, training views, kept structure."""

import pytest
import torch

from compress.lowrank.svd import SVD
from compress.prune.magnitude import Magnitude
from compress.quant.rtn import RTN
from compress.stats import LinearStats
from compress.weights import Dense, LowRank, Masked, Quantized, Weight, assert_structure_kept, structure

NO_STATS = LinearStats(32, ())


def every_kind() -> dict[str, Weight]:
    torch.manual_seed(0)
    weight, mask = torch.randn(16, 32), torch.rand(16, 32) < 0.5
    quantizer = RTN(bits=4, group_size=16, symmetric=False)
    down, up = torch.randn(4, 32), torch.randn(16, 4)
    down_mask = torch.rand(4, 32) < 0.5
    return {
        "dense": Dense(weight),
        "masked": Masked(Dense(weight * mask), mask),
        "quantized": quantizer.linear(weight, NO_STATS, None),
        "masked quantized": quantizer.linear(weight * mask, NO_STATS, mask),
        "low rank": LowRank(Dense(down), Dense(up)),
        "masked low rank": LowRank(Masked(Dense(down * down_mask), down_mask), Dense(up)),
        "quantized low rank": LowRank(quantizer.linear(down, NO_STATS, None), quantizer.linear(up, NO_STATS, None)),
        "masked quantized low rank": LowRank(quantizer.linear(down * down_mask, NO_STATS, down_mask), Dense(up)),
    }


KINDS = list(every_kind())


@pytest.mark.parametrize("kind", KINDS)
def test_rebuilding_from_its_parameters_is_the_identity(kind):
    weight = every_kind()[kind]
    assert weight.shape == (16, 32) == tuple(weight.dense().shape)
    rebuilt = weight.rebuild(weight.parameters())
    assert torch.equal(rebuilt.dense(), weight.dense()) and rebuilt.nbytes == weight.nbytes
    assert weight.dense(torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_training_moves_the_values_and_keeps_the_structure(kind):
    weight = every_kind()[kind]
    parameters = {name: value.clone().requires_grad_() for name, value in weight.parameters().items()}
    weight.rebuild(parameters).dense().square().sum().backward()
    moved = {}
    for name, value in parameters.items():
        assert value.grad is not None and value.grad.count_nonzero() > 0
        moved[name] = (value + 0.01).detach()
    trained = weight.rebuild(moved)
    assert not torch.equal(trained.dense(), weight.dense())
    assert_structure_kept("layer", structure(weight), trained)


@pytest.mark.parametrize("kind", KINDS)
def test_map_reaches_every_tensor(kind):
    weight = every_kind()[kind]
    outline = weight.map(lambda tensor: tensor.to("meta"))
    assert type(outline) is type(weight) and outline.nbytes == weight.nbytes
    assert all(value.is_meta for value in outline.parameters().values())


def test_quantized_values():
    codes = torch.tensor([[-8, 0, 7, 1]], dtype=torch.int8)
    symmetric = Quantized(codes, torch.tensor([[0.5, 2.0]]), None, 4)
    assert symmetric.dense().tolist() == [[-4.0, 0.0, 14.0, 2.0]] and symmetric.group_size == 2
    shifted = Quantized(codes, torch.tensor([[0.5, 2.0]]), torch.tensor([[-8, 1]], dtype=torch.int8), 4)
    assert shifted.dense().tolist() == [[0.0, 4.0, 12.0, 0.0]]
    assert shifted.masked(torch.tensor([[True, False, False, True]])).dense().tolist() == [[0.0, 0.0, 0.0, 0.0]]


def test_file_sizes():
    weight, mask = torch.randn(16, 32).to(torch.bfloat16), torch.zeros(16, 32, dtype=torch.bool)
    mask[:, :8] = True
    assert Dense(weight).nbytes == 16 * 32 * 2
    masked = Masked(Dense(weight * mask), mask)
    assert masked.nbytes == 16 * 32 * 2 and masked.numel == 128
    assert masked.ideal_nbytes == 128 * 2 + 16 * 32 / 8
    # 8 four-bit codes to a 32-bit word, two scales a row, and the shape.
    symmetric = RTN(group_size=16).linear(weight, NO_STATS, None)
    assert symmetric.nbytes == 16 * 4 * 4 + 16 * 2 * 2 + 16
    assert symmetric.ideal_nbytes == 16 * 32 / 2 + 16 * 2 * 2
    # Three-bit codes without gaps: 32 inputs take 3 words, and 16 outputs' zero-points 2 words a group.
    shifted = RTN(bits=3, group_size=16, symmetric=False).linear(weight, NO_STATS, None)
    assert shifted.nbytes == 16 * 3 * 4 + 16 * 2 * 2 + 2 * 2 * 4 + 16
    factors = SVD(rank=4).linear(weight, NO_STATS, None)
    assert factors.nbytes == 4 * (16 + 32) * 2 and factors.numel == 4 * 48


def test_masks_nest():
    first, second = torch.rand(16, 32) < 0.5, torch.rand(16, 32) < 0.5
    for weight in (Dense(torch.randn(16, 32)), every_kind()["quantized"]):
        both = weight.masked(first).masked(second)
        assert isinstance(both, Masked) and torch.equal(both.kept, first & second)
        assert torch.equal(both.dense(), weight.dense() * (first & second))
    with pytest.raises(TypeError, match="parts"):
        every_kind()["low rank"].masked(first)


def test_lost_structure_is_noticed():
    weight = torch.randn(16, 32)
    masked = Magnitude(sparsity=0.5).linear(weight, NO_STATS, None)
    sparser = Magnitude(sparsity=0.7).linear(masked.dense(), NO_STATS, masked.mask)
    assert_structure_kept("layer", structure(masked), sparser)
    with pytest.raises(RuntimeError, match="mask"):
        assert_structure_kept("layer", structure(masked), Dense(weight))
    with pytest.raises(RuntimeError, match="mask"):
        assert_structure_kept("layer", structure(sparser), masked)
    assert masked.mask is not None
    with pytest.raises(RuntimeError, match="not zero"):
        assert_structure_kept("layer", structure(masked), Masked(Dense(weight), masked.mask))
    factors = SVD(rank=4).linear(weight, NO_STATS, None)
    assert_structure_kept("layer", structure(factors), factors)
    for wrong in (SVD(rank=6).linear(weight, NO_STATS, None), Dense(weight)):
        with pytest.raises(RuntimeError, match="rank"):
            assert_structure_kept("layer", structure(factors), wrong)
