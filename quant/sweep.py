"""The recursion that GPTQ and SparseGPT share: give up something of one input's weights after the other, and let the
inputs still to come make up for it, by the inverse Hessian of the layer's output error.

The published codes update blocks of 128 inputs lazily. Here the inputs are halved recursively, which gives the same
numbers from matrix products that are large at every scale, and leaves no block size to choose.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from compress.quant.hessian import Plan

_LEAF = 32  # inputs that are handled one by one, below which matrix products no longer pay

Unit = tuple[int, Callable[[Any, int, int], None]]
"""A number of consecutive inputs, and what to do with (the sweep, start, stop) when it reaches that many: their weights are
then as all errors before them have left them."""


class InputSweep:
    """One pass over the inputs of a matrix, replacing the weights of each and spreading the error over those to come.

    work: (in, out), the weights in the plan's order, transposed so that an input's weights are contiguous; overwritten by
    their residuals, weight minus what replaces it. results: (in, out) of any dtype, where :meth:`replace` leaves what is to
    be remembered of each weight. units: from the largest to the smallest.
    """

    def __init__(self, work: Tensor, plan: Plan, results: Tensor, units: Sequence[Unit] = ()):
        self.work, self.factor, self.results, self.units = work, plan.factor, results, units

    def replace(self, index: int, weights: Tensor, result: Tensor) -> Tensor:
        """What replaces one input's weights (out,), which may be written over the result (out,), of the dtype of work; what
        is to be remembered goes there."""
        raise NotImplementedError(type(self).__name__)

    def run(self, start: int, stop: int, level: int = 0) -> None:
        """Replace inputs start to stop, all of which have already been told of the errors before start. level: of the units,
        how many they are a part of."""
        length = stop - start
        while level < len(self.units) and length <= self.units[level][0]:
            self.units[level][1](self, start, stop)
            level += 1
        unit = self.units[level][0] if level < len(self.units) else _LEAF
        if length <= unit:
            return self._one_by_one(start, stop)
        middle = start + max(unit, length // 2 // unit * unit)
        self.run(start, middle, level)
        self.work[middle:stop].addmm_(self.factor[start:middle, middle:stop].T, self.work[start:middle], alpha=-1)
        self.run(middle, stop, level)

    def _one_by_one(self, start: int, stop: int) -> None:
        block, factor = self.work[start:stop], self.factor[start:stop, start:stop].unbind()
        results = torch.empty_like(block)
        for j, (weights, result) in enumerate(zip(block.unbind(), results.unbind(), strict=True)):
            weights.sub_(self.replace(start + j, weights, result))
            block[j + 1 :].addr_(factor[j][j + 1 :], weights, alpha=-1)
        self.results[start:stop] = results
