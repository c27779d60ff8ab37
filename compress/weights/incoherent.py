"""A matrix kept in another basis, in which no entry stands out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compress.stats import LinearStats
from compress.weights.composed import Composed
from compress.weights.matrix import Weight
from compress.weights.packing import pack_bits


@dataclass(frozen=True)
class Incoherent(Composed):
    """``dense = S_out Q inner Q S_in``: signs S and the orthonormal Q of :func:`compress.loader.spread` on either side.

    inner: the matrix in the new basis. signs_in: (in,), signs_out: (out,), int8, -1 or 1; in the file a bit each.
    Readers transform what enters and leaves the layer ``inner``. Pruners and quantizers are applied to ``inner``.
    """

    kind = "incoherent"
    tensor_names = ("signs_in", "signs_out")
    inner: Weight
    signs_in: Tensor
    signs_out: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.inner.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.inner.dtype

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        half = _spread(self.inner.dense(torch.float32)) * self.signs_in
        return (_spread(half.T) * self.signs_out).T.to(dtype or self.dtype)

    def carry(self, stats: LinearStats) -> LinearStats:
        """The statistics of what enters ``inner``, from those of what enters the layer."""
        return carry(stats, self.signs_in)

    def around(self, inner: Weight) -> Incoherent:
        """The same basis with another matrix in it."""
        return replace(self, inner=inner)

    def tensors(self) -> dict[str, Tensor]:
        return {"signs_in": pack_bits((self.signs_in - 1) // 2, 1), "signs_out": pack_bits((self.signs_out - 1) // 2, 1)}

    def children(self) -> dict[str, Weight]:
        return {"inner": self.inner}

    @classmethod
    def child_shapes(cls, shape, sizes) -> dict[str, tuple[int, int]]:
        return {"inner": shape}

    @classmethod
    def assemble(cls, shape, sizes, tensors, children) -> Incoherent:
        from compress.stored_layers import signs

        n_outputs, n_inputs = shape
        return cls(children["inner"], signs(tensors["signs_in"], n_inputs), signs(tensors["signs_out"], n_outputs))

    def rebuild(self, parameters: Mapping[str, Tensor]) -> Incoherent:
        return self.around(self._rebuilt_children(parameters)["inner"])


def turn(matrix: Tensor, signs_in: Tensor, signs_out: Tensor) -> Tensor:
    """Q S_out matrix S_in Q: a matrix (out, in), float32 or more, in the basis of those signs."""
    return _spread(_spread(matrix * signs_in).T * signs_out).T.contiguous()


def carry(stats: LinearStats, signs_in: Tensor) -> LinearStats:
    """The statistics of Q S_in x, from those of x."""
    return stats.mapped(lambda x: _spread(x * signs_in), stats.n_inputs)


def _spread(x: Tensor) -> Tensor:
    from compress.stored_layers import spread

    return spread(x)
