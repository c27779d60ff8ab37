"""Calibration statistics of one input group: sums over tokens, hence mergeable over batches, processes and restarts.

q/k/v read the same input and share one object, and so do gate/up: a Llama block needs four, not seven. Because a linear
map acts on the sums by algebra (:meth:`LinearStats.through`), a chain such as pruning -> low rank -> quantization runs
on one capture per block.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

OF_INPUTS = ("sum", "sqnorm", "abssum", "absmax", "hessian", "covariance")
STATISTICS = (*OF_INPUTS, "cross", "fisher")
"""sum, sqnorm, abssum: sums of x, x^2 and |x|; absmax: max |x|, all of shape (in,), float32. hessian: sum of x x^T, (in, in),
float32; covariance: the same sum kept in float64. A covariance gives a Hessian, and a Hessian its diagonal, sqnorm.
cross: sum of r x^T, (in, in) float64, r being what x was when the stage began, before any layer was compressed.
fisher: (in,) float32, of one layer and not of all that share its input: how much the loss depends on the weights that read each
input, the sum over these of the mean over the windows of the squared gradient; see :func:`compress.gradients.write_fisher`."""

# Narrower panels waste the processor, wider ones the symmetry; measured at 256 to 4096 inputs on two cores.
_LEAST_PANEL, _MOST_PANEL = 256, 512
_ROWS_PER_SUM = 4096


class LinearStats:
    """Sums over calibration tokens of the inputs x (in,) of the linear layers that share them.

    n: number of tokens. Reading a statistic that was not asked for raises AttributeError, so that a method cannot
    depend on what another one happened to need.
    """

    def __init__(self, n_inputs: int, wanted: Iterable[str], device: torch.device | str = "cpu"):
        self.n = 0
        self.n_inputs = n_inputs
        self.device = torch.device(device)
        self.allowed = frozenset(wanted)
        if unknown := self.allowed - set(STATISTICS):
            raise ValueError(f"unknown statistics {sorted(unknown)}; known: {', '.join(STATISTICS)}")
        self._sums: dict[str, Tensor] = {}
        self._factors: dict[Hashable, Any] = {}
        if "cross" in self.allowed:
            self._sums["cross"] = torch.zeros(n_inputs, n_inputs, dtype=torch.float64, device=device)
        if "covariance" in self.allowed:
            self._sums["covariance"] = torch.zeros(n_inputs, n_inputs, dtype=torch.float64, device=device)
        elif "hessian" in self.allowed:
            self._sums["hessian"] = torch.zeros(n_inputs, n_inputs, device=device)
        elif "sqnorm" in self.allowed:
            self._sums["sqnorm"] = torch.zeros(n_inputs, device=device)
        for name in ("sum", "abssum", "absmax"):
            if name in self.allowed:
                self._sums[name] = torch.zeros(n_inputs, device=device)

    def add(self, x: Tensor, before: Tensor | None = None) -> None:
        """Add inputs x of shape (..., in), any floating dtype; before: for "cross", of the same shape, what they were when the
        stage began."""
        x = x.reshape(-1, self.n_inputs)
        if before is not None:
            kind = _summed_in(x)
            self._sums["cross"] += before.reshape(x.shape).to(x.device, kind).T @ x.to(kind)
        self.n += x.shape[0]
        self._factors.clear()
        for rows in x.split(_ROWS_PER_SUM):
            for name in ("hessian", "covariance"):
                if name in self._sums:
                    rows = rows.to(_summed_in(rows))  # of 16-bit factors, products would come out in 16 bits
                    add_symmetric(self._sums[name], rows.T, rows)
            rows = rows.float() if {"sum", "sqnorm", "abssum", "absmax"} & self._sums.keys() else rows
            if "sum" in self._sums:
                self._sums["sum"] += rows.sum(0)
            if "sqnorm" in self._sums:
                self._sums["sqnorm"] += rows.square().sum(0)
            if "abssum" in self._sums:
                self._sums["abssum"] += rows.abs().sum(0)
            if "absmax" in self._sums:
                torch.maximum(self._sums["absmax"], rows.abs().amax(0), out=self._sums["absmax"])

    def finish(self) -> LinearStats:
        """Mirror the upper triangles that :meth:`add` has summed; call once, when the last token is in."""
        for name in ("hessian", "covariance"):
            if name in self._sums:
                mirror(self._sums[name])
        return self

    def _read(self, name: str) -> Tensor:
        if name not in self.allowed:
            raise AttributeError(f"statistic {name!r} was not declared in needs (declared: {sorted(self.allowed)})")
        derived_from = ("hessian", "covariance") if name in ("sqnorm", "hessian") else ()
        for source in (name, *derived_from):
            if source in self._sums:
                value = self._sums[source]
                break
        else:
            raise AttributeError(f"statistic {name!r} was not gathered (gathered: {sorted(self._sums)})")
        if name == "sqnorm" and value.dim() == 2:
            value = value.diagonal()
        if name in ("covariance", "cross") or value.dtype == torch.float32:
            return value
        return self.cached(("float32", name), value.float)

    @property
    def hessian(self) -> Tensor:
        """sum x x^T, (in, in), float32."""
        return self._read("hessian")

    @property
    def covariance(self) -> Tensor:
        """sum x x^T, (in, in), summed in float64."""
        if "covariance" in self.allowed and "covariance" not in self._sums:
            return self._sums["hessian"].double()
        return self._read("covariance")

    @property
    def cross(self) -> Tensor:
        """sum r x^T, (in, in), of inputs r as they were when the stage began, summed in float64."""
        return self._read("cross")

    @property
    def sum(self) -> Tensor:
        """sum x, (in,), float32."""
        return self._read("sum")

    @property
    def sqnorm(self) -> Tensor:
        """sum x^2, (in,), float32."""
        return self._read("sqnorm")

    @property
    def abssum(self) -> Tensor:
        """sum |x|, (in,), float32."""
        return self._read("abssum")

    @property
    def absmax(self) -> Tensor:
        """max |x|, (in,), float32."""
        return self._read("absmax")

    @property
    def fisher(self) -> Tensor:
        """Sum over the outputs of the mean squared gradient, (in,), float32."""
        return self._read("fisher")

    def with_fisher(self, fisher: Tensor) -> LinearStats:
        """The same sums (and cached factors) beside one layer's own ``fisher``, (in,)."""
        view = self.only(self.allowed | {"fisher"})
        view._sums = self._sums | {"fisher": fisher.to(self.device)}
        return view

    def cached(self, key: Hashable, compute: Callable[[], T]) -> T:
        """``compute()``, done once per key: layers that share an input share its Cholesky factor too."""
        if key not in self._factors:
            self._factors[key] = compute()
        return self._factors[key]

    def only(self, wanted: Iterable[str]) -> LinearStats:
        """The same sums (and cached factors), of which only ``wanted`` may be read."""
        view = LinearStats.__new__(LinearStats)
        view.__dict__ = dict(self.__dict__, allowed=frozenset(wanted))
        return view

    def merge(self, other: LinearStats) -> LinearStats:
        """The statistics of both sets of tokens together."""
        merged = LinearStats(self.n_inputs, self.allowed, self.device)
        merged.n = self.n + other.n
        for name, value in self._sums.items():
            theirs = other._sums[name]
            merged._sums[name] = torch.maximum(value, theirs) if name == "absmax" else value + theirs
        return merged

    def through(self, matrix: Tensor) -> LinearStats:
        """The statistics of y = matrix @ x, matrix (out, in): H becomes A H A^T and the sum A sum(x). abssum, absmax and
        fisher do not transform."""
        return self.mapped(lambda x: x @ matrix.to(x.dtype).T, matrix.shape[0])

    def mapped(self, linear: Callable[[Tensor], Tensor], n_outputs: int) -> LinearStats:
        """As :meth:`through`, for a linear map that is given as a function of rows: (n, in) to (n, n_outputs)."""
        moved = LinearStats(n_outputs, self.allowed & {"sum", "sqnorm", "hessian", "covariance", "cross"}, self.device)
        moved.n, moved._sums = self.n, {}
        if "sum" in self._sums:
            moved._sums["sum"] = linear(self._sums["sum"].unsqueeze(0)).squeeze(0)
        source = "covariance" if "covariance" in self._sums else "hessian"
        if source in self._sums:
            result = linear(linear(self._sums[source]).T)
            moved._sums[source] = (result + result.T) / 2
            if "cross" in self._sums:
                moved._sums["cross"] = linear(linear(self._sums["cross"]).T).T
        elif moved.allowed != {"sum"}:
            raise AttributeError("only a sum, a hessian or a covariance can be carried through a matrix")
        return moved

    def scaled(self, scale: Tensor) -> LinearStats:
        """The statistics of x / scale, scale (in,): H becomes S^-1 H S^-1."""
        result = LinearStats(self.n_inputs, self.allowed, self.device)
        result.n = self.n
        for name, value in self._sums.items():
            inverse = 1 / scale.to(value.dtype)
            if value.dim() == 2:
                result._sums[name] = value * inverse[:, None] * inverse
            else:
                powers = {"sum": inverse, "sqnorm": inverse.square(), "fisher": inverse.square()}
                result._sums[name] = value * powers.get(name, inverse.abs())
        return result

    def permuted(self, order: Tensor) -> LinearStats:
        """The statistics of x[order], order (in,) int64."""
        result = LinearStats(self.n_inputs, self.allowed, self.device)
        result.n = self.n
        order = order.to(self.device)
        for name, value in self._sums.items():
            result._sums[name] = value[order][:, order] if value.dim() == 2 else value[order]
        return result


