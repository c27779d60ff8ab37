"""Adapters that peft has written: low-rank changes of a model's layers, read lazily."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from compress.checkpoint import resolve
from compress.errors import BadInput, explain
from compress.export.peft import CONFIG_FILE, PREFIX, TENSOR_FILE

_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"
_UNREAD = {"use_dora": "DoRA's magnitudes", "layer_replication": "repeated layers", "target_parameters": "changes of parameters"}


class Change(NamedTuple):
    """``up @ down`` is added to a layer's matrix. down: (rank, in); up: (out, rank), scaled; both as stored."""

    down: Tensor
    up: Tensor


class AdapterFiles:
    """source: a directory, or a hub id. names: of the modules that it changes.

    Raises :class:`BadInput` for anything but a LoRA in safetensors that changes linear layers and nothing else.
    """

    def __init__(self, source: str):
        self.path = resolve(source)
        self._config = _config(self.path)
        self._file = self.path / TENSOR_FILE
        if not self._file.is_file():
            raise BadInput(f"{self.path}: no {TENSOR_FILE}; pickled adapters are not opened: save with safe_serialization=True")
        try:
            with safe_open(self._file, framework="pt") as opened:
                keys = set(opened.keys())
        except (SafetensorError, OSError) as error:
            raise BadInput(f"{self._file}: cannot be read: {explain(error)}") from None
        modules = {key.removeprefix(PREFIX).removesuffix(_DOWN) for key in keys if key.endswith(_DOWN)}
        expected = {f"{PREFIX}{name}{part}" for name in modules for part in (_DOWN, _UP)}
        if not modules or (strange := sorted(keys ^ expected)):
            what = f"{strange[0]} is none of" if modules else "there are no"
            raise BadInput(f"{self._file}: {what} low-rank changes of linear layers, which are all that can be merged")
        self.names = sorted(modules)

    def change(self, name: str) -> Change:
        """What is added to that module."""
        with safe_open(self._file, framework="pt") as opened:
            down, up = (opened.get_tensor(f"{PREFIX}{name}{part}") for part in (_DOWN, _UP))
        if down.dim() != 2 or up.dim() != 2 or down.shape[0] != up.shape[1]:
            raise BadInput(f"{self._file}: {name}: matrices {tuple(up.shape)} and {tuple(down.shape)} have no product")
        alpha, rank = self._alpha(name), down.shape[0]
        scale = alpha / (math.sqrt(rank) if self._config.get("use_rslora") else rank)
        return Change(down, up * scale)

    def _alpha(self, name: str) -> float:
        """Of the first pattern that the end of the name is like, as peft reads them."""
        patterns = self._config.get("alpha_pattern") or {}
        own = next((value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", name)), None)
        return float(self._config["lora_alpha"] if own is None else own)


def _config(path: Path) -> dict[str, Any]:
    file = path / CONFIG_FILE
    if not file.is_file():
        raise BadInput(f"{path}: no {CONFIG_FILE}: this is no adapter of peft's")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        kind, alpha = config["peft_type"], float(config["lora_alpha"] if config["peft_type"] == "LORA" else 0)
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{file}: cannot be read: {explain(error)}") from None
    if kind != "LORA" or not math.isfinite(alpha):
        raise BadInput(f"{file}: peft_type is {kind}, and only those of LORA are sums of two matrices that can be merged")
    for key, what in _UNREAD.items():
        if config.get(key):
            raise BadInput(f"{file}: {what} ({key}) cannot be merged; merge them with peft's merge_and_unload() first")
    return config
