"""Hadamard matrices: orthonormal, all entries of one size, so that a product with one spreads every entry over all
(used as QuaRot does, 2404.00456).

A matrix of order 2**k is Sylvester's. One of order 4t, t odd, is Goethals and Seidel's array of four circulant matrices
whose autocorrelations cancel ("Orthogonal matrices with zero diagonal", 1967); their first rows are the table below, found
by search. Kronecker products of these give most widths of models. What is left of a width takes a Hartley matrix,
cos + sin, which exists for every length and whose entries are at most sqrt(2) larger.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.stored_layers import spread

_ROWS = {
    3: "3 3 3 7",
    5: "16 06 0f 0f",
    7: "4b 4b 4b 3f",
    9: "05a 05a 118 018",
    11: "532 231 37b 078",
    13: "09f9 09f9 176e 076e",
    15: "46d8 06d8 50c2 50c2",
    17: "16996 0c7e3 057ea 0f99f",
    19: "4732e 4732e 25fe9 62def",
    21: "00acef 10acef 12cdaf 02edef",
    23: "69cce5 7c2d0f 144c8a 41ad60",
    25: "091e789 191e789 0caff53 0caff53",
    27: "3a53297 23cccf1 5270392 741020b",
    29: "17dd0bbe 1d62f46b 19960699 1cd606b3",
    31: "344ac39b 408b8bbf 42b19caf 4b3eb7db",
    33: "14768ed1d 0d521cd8f 09e6d7fd6 00e6c7f54",
    35: "13509df1d 53509df1d 0987aa7db 53d19ff5d",
    37: "05b3b0dcda 10b670e6d0 07a9bfd95e 02ac7fe354",
    39: "56122af4e1 0cfa26f833 2107d3532c 12060a55e4",
    41: "14d86bd61b2 13b8a0fae23 05436b7f3f5 059b21fb3f7",
    43: "50e3b13f549 6e2fee202e2 5a67ad28669 357be3e8cdf",
    45: "1d943b287650 11aa04a7b9b7 0c3affcacd6e 1504d0e03e6c",
    49: "1d4ea4f84f542 06f650170d3bc 17deb268b9eb7 16e640879b8c8",
    51: "3522f2697d1a9 52609a37e67c2 51410d7c406f2 63b9f7cbb7138",
    55: "090c0bca23b5cb 09140bcb2bf1db 13dabf6768ef1d 74f37115fc4834",
    57: "0ca37f46427a9b2 12cd9e929f4600e 03d83aa96ae7f63 0585de7bd77ba1e",
    61: "1a9ab1730ce8d595 1ca9053c5c35f6ac 1e7b05bb0cde25ef 1b1e4b37ffc90f85",
    63: "4c24ff1ad63fc90c 73db00e529c036f3 22a1732c0d33a151 22a1732c0d33a151",
}
"""First rows of the four circulants by t: t bits each, hexadecimal, the first entry the highest; 1 is +1 and 0 is -1."""


def hadamard(n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """An orthonormal matrix Q (n, n) all of whose entries are +-1/sqrt(n) where a Hadamard matrix of that order is known
    here, and at most sqrt(2/n) elsewhere. Raises ValueError for n < 1."""
    return transform(torch.eye(n, dtype=torch.float64)).T.to(dtype).contiguous()


def random_hadamard(n: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """:func:`hadamard` with random signs, Q diag(signs): (n, n), orthonormal. The seed alone says which."""
    return (hadamard(n) * random_signs(n, seed)).to(dtype)


def random_signs(n: int, seed: int) -> Tensor:
    """(n,) float64, each -1 or 1 with equal chances."""
    return torch.randint(2, (n,), generator=torch.Generator().manual_seed(seed)).double() * 2 - 1


def transform(x: Tensor, *, inverse: bool = False) -> Tensor:
    """Q x, Q = :func:`hadamard`, along the last dimension of x (..., n), in its floating dtype; inverse: Q^T x.

    Takes O(n log n) for the power of two in n, and 4t operations an entry for each factor from the table.
    """
    orders, rest = factors(x.shape[-1])
    y = spread(x.unflatten(-1, (*orders, rest)))
    for axis, order in enumerate(orders):
        matrix = goethals_seidel(order // 4).to(x.device, x.dtype) * order**-0.5
        matrix = matrix.T if inverse else matrix
        y = (y.transpose(axis - len(orders) - 1, -1) @ matrix.T).transpose(axis - len(orders) - 1, -1)
    return y.flatten(-1 - len(orders))


def factors(n: int) -> tuple[tuple[int, ...], int]:
    """The orders of tabulated matrices whose product is made for n, and what is left of it for :func:`spread`: a power of
    two wherever a Hadamard matrix is known here. Raises ValueError for n < 1."""
    if n < 1:
        raise ValueError(f"no matrix of order {n}")
    for t in sorted(_ROWS, reverse=True):  # the largest first: every factor uses up two powers of two
        if n % (4 * t) == 0:
            others, rest = factors(n // (4 * t))
            return (4 * t, *others), rest
    return (), n


def goethals_seidel(t: int) -> Tensor:
    """The Hadamard matrix H (4t, 4t) float64 of -1 and 1, H H^T = 4t I, for a t in the table. Raises KeyError for others."""
    first = [[1.0 if bit == "1" else -1.0 for bit in f"{int(digits, 16):0{t}b}"] for digits in _ROWS[t].split()]
    index = torch.arange(t)
    a, b, c, d = torch.tensor(first, dtype=torch.float64)[:, (index - index.unsqueeze(1)) % t]
    b_back, c_back, d_back, b_turned, c_turned, d_turned = (m.flip(1) for m in (b, c, d, b.T, c.T, d.T))
    rows = (
        (a, b_back, c_back, d_back),
        (-b_back, a, d_turned, -c_turned),
        (-c_back, -d_turned, a, b_turned),
        (-d_back, c_turned, -b_turned, a),
    )
    return torch.cat([torch.cat(row, 1) for row in rows])
