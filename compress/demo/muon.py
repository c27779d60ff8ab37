"""Muon: momentum, orthogonalised, for the hidden matrices of a small model on a CPU.

Muon (Jordan et al., 2024) replaces the momentum of a matrix by its nearest (semi-)orthogonal matrix, which reaches the
same loss as Adam in far fewer tokens. `torch.optim.Muon` iterates in bfloat16, which is dozens of times slower than
float32 on a CPU without native support for it; this one stays in float32 and shares the matrices among threads.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Executor
from typing import Any

import torch
from torch import Tensor

# The quintic of the reference implementation: five rounds bring all singular values into about 0.7 .. 1.2.
QUINTIC = (3.4445, -4.7750, 2.0315)
N_ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay; every parameter must be a matrix.

    `lr` is the spectral size of one step (default 0.02), enlarged by sqrt(rows / columns) for tall matrices; `executor`
    runs one task per matrix. `step` uses the gradients in `.grad` and takes no closure.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        executor: Executor,
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self._executor = executor

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            ready = [parameter for parameter in group["params"] if parameter.grad is not None]
            # Draining the results waits for every matrix, and raises what a worker raised.
            list(self._executor.map(lambda parameter, group=group: self._update(parameter, parameter.grad, group), ready))

    @torch.no_grad()
    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer: Tensor = state["momentum_buffer"]
        buffer.lerp_(gradient, 1 - group["momentum"])
        update = orthogonalise(gradient.lerp(buffer, group["momentum"]))
        stretch = max(1.0, parameter.shape[0] / parameter.shape[1]) ** 0.5
        parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * stretch)


def orthogonalise(matrix: Tensor) -> Tensor:
    """Return (rows, columns) float32 with the singular vectors of `matrix` and singular values near one."""
    a, b, c = QUINTIC
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(N_ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x