def _summed_in(rows: Tensor) -> torch.dtype:
    """In which dtype products of rows are taken."""
    return torch.float64 if rows.dtype == torch.float64 else torch.float32


def add_symmetric(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right, (n, k) and (k, n), which is known to be symmetric, to the upper triangle of total (n, n), by panels: a
    little over half the work. Products are taken in the factors' dtype."""
    n = len(total)
    width = min(max(_LEAST_PANEL, n // 4), _MOST_PANEL)
    for start in range(0, n, width):
        part, rows, columns = total[start : start + width, start:], left[start : start + width], right[:, start:]
        if total.dtype == right.dtype:
            part.addmm_(rows, columns)
        else:
            part += rows @ columns


def mirror(upper: Tensor) -> Tensor:
    """Give a square matrix below its diagonal, in place, what it has above."""
    for start in range(0, len(upper), _MOST_PANEL):
        stop = start + _MOST_PANEL
        corner = upper[start:stop, start:stop].triu_()
        corner += corner.triu(1).T
        upper[stop:, start:stop] = upper[start:stop, stop:].T
    return upper


def symmetric(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, (n, k) and (k, n), which is known to be symmetric: (n, n), in half the work."""
    total = left.new_zeros(len(left), len(left))
    add_symmetric(total, left, right)
    return mirror(total)


def energy(matrix: Tensor, hessian: Tensor) -> Tensor:
    """trace(A H A^T) of A (out, in) and a symmetric H: by its diagonal and its upper triangle, half the work."""
    total = torch.zeros((), device=matrix.device)
    for start in range(0, len(hessian), _MOST_PANEL):
        stop = start + _MOST_PANEL
        part = matrix[:, start:stop]
        total += ((part @ hessian[start:stop, start:stop]) * part).sum()
        if stop < len(hessian):
            total += 2 * ((matrix[:, stop:] @ hessian[stop:, start:stop]) * part).sum()
    return total
