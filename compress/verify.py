"""Prove an artifact by opening it in a fresh process: its logits must be those of the result in memory.

Small models are opened by stock transformers, in a process that imports nothing of compress. Models whose dense weights
exceed ``STOCK_LIMIT_BYTES`` are read back block by block instead, also in a fresh process, so that a model larger than
memory can be verified too.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from safetensors.torch import load_file
from torch import Tensor

from compress.checkpoint import Checkpoint, digest_files
from compress.errors import BadInput, CompressError
from compress.export.bitsandbytes import misread_here
from compress.weights.blockwise import bitsandbytes
from compress.writer import save_tensors

PROBE = "verification/probe.safetensors"  # in a folder: readers take every *.safetensors beside the weights for weights
STOCK_LIMIT_BYTES = 2 << 30
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 4e-3}


class Verification(BaseModel):
    """Differences are over all logits of the probe; scale is their largest magnitude. how: "stock" or "streamed"."""

    how: str
    max_difference: float
    scale: float
    top1_agreement: float
    model_class: str
    missing: list[str] = []
    unexpected: list[str] = []

    def lines(self, artifact: Path) -> list[str]:
        """The proof in words."""
        return [
            f"{artifact}: opened as {self.model_class} ({self.how}, fresh process); logits differ by at most "
            f"{self.max_difference:.2g} of {self.scale:.3g}, same top token {self.top1_agreement:.1%}"
        ]


def save_probe(directory: Path, tokens: Tensor, logits: Tensor) -> None:
    """Keep the expected logits (batch, length, V) beside the artifact, so that it can be verified again anywhere."""
    (directory / PROBE).parent.mkdir(exist_ok=True)
    save_tensors({"tokens": tokens.contiguous(), "logits": logits.contiguous()}, directory / PROBE)


def verify(directory: Path, *, dtype: str, device: str = "cpu", full: bool | None = None) -> Verification:
    """Reload ``directory`` in a fresh process and compare. full: True for stock transformers whatever the size, False for
    block by block; None decides by size, and by what bitsandbytes can do on this machine. Raises :class:`CompressError` where
    it does not load, or loads to another model.
    """
    config = json.loads((directory / "config.json").read_text())
    if full is None:
        full = _dense_bytes(directory) <= STOCK_LIMIT_BYTES and not misread_here(Checkpoint(directory), device)
    remote = "remote" if config.get("model_type") == "compress" else "stock"
    arguments = [str(directory.resolve()), str((directory / PROBE).resolve()), dtype, device, remote]
    if full:
        command = [sys.executable, "-c", (Path(__file__).with_name("reload.py")).read_text(), *arguments]
    else:
        command = [sys.executable, "-m", "compress.verify", *arguments]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        tail = "\n".join(process.stderr.strip().splitlines()[-8:])
        raise CompressError(f"{directory}: the artifact does not load in a fresh process:\n{tail}")
    result = Verification(how="stock" if full else "streamed", **json.loads(process.stdout.strip().splitlines()[-1]))
    if result.missing or result.unexpected:
        raise CompressError(f"{directory}: on reload, missing tensors {result.missing}, unexpected {result.unexpected}")
    tolerance = TOLERANCE["bfloat16" if _reads_in_bfloat16(config, device) else dtype]
    if not result.max_difference <= tolerance * max(result.scale, 1.0):
        raise CompressError(
            f"{directory}: reloaded logits differ from the result in memory by {result.max_difference:.3g} "
            f"(largest logit {result.scale:.3g}, {dtype}); the artifact is not what was computed"
        )
    return result


def verify_artifact(directory: Path, *, device: str = "cpu", full: bool | None = None) -> Verification:
    """Verify a published artifact: its weight files against the manifest's digest, then the reload of :func:`verify`."""
    from compress.manifest import Manifest
    from compress.skeleton import Skeleton

    checkpoint = Checkpoint(directory)
    manifest = Manifest.read(directory)
    if manifest is None or not (directory / PROBE).exists():
        raise BadInput(f"{directory}: not an artifact of compress: it has no manifest or no probe to verify by")
    if manifest.weights_digest != digest_files(checkpoint.files):
        raise CompressError(f"{directory}: the weight files are not those that the manifest's digest was taken of")
    Skeleton(checkpoint).check()
    return verify(directory, dtype=manifest.compute_dtype, device=device, full=full)


def _reads_in_bfloat16(config: dict[str, Any], device: str) -> bool:
    """Whether the reader multiplies in bfloat16 whatever the artifact says, as bitsandbytes does on CPUs that are fast in it."""
    quantization = config.get("quantization_config") or {}
    if quantization.get("quant_method") != "bitsandbytes" or not device.startswith("cpu"):
        return False
    return bool(getattr(bitsandbytes(), "has_avx512bf16", lambda: False)())


def _dense_bytes(directory: Path) -> int:
    from compress.manifest import Manifest

    manifest = Manifest.read(directory)
    return 4 * manifest.dense_parameters if manifest else 0


def _streamed(directory: str, probe: str, dtype: str, device: str, _: str) -> None:
    """The fresh process of a large model; prints what ``reload.py`` prints."""
    from compress.skeleton import Skeleton
    from compress.stream import forward

    expected = load_file(probe)
    skeleton = Skeleton(Checkpoint(Path(directory)), device, getattr(torch, dtype))
    skeleton.check()
    logits, reference = forward(skeleton, expected["tokens"]), expected["logits"]
    result = {
        "max_difference": float((logits - reference).abs().max()),
        "scale": float(reference.abs().max()),
        "top1_agreement": float((logits.argmax(-1) == reference.argmax(-1)).float().mean()),
        "model_class": type(skeleton.model).__name__,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    _streamed(*sys.argv[1:6])
