"""Hadamard matrices: tabulated, composed and randomised, and the transform that needs no table."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.quant.hadamard import _ROWS, factors, goethals_seidel, hadamard, random_hadamard, random_signs, transform
from compress.stored_layers import spread


def paley(q: int) -> torch.Tensor:
    """Paley's matrix of order q + 1, for a prime q = 3 mod 4, from quadratic residues: made in another way altogether."""
    residues = {x * x % q for x in range(1, q)}
    core = torch.tensor([[0.0 if i == j else 1.0 if (j - i) % q in residues else -1.0 for j in range(q)] for i in range(q)])
    skew = torch.zeros(q + 1, q + 1)
    skew[0, 1:], skew[1:, 0], skew[1:, 1:] = 1, -1, core
    return skew + torch.eye(q + 1)


@pytest.mark.parametrize("t", _ROWS)
def test_tabulated_matrices_are_hadamard(t):
    matrix = goethals_seidel(t)
    assert matrix.shape == (4 * t, 4 * t) and bool((matrix.abs() == 1).all())
    assert torch.equal(matrix @ matrix.T, 4 * t * torch.eye(4 * t, dtype=torch.float64))


@pytest.mark.parametrize("q", [11, 19, 43, 59, 67, 131])
def test_they_are_as_flat_as_those_from_quadratic_residues(q):
    other = paley(q)
    assert torch.equal(other @ other.T, (q + 1) * torch.eye(q + 1))
    assert (hadamard(q + 1) * (q + 1) ** 0.5).round().abs().equal(other.double().abs())


@given(st.integers(1, 300))
@settings(max_examples=40, deadline=None)
def test_every_width_has_an_orthonormal_matrix(n):
    orders, rest = factors(n)
    assert torch.tensor([*orders, rest]).prod() == n
    matrix = hadamard(n)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-12)
    flat = rest & (rest - 1) == 0
    assert float(matrix.abs().max()) <= (1 if flat else 2) ** 0.5 * n**-0.5 + 1e-12
    assert float(matrix.abs().min()) >= (n**-0.5 if flat else 0) - 1e-12


@given(st.integers(1, 300))
@settings(max_examples=40, deadline=None)
def test_the_transform_without_a_table_is_its_own_inverse(n):
    matrix = spread(torch.eye(n, dtype=torch.float64))
    torch.testing.assert_close(matrix @ matrix, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(matrix, matrix.T, rtol=0, atol=1e-14)
    assert float(matrix.abs().max()) <= (2 / n) ** 0.5 + 1e-12
    x = torch.randn(2, 3, n)
    torch.testing.assert_close(spread(x), (x.double() @ matrix).float(), rtol=0, atol=1e-5)
    assert spread(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("n", [11008, 14336, 13824, 18944, 8960, 4864, 5632, 29568, 12288, 5120, 3584, 1152])
def test_the_widths_of_common_models_are_truly_hadamard(n):
    orders, rest = factors(n)
    assert rest & (rest - 1) == 0 and orders


@pytest.mark.parametrize("n", [1, 12, 64, 112, 144, 100, 107])
def test_transform_is_the_product_with_the_matrix(n):
    x, matrix = torch.randn(3, 2, n, dtype=torch.float64), hadamard(n)
    torch.testing.assert_close(transform(x), x @ matrix.T)
    torch.testing.assert_close(transform(x, inverse=True), x @ matrix)


def test_random_signs_depend_on_the_seed_alone():
    first, again, other = random_hadamard(24, 3), random_hadamard(24, 3), random_hadamard(24, 4)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(first, hadamard(24) * random_signs(24, 3))
    torch.testing.assert_close(first @ first.T, torch.eye(24, dtype=torch.float64))
    assert random_hadamard(24, 3, torch.float32).dtype == torch.float32
    with pytest.raises(ValueError, match="order 0"):
        hadamard(0)


def test_it_spreads_an_outlier():
    x = torch.zeros(96)
    x[17] = 5
    assert transform(x.double()).abs().max() == pytest.approx(5 * 96**-0.5)
    assert spread(x).abs().max() <= 5 * (2 / 96) ** 0.5 + 1e-5
