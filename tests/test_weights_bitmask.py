"""Bitmasks: values, sizes, files, the modules that open them, and what passes are given."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import init_empty_weights
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import linear

from compress.export import layers
from compress.filling import fill_linear
from compress.loader import build
from compress.quant.hqq import HQQ
from compress.quant.rtn import RTN
from compress.stats import LinearStats
from compress.stored_layers import BitmaskLinear, bits_of
from compress.weights import (
    Bitmask,
    BitmaskGrid,
    Dense,
    LowRank,
    Masked,
    Quantized,
    Sum,
    Weight,
    assert_structure_kept,
    bitmasked,
    opened,
    spec_of,
    structure,
)  # fmt: skip

SHAPE = (23, 32)  # a bitmap that ends within a byte of a row, and one stream for all of them


def masks(share: float = 0.5, seed: int = 0) -> Tensor:
    return torch.rand(SHAPE, generator=torch.Generator().manual_seed(seed)) < share


def masked(kind: str, dtype: torch.dtype = torch.float32, share: float = 0.5) -> Masked:
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)).to(dtype)
    if kind == "values":
        return Dense(weight).masked(masks(share))
    if kind == "fractional":
        grid = HQQ(bits=4, group_size=16).linear(weight, LinearStats(32, ()), None)
    else:
        symmetric = kind == "symmetric"
        grid = RTN(bits=3, group_size=16, symmetric=symmetric).linear(weight, LinearStats(32, ()), None)
    return grid.masked(masks(share))


KINDS = ("values", "symmetric", "asymmetric", "fractional")


def module_of(weight: Weight, bias: bool = True) -> BitmaskLinear:
    with torch.device("meta"):
        module = build(spec_of(weight), SHAPE[1], SHAPE[0], bias)
    fill_linear(module, weight, "cpu", weight.dtype)
    if bias:
        module.bias = nn.Parameter(torch.ones(SHAPE[0], dtype=weight.dtype), requires_grad=False)
    return module


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_the_matrix_is_the_same(kind, dtype):
    weight = masked(kind, dtype)
    packed = bitmasked(weight)
    assert isinstance(packed, Bitmask if kind == "values" else BitmaskGrid)
    assert packed.dense().equal(weight.dense()) and packed.mask.equal(weight.kept)
    assert (packed.shape, packed.dtype, packed.numel) == (SHAPE, dtype, weight.numel)
    assert_structure_kept("layer", structure(weight), packed)
    loose = opened(packed)
    assert isinstance(loose, Masked) and loose.dense().equal(weight.dense()) and loose.kept.equal(weight.kept)
    assert isinstance(loose.inner, Dense if kind == "values" else Quantized)
    assert_structure_kept("layer", structure(packed), loose)
    again = bitmasked(loose)
    assert again.nbytes == packed.nbytes and all(again.tensors()[k].equal(v) for k, v in packed.tensors().items())


@pytest.mark.parametrize("kind", KINDS)
def test_files_hold_what_a_weight_says(kind):
    packed = bitmasked(masked(kind, torch.bfloat16))
    tensors = layers.tensors("layer", packed)
    assert sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) == packed.nbytes == packed.ideal_nbytes
    assert {name.removeprefix("layer.") for name in tensors} == set(packed.tensor_names)
    again = layers.read_weight("layer", layers.Source(tensors.__getitem__, tensors.__contains__), spec_of(packed), SHAPE)
    assert type(again) is type(packed) and again.dense().equal(packed.dense()) and again.mask.equal(packed.mask)
    meta = {name: tensor.to("meta") for name, tensor in tensors.items()}
    outlined = layers.read_weight("layer", layers.Source(meta.__getitem__, meta.__contains__), spec_of(packed), SHAPE)
    assert (outlined.nbytes, outlined.shape, outlined.numel) == (packed.nbytes, SHAPE, packed.numel)
    loose = opened(outlined)
    assert loose.numel == packed.numel and loose.dense().is_meta and bitmasked(loose).nbytes == packed.nbytes


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 9),
    st.integers(1, 40),
    st.floats(0, 1),
    st.integers(0, 2**32),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_mask_of_any_shape_comes_back(n_outputs, n_inputs, share, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n_outputs, n_inputs, generator=generator).to(dtype)
    weight = Dense(weight).masked(torch.rand(weight.shape, generator=generator) < share)
    packed = Bitmask(weight.inner.values[weight.kept], weight.kept)
    again = Bitmask.assemble(weight.shape, packed.sizes(), packed.tensors(), {})
    assert again.dense().equal(weight.dense()) and again.kept.equal(weight.kept)
    assert packed.nbytes == weight.numel * dtype.itemsize + -(-n_outputs * n_inputs // 8)
    assert (bitmasked(weight) is weight) == (packed.nbytes >= weight.nbytes)


def test_a_kept_entry_may_be_zero():
    weight = Masked(Dense(torch.zeros(SHAPE)), masks())
    assert bitmasked(weight).mask.equal(masks())


def test_bits_lie_in_the_stream_least_significant_first():
    kept = torch.tensor([[True, False, True], [False, False, True]])
    assert Bitmask(torch.ones(3), kept).bitmap.tolist() == [0b100101]
    assert bits_of(torch.tensor([0b100101], dtype=torch.uint8), 6).tolist() == [1, 0, 1, 0, 0, 1]


def test_what_is_left_alone():
    grid = RTN(bits=8, group_size=-1, activations="int8")
    rounded_inputs = grid.linear(torch.randn(SHAPE), LinearStats(32, ()), None).masked(masks())
    low = LowRank(Dense(torch.randn(4, 32)), Dense(torch.randn(23, 4)))
    unknown = Masked(Dense(torch.empty(SHAPE, device="meta")), torch.empty(SHAPE, dtype=torch.bool, device="meta"))
    for weight in (
        Dense(torch.randn(SHAPE)),
        rounded_inputs,
        low,
        masked("values", share=1.0),
        masked("symmetric", share=0.8),
        unknown,
    ):
        assert bitmasked(weight) is weight and opened(weight) is weight


def test_factors_and_parts_are_opened_where_they_are():
    packed, plain = bitmasked(masked("values")), Dense(torch.randn(SHAPE))
    whole = Sum((plain, packed))
    loose = opened(whole)
    assert loose.parts[0] is plain and isinstance(loose.parts[1], Masked) and loose.dense().equal(whole.dense())


@pytest.mark.parametrize("kind", KINDS)
def test_rebuilding_training_and_masking(kind):
    packed = bitmasked(masked(kind))
    parameters = {name: value.clone().requires_grad_() for name, value in packed.parameters().items()}
    assert packed.shares().keys() == parameters.keys()
    packed.rebuild(parameters).dense().square().sum().backward()
    assert all(value.grad is not None and value.grad.count_nonzero() for value in parameters.values())
    trained = packed.rebuild({name: (value * 1.1).detach() for name, value in parameters.items()})
    assert not trained.dense().equal(packed.dense()) and trained.nbytes == packed.nbytes
    assert_structure_kept("layer", structure(packed), trained)
    fewer = packed.masked(masks(0.5, seed=3))
    assert isinstance(fewer, Masked) and fewer.kept.equal(masks() & masks(0.5, seed=3))
    assert fewer.dense().equal(packed.dense() * masks(0.5, seed=3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_modules_compute_what_a_dense_layer_does(kind, dtype):
    packed = bitmasked(masked(kind, dtype))
    module, x = module_of(packed), torch.randn(3, 5, 32).to(dtype)
    expected = linear(x, packed.dense(), module.bias)
    assert module(x).equal(expected) and module(x).equal(expected)


@pytest.mark.parametrize("kind", ["values", "asymmetric"])
def test_an_opened_module_follows_its_tensors(kind):
    """It opens its matrix once; whatever then changes the packed tensors is noticed, and these are what is saved."""
    first, second = bitmasked(masked(kind)), bitmasked(masked(kind).inner.masked(masks().roll(1, 0)))
    module, x = module_of(first, bias=False), torch.randn(2, 32)
    names = set(module.state_dict())
    assert module(x).equal(linear(x, first.dense()))
    matrix = module.opened[2]
    module(x)
    assert module.opened[2] is matrix and set(module.state_dict()) == names
    fill_linear(module, first.rebuild({k: 2 * v for k, v in first.parameters().items()}), "cpu", torch.float32)
    assert module(x).equal(linear(x, 2 * first.dense()))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(0.5)
    assert module(x).equal(linear(x, first.dense()))
    half = copy.deepcopy(module).to(torch.bfloat16)
    assert half(x.bfloat16()).equal(
        linear(x.bfloat16(), first.map(lambda t: t.bfloat16() if t.is_floating_point() else t).dense())
    )
    assert module(x).equal(linear(x, first.dense())) and half.float()(x).dtype == torch.float32
    module.load_state_dict(second.tensors())
    assert module(x).equal(linear(x, second.dense())) and not first.mask.equal(second.mask)


def test_a_module_is_made_without_memory_and_filled_later():
    packed, x = bitmasked(masked("values")), torch.randn(2, 32)
    with init_empty_weights(include_buffers=True):
        module = build(spec_of(packed), 32, 23, False)
    assert all(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))
    module.load_state_dict(packed.tensors(), assign=True)
    with torch.inference_mode():
        inferred = module(x)
    assert inferred.equal(linear(x, packed.dense()))
    x.requires_grad_()
    module(x).sum().backward()  # what was opened in inference mode is an ordinary tensor
    torch.testing.assert_close(x.grad, packed.dense().sum(0).expand(2, -1))
    saved = module.state_dict()
    assert saved.keys() == packed.tensors().keys() and all(saved[k].equal(v) for k, v in packed.tensors().items())


def test_values_of_a_module_can_be_trained():
    module = module_of(bitmasked(masked("values")), bias=False)
    module(torch.randn(2, 32))
    module.values.requires_grad_()
    for _ in range(2):  # a matrix that was kept from the first would have no graph left
        module(torch.randn(2, 32)).square().sum().backward()
    assert module.values.grad.count_nonzero() == module.values.numel()
