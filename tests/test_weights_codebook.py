"""Matrices of vectors from codebooks: what they stand for, what they take in a file, and that they come back from it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.filling import fill_linear
from compress.loader import build
from compress.stored_codebooks import unpack_indices
from compress.weights import Codebook, spec_of
from compress.weights.packing import pack_indices


def codebook(axis: int, n_entries: int = 10, n_books: int = 2, length: int = 4) -> Codebook:
    """A matrix (8, 12)."""
    draw = torch.Generator().manual_seed(0)
    grid = (8, 12 // length) if axis else (8 // length, 12)
    indices = torch.randint(0, n_entries, (n_books, *grid), generator=draw, dtype=torch.int32)
    scale = torch.rand((8, 1) if axis else (1, 12), generator=draw) + 0.5
    return Codebook(indices, torch.randn(n_books, n_entries, length, generator=draw), scale, axis)


@given(st.integers(1, 16), st.integers(1, 70), st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_indices_of_any_width_come_back_from_their_bits(bits, count, seed):
    indices = torch.randint(0, 2**bits, (count,), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    packed = pack_indices(indices, bits)
    assert packed.dtype == torch.uint8 and len(packed) == -(-count * bits // 8)
    assert torch.equal(unpack_indices(packed, bits, count), indices)
    assert pack_indices(indices.to("meta"), bits).shape == packed.shape


def by_hand(weight: Codebook) -> Tensor:
    n_outputs, n_inputs = weight.shape
    dense = torch.zeros(n_outputs, n_inputs)
    for i in range(n_outputs):
        for j in range(n_inputs):
            row, column, place = (
                (i, j // weight.length, j % weight.length) if weight.axis else (i // weight.length, j, i % weight.length)
            )
            dense[i, j] = sum(
                float(book[chosen[row, column], place]) for book, chosen in zip(weight.books, weight.indices, strict=True)
            )
    return dense * weight.scale


@pytest.mark.parametrize("axis", [0, 1])
def test_a_matrix_is_the_sum_of_the_entries_named(axis):
    weight = codebook(axis)
    assert weight.shape == (8, 12)
    torch.testing.assert_close(weight.dense(), by_hand(weight))


@pytest.mark.parametrize("axis", [0, 1])
def test_it_is_the_bytes_of_its_tensors_and_comes_back_from_them(axis):
    weight = codebook(axis)
    tensors = weight.tensors()
    assert weight.nbytes == sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert len(tensors["packed"]) == 2 * 24 * 4 // 8  # ten entries take four bits
    back = Codebook.assemble(weight.shape, weight.sizes(), tensors, {})
    assert torch.equal(back.indices, weight.indices) and torch.equal(back.dense(), weight.dense())
    assert weight.map(lambda tensor: tensor.to("meta")).nbytes == weight.nbytes


@pytest.mark.parametrize("axis", [0, 1])
def test_its_module_computes_with_it(axis):
    weight, x = codebook(axis), torch.randn(3, 12)
    module = build(spec_of(weight), 12, 8, False)
    fill_linear(module, weight, torch.device("cpu"), torch.float32)
    torch.testing.assert_close(module(x), x @ weight.dense().T)


def test_books_and_scales_are_trained_and_indices_are_not():
    weight = codebook(1)
    assert weight.parameters().keys() == {"books", "scale"}
    books = weight.books.clone().requires_grad_()
    rebuilt = weight.rebuild({"books": books, "scale": weight.scale})
    rebuilt.dense().square().sum().backward()
    assert books.grad is not None and books.grad.abs().sum() > 0
