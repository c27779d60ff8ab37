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
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from compress.eval.roofline import Estimate

LARGE_BATCH = 8
MOST_BYTES = 2**63  # of a file; beyond it numbers overflow


class Speed(BaseModel):
    """Measured on this machine; comparable only between models measured on the same one.

    decode_tokens_per_second: batch 1, greedy, with a key-value cache, the prompt's forward pass left out.
    prefill_tokens_per_second: one forward pass over the prompt. Both are medians over repeats. batch_8_*: the same with
    eight sequences at once, tokens of all of them counted; None where they were not measured.
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
    batch_8_decode_tokens_per_second: float | None = None
    batch_8_prefill_tokens_per_second: float | None = None


class Cost(BaseModel):
    """Size of an artifact, and optionally its speed.

    bytes_on_disk: sizes of the weight files. weight_bytes: those of the tensors in them, file headers left out.
    ideal_bytes: with zeros as a bitmap and codes packed without padding. parameters: of the dense base model.
    compressed_bits_per_weight: over the layers that were compressed, scales and indices included. active_parameters: those
    that a token passes through, less than all in a mixture of experts. non_embedding_*: without embeddings and head, as
    scaling laws count. load_seconds: of opening the model from its files, which may lie in the system's cache.
    kv_cache_bytes_per_token: of one sequence in all layers. estimates: computed, not measured.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    bytes_on_disk: int = Field(gt=0, lt=MOST_BYTES)
    weight_bytes: int = Field(ge=0, lt=MOST_BYTES)
    ideal_bytes: float | None = Field(default=None, ge=0)
    parameters: int | None = Field(default=None, ge=0)
    compressed_bits_per_weight: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    speed: Speed | None = None
    active_parameters: int | None = None
    non_embedding_parameters: int | None = None
    non_embedding_bytes: int | None = None
    load_seconds: float | None = None
    kv_cache_bytes_per_token: int | None = None
    estimates: tuple[Estimate, ...] = ()


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
def measure_speed(model: nn.Module, *, prompt_tokens: int = 64, new_tokens: int = 16, repeats: int = 3, seed: int = 0) -> Speed:
    """Time a Hugging Face causal model where it is, on random prompts, at batch 1 and at batch 8.

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
    prompts = torch.randint(config.vocab_size, (LARGE_BATCH, prompt_tokens), generator=generator).to(device)

    training = model.training
    model.eval()
    _restart_peaks(device)
    try:
        prefill, decode = _rates(model, prompts[:1], new_tokens, repeats)
        process_bytes = _peak_process_bytes()
        device_bytes = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        large_prefill, large_decode = _rates(model, prompts, new_tokens, repeats)
    finally:
        model.train(training)
    return Speed(
        decode_tokens_per_second=decode,
        prefill_tokens_per_second=prefill,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        device=str(device),
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        n_threads=torch.get_num_threads(),
        resident_weight_bytes=_resident_bytes(model),
        peak_process_bytes=process_bytes,
        peak_device_bytes=device_bytes,
        batch_8_decode_tokens_per_second=large_decode,
        batch_8_prefill_tokens_per_second=large_prefill,
    )


def _rates(model: Any, prompts: Tensor, new_tokens: int, repeats: int) -> tuple[float, float]:
    """Tokens per second of prefill and of decoding, over all sequences together."""

    def prefill() -> None:
        model(input_ids=prompts, use_cache=True)

    def generate() -> None:
        model.generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
        )

    prefill_seconds = _median_seconds(prefill, repeats, prompts.device)
    generate_seconds = _median_seconds(generate, repeats, prompts.device)
    # The first new token comes from the prompt's own forward pass, hence one decoding step less than new tokens.
    decode_seconds = max(generate_seconds - prefill_seconds, 1e-9)
    return prompts.numel() / prefill_seconds, len(prompts) * (new_tokens - 1) / decode_seconds


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
