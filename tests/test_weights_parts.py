"""Sums, outliers, whole rows and columns, and fractional grids: values, masks, sizes, files and the modules that open them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import linear

from compress.export import layers
from compress.filling import fill_linear
from compress.loader import build
from compress.quant.rtn import RTN
from compress.stats import LinearStats
from compress.stored_layers import unpack_bits
from compress.weights import (
    Affine,
    Columns,
    Dense,
    LowRank,
    Masked,
    Outliers,
    Quantized,
    Rows,
    Sum,
    Weight,
    assert_structure_kept,
    leaves,
    spec_of,
    structure,
)  # fmt: skip
from compress.weights.packing import pack_bits
from compress.weights.parts import index_dtype

NO_STATS = LinearStats(32, ())
SHAPE = (24, 32)


def affine(bits: int = 3, dtype: torch.dtype = torch.float32) -> Affine:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), SHAPE, generator=generator, dtype=torch.int8)
    scale, zero = (torch.rand(24, 2, generator=generator).to(dtype) + 0.1 for _ in range(2))
    return Affine(codes, scale, zero - 0.6, bits)


def every_kind(dtype: torch.dtype = torch.float32) -> dict[str, Weight]:
    torch.manual_seed(0)
    weight, mask = torch.randn(SHAPE).to(dtype), torch.rand(SHAPE) < 0.5
    grid = RTN(bits=3, group_size=16).linear(weight, NO_STATS, None)
    low = LowRank(Dense(torch.randn(4, 32).to(dtype)), Dense(torch.randn(24, 4).to(dtype)))
    outliers = Outliers.of(weight, weight.abs() > 2)
    columns = Columns(torch.randn(24, 3).to(dtype), torch.tensor([0, 9, 31], dtype=torch.int32), 32)
    masked_grid = grid.masked(mask)
    first_column = Columns(torch.randn(4, 1).to(dtype), columns.indices[:1], 32)
    return {
        "outliers": outliers,
        "no outliers": Outliers.of(weight, torch.zeros(SHAPE, dtype=torch.bool)),
        "columns": columns,
        "rows": Rows.of(weight, torch.arange(24) % 9 == 2),
        "no rows": Rows.of(weight, torch.zeros(24, dtype=torch.bool)),
        "affine": affine(dtype=dtype),
        "masked affine": affine(dtype=dtype).masked(mask),
        "grid and low rank": Sum((grid, low)),
        "grid and outliers": Sum((grid, outliers)),
        "grid and columns": Sum((grid, columns)),
        "affine and low rank": Sum((affine(dtype=dtype), low)),
        "low rank and rows": Sum((low, Rows.of(weight, torch.arange(24) < 3))),
        "masked grid and outliers": Sum((masked_grid, outliers)),
        "sum of sums": Sum((Sum((grid, columns)), LowRank(Sum((low.down, first_column)), low.up), Dense(weight))),
    }  # fmt: skip


KINDS = list(every_kind())


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 8), st.integers(0, 70), st.integers(0, 2**32))
def test_codes_of_any_width_are_packed_and_unpacked(bits, count, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (count,), generator=generator, dtype=torch.int8)
    packed = pack_bits(codes, bits)
    assert packed.dtype == torch.uint8 and len(packed) == -(-count * bits // 8)
    assert unpack_bits(packed, bits, count).equal(codes)
    on_meta = pack_bits(codes.to("meta"), bits)
    assert on_meta.shape == packed.shape and unpack_bits(on_meta, bits, count).shape == codes.shape


def test_bits_lie_in_the_stream_least_significant_first():
    assert pack_bits(torch.tensor([-2, -1, 0, 1, 1], dtype=torch.int8), 2).tolist() == [0b11100100, 0b11]
    assert pack_bits(torch.tensor([[3], [-4], [-3]], dtype=torch.int8), 3).tolist() == [0b01000111, 0b0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_files_hold_what_a_weight_says(kind, dtype):
    weight = every_kind(dtype)[kind]
    assert weight.shape == SHAPE == tuple(weight.dense().shape) and weight.dtype == dtype
    tensors = layers.tensors("layer", weight)
    assert sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) == weight.nbytes
    on_grids = {n: w.inner if isinstance(w, Masked) else w for n, w in leaves("layer", weight)}
    groups = {
        n: {"targets": [n], "weights": {"num_bits": w.bits, "type": "int", "strategy": "group"}}
        for n, w in on_grids.items() if isinstance(w, Quantized)
    }  # fmt: skip
    masked = {name for name, leaf in leaves("layer", weight) if isinstance(leaf, Masked)}
    source = layers.Source(tensors.__getitem__, tensors.__contains__, {"config_groups": groups}, masked.__contains__)
    again = layers.read_weight("layer", source, spec_of(weight), SHAPE)
    assert type(again) is type(weight) and again.dense().equal(weight.dense()) and again.nbytes == weight.nbytes
    assert_structure_kept("layer", structure(weight), again)
    meta = {name: tensor if name.endswith("weight_shape") else tensor.to("meta") for name, tensor in tensors.items()}
    outlined = layers.read_weight("layer", source._replace(get=meta.__getitem__, masked=lambda _: False), spec_of(weight), SHAPE)
    assert outlined.nbytes == weight.nbytes and outlined.shape == SHAPE


@pytest.mark.parametrize("kind", KINDS)
def test_modules_compute_what_the_weight_is(kind):
    weight = every_kind()[kind]
    with torch.device("meta"):
        module = build(spec_of(weight), 32, 24, True)
    state = {name: (tensor.shape, tensor.dtype) for name, tensor in module.state_dict().items()}
    fill_linear(module, weight, "cpu", torch.float32)
    x, bias = torch.randn(2, 5, 32), torch.randn(24)
    (module.up if isinstance(weight, LowRank) else module).bias = torch.nn.Parameter(bias)
    torch.testing.assert_close(module(x), linear(x, weight.dense(), bias), rtol=1e-4, atol=1e-4)
    for name, tensor in module.state_dict().items():
        assert state[name] == (tensor.shape, tensor.dtype), name


@pytest.mark.parametrize("kind", KINDS)
def test_rebuilding_training_and_moving(kind):
    weight = every_kind()[kind]
    parameters = {name: value.clone().requires_grad_() for name, value in weight.parameters().items()}
    assert weight.shares().keys() >= parameters.keys()
    assert weight.rebuild(parameters).dense().equal(weight.dense())
    weight.rebuild(parameters).dense().square().sum().backward()
    assert all(value.grad is not None and (value.grad.count_nonzero() > 0 or not value.numel()) for value in parameters.values())
    trained = weight.rebuild({name: (value + 0.01).detach() for name, value in parameters.items()})
    assert trained.dense().equal(weight.dense()) == (kind in ("no outliers", "no rows"))
    assert_structure_kept("layer", structure(weight), trained)
    outlined = weight.map(lambda tensor: tensor.to("meta"))
    assert outlined.nbytes == weight.nbytes and type(outlined) is type(weight)
    assert outlined.dense().is_meta and outlined.dense().shape == SHAPE


def test_masks():
    kinds = every_kind()
    weight, mask = torch.randn(SHAPE), torch.rand(SHAPE) < 0.1
    found = Outliers.of(weight, mask)
    assert found.mask.equal(mask) and found.dense().equal(weight * mask) and found.numel == int(mask.sum())
    columns = kinds["columns"]
    assert columns.mask is not None and columns.mask.any(0).nonzero().flatten().tolist() == [0, 9, 31]
    rows = kinds["rows"]
    assert rows.mask is not None and rows.mask.all(1).nonzero().flatten().tolist() == [2, 11, 20] and rows.mask.sum() == 96
    assert kinds["grid and outliers"].mask is None  # the grid may hold anything anywhere
    both = kinds["masked grid and outliers"]
    assert isinstance(both, Sum) and both.parts[0].mask is not None and both.parts[1].mask is not None and both.mask is not None
    assert both.mask.equal(both.parts[0].mask | both.parts[1].mask)
    assert both.dense()[~both.mask].count_nonzero() == 0


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 8), st.integers(0, 2**32), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_a_mask_puts_zero_on_a_fractional_grid(bits, seed, dtype):
    weight = affine(bits, dtype)
    mask = torch.rand(SHAPE, generator=torch.Generator().manual_seed(seed)) < 0.5
    pruned = weight.masked(mask)
    assert isinstance(pruned.inner, Affine) and pruned.inner.zero.dtype == torch.int8
    assert pruned.dense()[~mask].count_nonzero() == 0
    assert pruned.inner.codes[mask].equal(weight.codes[mask])
    moved = (pruned.dense(torch.float32) - weight.dense(torch.float32)).abs() / weight.scale.float().repeat_interleave(16, 1)
    assert moved[mask].max() <= 0.51 if bool(mask.any()) else True
    again = pruned.masked(mask)
    assert again.dense().equal(pruned.dense()) and again.kept.equal(mask)
    assert set(pruned.parameters()) == {"scale"}  # a trained zero-point would take zero off the grid


def test_sizes():
    weight = affine(3, torch.float16)
    assert weight.nbytes == 24 * 32 * 3 / 8 + 2 * 24 * 2 * 2
    assert weight.masked(torch.rand(SHAPE) < 0.5).nbytes == 24 * 32 * 3 / 8 + 24 * 2 * (2 + 1)
    outliers = Outliers.of(torch.ones(SHAPE, dtype=torch.float16), torch.eye(24, 32, dtype=torch.bool))
    assert outliers.nbytes == 24 * (2 + 2) + 25 * 4
    columns = Columns(torch.ones(24, 3, dtype=torch.float16), torch.arange(3, dtype=torch.int32), 32)
    assert columns.nbytes == 24 * 3 * 2 + 3 * 4
    rows = Rows.of(torch.ones(SHAPE, dtype=torch.float16), torch.arange(24) < 3)
    assert rows.nbytes == 3 * 32 * 2 + 3 * 4 and rows.numel == 96
    both = Sum((Dense(torch.ones(SHAPE)), columns))
    assert both.nbytes == 24 * 32 * 4 + columns.nbytes and both.numel == 24 * 32 + 72
    half = affine(4).masked(torch.arange(32).expand(SHAPE) < 2)
    assert half.ideal_nbytes == half.nbytes - 24 * 32 / 2 + 24 * 2 / 2 + 24 * 32 / 8


def test_outliers_of_wide_matrices_have_wide_indices():
    assert index_dtype(1 << 15) == torch.int16 and index_dtype((1 << 15) + 1) == torch.int32
    wide = torch.zeros(2, 1 << 15)
    wide[1, -1] = 3
    assert Outliers.of(wide, wide != 0).dense().equal(wide)


def test_a_correction_beside_a_layer_keeps_its_structure():
    kinds = every_kind()
    low = LowRank(Dense(torch.randn(4, 32)), Dense(torch.randn(24, 4)))
    assert_structure_kept("layer", structure(low), Sum((low, low)))
    with pytest.raises(RuntimeError, match="rank"):
        assert_structure_kept("layer", structure(low), Sum((kinds["affine"], low)))
    with pytest.raises(RuntimeError, match="mask"):
        assert_structure_kept("layer", structure(kinds["masked affine"]), Sum((kinds["masked affine"], low)))
    with pytest.raises(RuntimeError, match="part"):
        assert_structure_kept("layer", structure(Sum((low, low, low))), Sum((low, low)))
