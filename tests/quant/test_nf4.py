"""NF4: its codebook from the normal distribution, the library's rounding against one written from its description."""

from __future__ import annotations

from importlib.util import find_spec
from statistics import NormalDist

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress import methods
from compress.apply import apply, outline
from compress.errors import BadInput
from compress.prune.magnitude import Magnitude
from compress.quant.nf4 import NF4
from compress.stats import LinearStats
from compress.weights import Blockwise, Dense, LowRank, Masked

pytestmark = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")

PUBLISHED = (
    -1, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0, 0.0795803, 0.1609302, 0.2461123,
    0.3379152, 0.4407098, 0.5626170, 0.7229568, 1,
)  # fmt: skip


def levels() -> Tensor:
    """The codebook by its construction, float64: quantiles of the normal distribution, an offset from its ends."""
    offset, quantile = 0.9677083, NormalDist().inv_cdf
    positive = [quantile(p) for p in torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1].tolist()]
    negative = [-quantile(p) for p in torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1].tolist()]
    book = torch.tensor(sorted([*positive, *negative, 0.0]), dtype=torch.float64)
    return book / book.max()


def round_to(book: Tensor, weight: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Codes (out, in) and scales (blocks,): nearest levels of an ascending codebook, halves going down."""
    scales = torch.stack([block.abs().max() for block in weight.flatten().split(block_size)])
    spread = scales.repeat_interleave(block_size)[: weight.numel()]
    shares = torch.where(spread > 0, weight.flatten() / spread, 0.0)
    thresholds = (book[1:] + book[:-1]) / 2
    return (shares.unsqueeze(1) > thresholds).sum(1).reshape(weight.shape), scales


def quantize(weight: Tensor, mask: Tensor | None = None, **options) -> Blockwise:
    found = NF4(**options).linear(weight, LinearStats(weight.shape[1], ()), mask)
    inner = found.inner if isinstance(found, Masked) else found
    assert isinstance(inner, Blockwise)
    return inner


def test_codebook_is_the_published_one_and_its_construction():
    book = quantize(torch.randn(2, 64)).levels
    torch.testing.assert_close(book.double(), levels(), rtol=0, atol=1e-6)
    torch.testing.assert_close(book, torch.tensor(PUBLISHED), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(32, 128), (7, 100), (5, 7)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_size", [32, 64, 256])
def test_codes_and_scales_are_those_of_an_independent_rounding(shape, dtype, block_size):
    """Blocks run on from row to row; the last may be short."""
    weight = (0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(dtype)
    found = quantize(weight, block_size=block_size)
    codes, scales = round_to(found.levels, weight.float(), block_size)
    assert found.absmax.equal(scales) and found.codes.equal(codes.to(torch.uint8))
    expected = found.levels[codes] * scales.repeat_interleave(block_size)[: weight.numel()].reshape(shape)
    assert found.dense(torch.float32).equal(expected) and found.dense().equal(expected.to(dtype))


def test_thresholds_are_midpoints():
    book = quantize(torch.randn(1, 64)).levels
    middles = (book[1:] + book[:-1]) / 2
    assert middles[-3:].tolist() == pytest.approx([0.5016634, 0.6427869, 0.8614784], abs=1e-6)
    assert float(middles[0]) == pytest.approx(-0.8480964, abs=1e-6)
    step = 1e-5
    for below, middle in enumerate(middles):
        weight = torch.full((1, 64), 1.0)
        weight[0, 1], weight[0, 2] = middle - step, middle + step
        assert quantize(weight).codes[0, 1:3].tolist() == [below, below + 1]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 90), st.integers(0, 2**32 - 1))
def test_one_weight_of_every_block_is_exact(n_rows, n_inputs, seed):
    weight = torch.randn(n_rows, n_inputs, generator=torch.Generator().manual_seed(seed))
    found = quantize(weight)
    for block, dense in zip(weight.flatten().split(64), found.dense().flatten().split(64), strict=True):
        extreme = block.abs().argmax()
        assert dense[extreme] == block[extreme]


def test_levels_of_any_scale_stay_as_they_are():
    book = quantize(torch.randn(1, 64)).levels
    codes = torch.randint(16, (24, 64), generator=torch.Generator().manual_seed(0))
    codes[:, 3] = 15
    scale = torch.rand(24, 1) * torch.tensor(10.0) ** torch.arange(-12, 12).unsqueeze(1)
    weight = book[codes] * scale
    found = quantize(weight)
    assert found.codes.equal(codes.to(torch.uint8)) and found.dense().equal(weight)
    assert quantize(found.dense()).dense().equal(found.dense())


@pytest.mark.parametrize(("double_quant", "expected"), [(False, 4.5), (True, 4.127)])
def test_bits_per_weight(double_quant, expected):
    found = quantize(torch.randn(256, 1024), double_quant=double_quant)
    assert 8 * found.ideal_nbytes / found.numel == pytest.approx(expected, abs=1e-3)
    tables = 8 * (64 + (1024 if double_quant else 0) + len(found.state)) / found.numel  # fades in larger matrices
    assert 8 * found.nbytes / found.numel == pytest.approx(expected + tables, abs=1e-3)


def test_double_quantized_scales_are_close_and_follow_the_dynamic_map():
    weight = torch.randn(64, 1024) * torch.rand(64, 1)
    plain, nested = quantize(weight), quantize(weight, double_quant=True)
    assert nested.codes.equal(plain.codes) and nested.absmax.dtype == torch.uint8
    assert nested.nested_offset == pytest.approx(float(plain.absmax.mean()), rel=1e-6)
    centred = plain.absmax - nested.nested_offset
    largest = torch.stack([block.abs().max() for block in centred.split(256)])
    torch.testing.assert_close(nested.nested_absmax, largest)
    assert nested.nested_levels.equal(nested.nested_levels.sort().values) and nested.nested_levels.max() == 1
    shares = centred / largest.repeat_interleave(256)[: len(centred)]
    nearest = (shares.unsqueeze(1) - nested.nested_levels).abs().min(1).values
    found = (nested.scale[0] - plain.absmax).abs()
    torch.testing.assert_close(found, nearest * largest.repeat_interleave(256), rtol=0, atol=1e-4)
    assert (nested.dense() - plain.dense()).norm() < 0.02 * plain.dense().norm()


@pytest.mark.parametrize("double_quant", [False, True])
def test_a_mask_stays_and_pruning_keeps_the_codes(double_quant):
    weight, mask = torch.randn(16, 96), torch.rand(16, 96) > 0.5
    found = NF4(double_quant=double_quant).linear(weight, LinearStats(96, ()), mask)
    assert isinstance(found, Masked) and not found.dense()[~mask].any() and found.mask.equal(mask)
    assert bool((found.dense()[mask] != 0).float().mean() > 0.9)
    stats = LinearStats(96, ())
    pruned = apply(Magnitude(sparsity=0.7), apply(NF4(double_quant=double_quant), Dense(weight), stats), stats)
    assert isinstance(pruned, Masked) and isinstance(pruned.inner, Blockwise)
    before = quantize(weight, double_quant=double_quant)
    assert pruned.dense()[pruned.mask].equal(before.dense()[pruned.mask]) and not pruned.dense()[~pruned.mask].any()


def test_scales_are_what_trains_unless_they_are_quantized():
    found = quantize(torch.randn(8, 64))
    assert found.parameters().keys() == {"absmax"} and quantize(torch.randn(8, 64), double_quant=True).parameters() == {}
    scales = found.absmax.clone().requires_grad_()
    found.rebuild({"absmax": scales}).dense().square().sum().backward()
    torch.testing.assert_close(scales.grad, 2 * scales.detach() * found.levels[found.codes.int()].square().sum(1))
    assert found.rebuild({"absmax": 2 * found.absmax}).dense().equal(2 * found.dense())


@pytest.mark.parametrize("options", [{}, {"double_quant": True}, {"block_size": 128}], ids=str)
def test_outline_has_the_shapes_and_size(options):
    step = NF4(**options)
    for weight in (Dense(torch.randn(40, 72)), LowRank(Dense(torch.randn(8, 72)), Dense(torch.randn(40, 8)))):
        found = apply(step, weight, LinearStats(72, ()))
        planned = outline(step, weight.map(lambda tensor: tensor.to("meta")))
        assert (type(planned), planned.shape, planned.dtype) == (type(found), found.shape, found.dtype)
        assert abs(planned.nbytes - found.nbytes) < 50  # a nested offset has more digits or fewer


def test_what_cannot_be_rounded():
    assert not quantize(torch.zeros(4, 64), double_quant=True).dense().any()
    with pytest.raises(ValueError, match="not finite"):
        quantize(torch.tensor([[1.0, float("nan")] * 32]))
    with pytest.raises(ValueError, match="not finite"):
        quantize(torch.tensor([[1.0, float("inf")] * 32]), double_quant=True)
    with pytest.raises(BadInput, match="block_size"):
        methods.build("nf4", {"block_size": 48})
