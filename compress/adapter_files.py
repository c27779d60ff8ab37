"""Adapters that peft has written: low-rank changes of a model's layers, read lazily."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, FiniteFloat, StrictBool, ValidationError, field_validator
from safetensors import SafetensorError, safe_open
from torch import Tensor

from compress.checkpoint import resolve
from compress.errors import BadInput, explain
from compress.export.peft import CONFIG_FILE, PREFIX, TENSOR_FILE
from compress.shards import digest_files

_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules",
    "fan_in_fan_out", "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_bias", "lora_dropout",
    "lora_ga_config", "megatron_config", "megatron_core", "modules_to_save", "peft_version", "qalora_group_size", "r",
    "rank_pattern", "revision", "runtime_config", "target_modules", "task_type", "trainable_token_indices", "use_qalora",
}  # fmt: skip
"""What says how an adapter was trained, and what its tensors show as well. Anything else might change what it computes."""


class Change(NamedTuple):
    """``up @ down`` is added to a layer's matrix. down: (rank, in); up: (out, rank), scaled; float32."""

    down: Tensor
    up: Tensor


class _Config(BaseModel):
    model_config = ConfigDict(extra="allow")

    peft_type: str
    lora_alpha: FiniteFloat = 0.0
    alpha_pattern: dict[str, FiniteFloat] = {}
    use_rslora: StrictBool = False
    init_lora_weights: StrictBool | str | None = True

    @field_validator("alpha_pattern")
    @classmethod
    def _expressions(cls, value: dict[str, float]) -> dict[str, float]:
        for pattern in value:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
        return value


class AdapterFiles:
    """source: a directory, or a hub id. names: of the modules that it changes. digest: of its files.

    Raises :class:`BadInput` for anything but a LoRA in safetensors that changes linear layers of the base model and nothing else.
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
        self.names = sorted(key.removeprefix(PREFIX).removesuffix(_DOWN) for key in keys if key.endswith(_DOWN))
        strange = sorted(keys ^ {f"{PREFIX}{name}{part}" for name in self.names for part in (_DOWN, _UP)})
        if strange or not self.names:
            what = f"{strange[0]} is" if strange else "there is"
            raise BadInput(f"{self._file}: {what} no low-rank change of a linear layer; {_MERGE_THERE}")
        for name in self.names:
            self.change(name)
        self.digest = digest_files([self.path / CONFIG_FILE, self._file])

    def change(self, name: str) -> Change:
        """What is added to that module."""
        with safe_open(self._file, framework="pt") as opened:
            down, up = (opened.get_tensor(f"{PREFIX}{name}{part}") for part in (_DOWN, _UP))
        if not {down.dtype, up.dtype} <= {*_DTYPES}:
            raise BadInput(f"{self._file}: {name} is of {down.dtype} and {up.dtype}; adapters are of floating-point numbers")
        if down.dim() != 2 or up.dim() != 2 or not down.numel() or down.shape[0] != up.shape[1]:
            raise BadInput(f"{self._file}: {name}: matrices {tuple(up.shape)} and {tuple(down.shape)} have no product")
        if not bool(down.isfinite().all() and up.isfinite().all()):
            raise BadInput(f"{self._file}: {name} has values that are not finite")
        alpha, rank = self._alpha(name), down.shape[0]
        scale = alpha / (math.sqrt(rank) if self._config.use_rslora else rank)
        return Change(down.float(), up.float() * scale)

    def _alpha(self, name: str) -> float:
        """Of the first pattern that the end of the name is like, as peft reads them."""
        patterns = self._config.alpha_pattern.items()
        return next((alpha for pattern, alpha in patterns if re.match(rf"(.*\.)?({pattern})$", name)), self._config.lora_alpha)


_MERGE_THERE = "all else is merged by peft itself: merge_and_unload(), then save_pretrained()"


def _config(path: Path) -> _Config:
    file = path / CONFIG_FILE
    if not file.is_file():
        inner = sorted(found.parent.name for found in path.glob(f"*/{CONFIG_FILE}"))
        raise BadInput(f"{path}: no {CONFIG_FILE}{f' (did you mean {path / inner[0]}?)' if inner else ': no adapter of peft'}")
    try:
        config = _Config.model_validate(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, RecursionError, ValidationError) as error:
        raise BadInput(f"{file}: cannot be read: {explain(error)}") from None
    if config.peft_type != "LORA":
        raise BadInput(f"{file}: peft_type is {config.peft_type}, and compress merges those of LORA; {_MERGE_THERE}")
    start = config.init_lora_weights
    if isinstance(start, str) and start not in ("gaussian", "orthogonal", "eva", "mica"):
        raise BadInput(f"{file}: init_lora_weights={start} changed the base model before training; {_MERGE_THERE}")
    if other := next((key for key, value in (config.model_extra or {}).items() if value and key not in _HARMLESS), None):
        raise BadInput(f"{file}: {other} may change what the adapter computes; {_MERGE_THERE}")
    return config
