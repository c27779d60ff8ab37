"""GGUF files as the format's own package reads them; tests that import this are skipped where it is not installed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

gguf = pytest.importorskip("gguf", reason="needs the gguf package: pip install 'compress-lm[gguf]'")


class Read:
    """A GGUF file: metadata by key; tensors, dequantized, and their types by name."""

    def __init__(self, file: Path):
        reader = gguf.GGUFReader(file)
        self.metadata = {key: field.contents() for key, field in reader.fields.items()}
        self.types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
        self.tensors = {t.name: torch.from_numpy(gguf.dequantize(t.data, t.tensor_type).copy()) for t in reader.tensors}
