"""What a model costs: bytes measured from its files, and speed and memory measured by running it.

Nothing here is derived from a bit width: a format that pads or an artifact that repeats a tensor pays for it in the
numbers. What cannot be seen in the files (the information content, the dense parameter count) comes from the artifact's
manifest.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from pydantic import BaseModel, ConfigDict
from torch import nn


class Speed(BaseModel):
    """Measured on this machine; comparable only between models measured on the same one.

    decode_tokens_per_second: batch 1, greedy, with a key-value cache, the prompt's forward pass left out.
    prefill_tokens_per_second: one forward pass over the prompt. Both are medians over repeats.
    resident_weight_bytes: the model's parameters and buffers as they lie in memory, tied ones once.
    peak_process_bytes: the highest resident set of the whole process (interpreter, libraries and weights included)
    during the measurement on Linux, since the process started on Windows; elsewhere the resident set at its end.
    peak_device_bytes: the highest allocation on the accelerator during the measurement; None on a CPU.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    decode_tokens_per_second: float
    prefill_tokens_per_second: float
    prompt_tokens: int
    new_tokens: int
    device: str
    dtype: str
    n_threads: int
    resident_weight_bytes: int
    peak_process_bytes: int
    peak_device_bytes: int | None = None


class Cost(BaseModel):
    """Size of an artifact, and optionally its speed.

    bytes_on_disk: sizes of the weight files. weight_bytes: those of the tensors in them, file headers left out.
    ideal_bytes: with zeros as a bitmap and codes packed without padding. parameters: of the dense base model.
    compressed_bits_per_weight: over the layers that were compressed, scales and indices included.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    bytes_on_disk: int
    weight_bytes: int
    ideal_bytes: float | None = None
    parameters: int | None = None
    compressed_bits_per_weight: float | None = None
    speed: Speed | None = None


def artifact_cost(path: str | Path, manifest_size: Mapping[str, Any] | None = None) -> Cost:
    """Measure the weight files of a model directory.

    manifest_size: what the manifest knows of ``ideal_bytes``, ``parameters`` and ``compressed_bits_per_weight``;
    without it a model whose tensors are all floating point has its parameters counted from the files.
    Raises FileNotFoundError where there is no safetensors file.
    """
    files = _weight_files(Path(path))
    headers = [_header(file) for file in files]
    tensors = [entry for header in headers for name, entry in header.items() if name != "__metadata__"]
    sizes = dict(manifest_size or {})
    if "parameters" not in sizes and all(entry["dtype"].startswith(("F", "BF")) for entry in tensors):
        sizes["parameters"] = sum(_product(entry["shape"]) for entry in tensors)
    return Cost(
        bytes_on_disk=sum(file.stat().st_size for file in files),
        weight_bytes=sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in tensors),
        ideal_bytes=sizes.get("ideal_bytes"),
        parameters=sizes.get("parameters"),
        compressed_bits_per_weight=sizes.get("compressed_bits_per_weight"),
    )


@torch.no_grad()
def measure_speed(model: nn.Module, *, prompt_tokens: int = 64, new_tokens: int = 32, repeats: int = 3, seed: int = 0) -> Speed:
    """Time a Hugging Face causal model where it is, at batch 1 on a random prompt.

    The prompt is shortened where the model's context is too small for it. Raises ValueError where even a prompt of one
    token and ``new_tokens`` do not fit.
    """
    config: Any = model.config
    device = next(model.parameters()).device
    limit = getattr(config, "max_position_embeddings", None) or prompt_tokens + new_tokens
    prompt_tokens = min(prompt_tokens, limit - new_tokens)
    if prompt_tokens < 1:
        raise ValueError(f"a context of {limit} tokens has no room for {new_tokens} new ones")
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(config.vocab_size, (1, prompt_tokens), generator=generator).to(device)

    def prefill() -> None:
        model(input_ids=prompt, use_cache=True)

    def generate() -> None:
        model.generate(  # pyright: ignore[reportCallIssue]
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
        )

    training = model.training
    model.eval()
    _restart_peaks(device)
    try:
        prefill_seconds = _median_seconds(prefill, repeats, device)
        generate_seconds = _median_seconds(generate, repeats, device)
    finally:
        model.train(training)
    # The first new token comes from the prompt's own forward pass, hence one decoding step less than new tokens.
    decode_seconds = max(generate_seconds - prefill_seconds, 1e-9)
    return Speed(
        decode_tokens_per_second=(new_tokens - 1) / decode_seconds,
        prefill_tokens_per_second=prompt_tokens / prefill_seconds,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        device=str(device),
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        n_threads=torch.get_num_threads(),
        resident_weight_bytes=_resident_bytes(model),
        peak_process_bytes=_peak_process_bytes(),
        peak_device_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    )


def _weight_files(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        return [directory / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    single = directory / "model.safetensors"
    files = [single] if single.is_file() else sorted(directory.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"no *.safetensors file in {directory}")
    return files


def _header(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        return json.loads(stream.read(length))


def _product(shape: list[int]) -> int:
    return int(torch.Size(shape).numel())


def _median_seconds(call: Callable[[], None], repeats: int, device: torch.device) -> float:
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])  # the first warms caches and allocators


def _resident_bytes(model: nn.Module) -> int:
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in (*model.parameters(), *model.buffers())
    }
    return sum(storages.values())


def _restart_peaks(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    # Where the kernel refuses, the peak covers the life of the process.
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak_process_bytes() -> int:
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    memory = psutil.Process().memory_info()
    return getattr(memory, "peak_wset", memory.rss)
