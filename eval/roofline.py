"""How fast a model could run on a device: the larger of computing and memory time, layer by layer (Yuan et al., 2402.16363).

An estimate: no kernel overhead, no overlap between layers, and full use of the peak rates that ``devices.yaml`` lists. It
tells devices and formats apart; the time on a real machine is longer. Products count 2 operations a weight and token;
softmax and norms are left out, below a hundredth of the rest at the sizes that matter.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import yaml
from pydantic import BaseModel, ConfigDict

PROMPT_TOKENS = 512
ACTIVATION_BYTES = 2


class Device(BaseModel):
    """bandwidth: bytes/s. half, int8: operations/s in 16-bit floats and 8-bit integers, dense. memory: bytes. source: of all
    these numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    bandwidth: float
    half: float
    int8: float
    memory: float
    source: str


class Estimate(BaseModel):
    """Speed of a model on a named device, computed and not measured.

    prefill_tokens_per_second: of a prompt of 512 tokens; decode_tokens_per_second: after it; batch 1. memory_bytes: weights
    and KV cache. fits: whether the device holds them. bound: what decoding waits for.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: str
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    memory_bytes: int
    fits: bool
    bound: Literal["memory", "compute"]


class Matrix(NamedTuple):
    """A linear layer: its widths, the weights that a token is multiplied with, and its bytes as stored."""

    n_inputs: int
    n_outputs: int
    n_weights: int
    nbytes: float


class Profile(NamedTuple):
    """What a forward pass does. matrices: of all layers and the head. weight_bytes: all that lies in memory. query_width: query
    heads times their size. cache_bytes: of one token in one layer. windows: the tokens that each layer looks back at, None:
    all. is_integer: whether weights, activations and cache are all of 8 bits or fewer, so that 8-bit units compute."""

    matrices: tuple[Matrix, ...]
    weight_bytes: int
    query_width: int
    cache_bytes: float
    windows: tuple[int | None, ...]
    is_integer: bool = False

    def kv_cache_bytes(self, length: int) -> float:
        """Bytes of the keys and values of one sequence of ``length`` tokens."""
        return self.cache_bytes * sum(min(length, window or length) for window in self.windows)


class Work(NamedTuple):
    """operations and bytes to and from memory, of one operator."""

    operations: float
    nbytes: float

    def seconds(self, device: Device, is_integer: bool = False) -> float:
        """The larger of the two times."""
        return max(self.operations / peak(device, is_integer), self.nbytes / device.bandwidth)


def peak(device: Device, is_integer: bool) -> float:
    """Operations per second that the device computes in."""
    return device.int8 if is_integer else device.half


def linear_work(matrix: Matrix, n_tokens: int) -> Work:
    """One layer over that many tokens at once."""
    moved = n_tokens * (matrix.n_inputs + matrix.n_outputs) * ACTIVATION_BYTES
    return Work(2.0 * matrix.n_weights * n_tokens, matrix.nbytes + moved)


def forward_work(profile: Profile, n_new: int, length: int, batch: int = 1) -> Iterator[Work]:
    """The operators of a forward pass of ``n_new`` tokens a sequence, the last of ``length``."""
    for matrix in profile.matrices:
        yield linear_work(matrix, n_new * batch)
    for window in profile.windows:
        seen = min(length, window or length)
        moved = profile.cache_bytes * seen + 2 * n_new * profile.query_width * ACTIVATION_BYTES
        yield Work(4.0 * n_new * seen * profile.query_width * batch, moved * batch)


def estimate(profile: Profile, device: Device, *, prompt: int = PROMPT_TOKENS, batch: int = 1) -> Estimate:
    """The speeds at which a device could run a model. prompt: tokens, before the decoding too. batch: sequences at a time."""
    prefill = list(forward_work(profile, prompt, prompt, batch))
    decode = list(forward_work(profile, 1, prompt + 1, batch))
    prefill_seconds, decode_seconds = (
        sum(work.seconds(device, profile.is_integer) for work in works) for works in (prefill, decode)
    )
    operations, moved = sum(work.operations for work in decode), sum(work.nbytes for work in decode)
    memory = int(profile.weight_bytes + batch * profile.kv_cache_bytes(prompt + 1))
    return Estimate(
        device=device.name,
        prefill_tokens_per_second=batch * prompt / prefill_seconds,
        decode_tokens_per_second=batch / decode_seconds,
        memory_bytes=memory,
        fits=memory <= device.memory,
        bound="compute" if operations / peak(device, profile.is_integer) > moved / device.bandwidth else "memory",
    )


def devices(path: Path | None = None) -> tuple[Device, ...]:
    """The named devices of a data file; by default the bundled one."""
    content = yaml.safe_load((path or Path(__file__).with_name("devices.yaml")).read_text(encoding="utf-8"))
    return tuple(Device(**entry) for entry in content)
