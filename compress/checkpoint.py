"""Read a checkpoint lazily and distrustfully: one tensor at a time, safetensors only, nothing outside its directory.

Names are the model's own state-dict names; what files call differently (a missing ``transformer.`` prefix, a tied head
stored instead of the embedding) is resolved here once.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import struct
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from compress.arch import Architecture, architecture
from compress.errors import BadInput, explain
from compress.export.compressed_tensors import read_weight
from compress.manifest import Manifest
from compress.weights import Weight

log = logging.getLogger(__name__)

INDEX = "model.safetensors.index.json"
_LEGACY = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias")
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


class Checkpoint:
    """A Hugging Face causal-LM directory, read lazily.

    path: the directory. config: the configuration of the underlying architecture (an artifact's own wrapping removed).
    arch: its row in ``arch.py``. manifest: what compress did to it before, or None.
    """

    def __init__(self, path: Path, *, trust_remote_code: bool = False, allow_pickle: bool = False):
        self.path = path
        self.trust_remote_code = trust_remote_code
        self.raw_config = _read_json(path / "config.json", "is not a Hugging Face model directory: config.json")
        self._refuse_remote_code()
        has_experts = any("expert" in key for key in self.raw_config) or "moe" in self.base_model_type
        self.arch: Architecture = architecture(self.base_model_type, has_experts=has_experts)
        self._readers = _Shards(path, allow_pickle)
        self.manifest = Manifest.read(path)
        self._check_quantization()

    @classmethod
    def open(cls, source: str | Path, **permissions: bool) -> Checkpoint:
        """Open a directory, a hub id or ``demo``. Raises :class:`BadInput` for what is missing, broken or unsafe."""
        return cls(resolve(source), **permissions)

    @property
    def base_model_type(self) -> str:
        """The architecture's model type, also of an artifact that carries a type of its own."""
        return str(self.raw_config.get("base_model_type") or self.raw_config.get("model_type") or "unknown")

    def _refuse_remote_code(self) -> None:
        own = self.raw_config.get("model_type") == "compress"  # opened by our own loader, its copy is never run
        if self.raw_config.get("auto_map") and not own and not self.trust_remote_code:
            raise BadInput(
                f"{self.path}: the checkpoint wants to run its own code (auto_map in config.json). If you trust it, pass "
                "--trust-remote-code; if transformers supports its model type natively, delete auto_map instead"
            )

    def _check_quantization(self) -> None:
        quantization = self.raw_config.get("quantization_config") or {}
        if not isinstance(quantization, dict):
            raise BadInput(f"{self.path / 'config.json'}: quantization_config is no JSON object: {quantization!r}")
        if quantization and quantization.get("quant_method") != "compressed-tensors":
            raise BadInput(
                f"{self.path}: already quantized by {quantization.get('quant_method')!r}, which compress does not read; "
                "start from the unquantized checkpoint or a compressed-tensors one"
            )

    @cached_property
    def config(self) -> Any:
        """The transformers configuration of the underlying architecture."""
        from transformers import AutoConfig

        raw = {k: v for k, v in self.raw_config.items() if k not in ("quantization_config", "compress_modules")}
        if raw.pop("base_model_type", None):
            raw.pop("auto_map", None)
            raw["architectures"] = raw.pop("base_architectures", None)
        raw["model_type"] = self.base_model_type
        if "auto_map" in raw:
            return AutoConfig.from_pretrained(self.path, trust_remote_code=self.trust_remote_code)
        kwargs = {key: value for key, value in raw.items() if key != "model_type"}
        try:
            return AutoConfig.for_model(self.base_model_type, **kwargs)
        except Exception as error:  # every kind of exception, depending on what is wrong with the values
            kind = f"not a valid {self.base_model_type} configuration"
            raise BadInput(f"{self.path / 'config.json'}: {kind}: {explain(error)}") from None

    @property
    def reshaped(self) -> dict[str, dict[str, Any]]:
        """Modules that differ from the architecture's own: ``{"kind": "low_rank", "rank": r}`` or ``{"kind": "linear"}``."""
        return self.raw_config.get("compress_modules", {})

    @cached_property
    def quantization(self) -> dict[str, Any] | None:
        """The compressed-tensors configuration, or None."""
        return self.raw_config.get("quantization_config")

    @property
    def keys(self) -> set[str]:
        """Tensor names as the files have them."""
        return set(self._readers.where)

    @cached_property
    def _prefix(self) -> str:
        return self.arch.blocks.split(".")[0] + "."

    def _key(self, name: str) -> str | None:
        """The file's name of a model tensor: itself, without the base model's prefix, or an alias of its architecture."""
        aliases = (other for own, other in self.arch.aliases if own == name)
        for candidate in (name, name.removeprefix(self._prefix), *aliases):
            if candidate in self._readers.where:
                return candidate
        return None

    def __contains__(self, name: str) -> bool:
        return self._key(name) is not None

    def tensor(self, name: str) -> Tensor:
        """One tensor, mapped from its file. Raises :class:`BadInput` where it is missing."""
        key = self._key(name)
        if key is None:
            raise BadInput(f"{self.path}: tensor {name!r} is missing from the checkpoint")
        return self._readers.read(key)

    def meta(self, name: str) -> Tensor:
        """The tensor's shape and dtype, as a meta tensor, without reading it."""
        key = self._key(name)
        if key is None:
            raise BadInput(f"{self.path}: tensor {name!r} is missing from the checkpoint")
        shape, dtype = self._readers.describe(key)
        return torch.empty(shape, dtype=dtype, device="meta")

    def weight(self, module: str, *, conv1d: bool = False, meta: bool = False) -> Weight:
        """The linear layer ``module`` in whatever representation the files hold; conv1d: a dense one is stored (in, out)."""

        def get(name: str) -> Tensor:
            return self.meta(name) if meta and not name.endswith(".weight_shape") else self.tensor(name)

        masked = self.manifest.is_masked if self.manifest else (lambda _: False)
        transposed = conv1d and module not in self.reshaped
        return read_weight(module, get, self.__contains__, self.quantization, masked=masked, transposed=transposed)

    def check_complete(self, names: set[str], modules: set[str]) -> None:
        """Raise :class:`BadInput` unless every tensor of the model is there; names outside ``modules`` must be as named."""
        missing = sorted(name for name in names if name not in self)
        missing += sorted(m for m in modules if not any(f"{m}{s}" in self for s in _WEIGHT_SUFFIXES))
        if missing:
            shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
            raise BadInput(f"{self.path}: the checkpoint lacks {len(missing)} tensors of its model: {shown}")
        wanted = {self._key(name) for name in names}
        extra = [
            key for key in self.keys - wanted
            if not key.endswith(_LEGACY) and not any(f"{m}." in f"{self._prefix}{key}" or key.startswith(m) for m in modules)
        ]  # fmt: skip
        if extra:
            log.warning(
                "%s: %d tensors belong to no module and are left out: %s",
                self.path,
                len(extra),
                ", ".join(sorted(extra)[:3]),
            )

    def check_finite(self) -> None:
        """Read every floating-point tensor once; raises :class:`BadInput` naming the first with NaN or infinity."""
        for key in sorted(self.keys):
            tensor = self._readers.read(key)
            if tensor.is_floating_point() and tensor.numel():
                low, high = torch.aminmax(tensor.float() if tensor.itemsize == 1 else tensor)
                if not (torch.isfinite(low) and torch.isfinite(high)):
                    raise BadInput(f"{self.path}: tensor {key!r} contains NaN or infinite weights; the checkpoint is broken")
        self.unmap()

    def unmap(self) -> None:
        """Let go of the files' mappings, whose pages count as this process's; the next read maps them again."""
        self._readers.unmap()

    @cached_property
    def digest(self) -> str:
        """SHA-256 over config and weight files, in the order of their names."""
        return digest_files([self.path / "config.json", *self._readers.files])

    @property
    def files(self) -> list[Path]:
        """The weight files, in the order of their names."""
        return self._readers.files

    @property
    def nbytes(self) -> int:
        """Bytes of the weight files."""
        return sum(file.stat().st_size for file in self._readers.files)

    def copy_companions(self, destination: Path) -> None:
        """Copy tokenizer, generation config and the like, but no weights, code, or what compress writes itself."""
        for file in sorted(self.path.iterdir()):
            if (file.is_file() and file.name in _COMPANIONS) or file.name.startswith(("tokenizer", "special_tokens")):
                shutil.copyfile(file, destination / file.name)


_WEIGHT_SUFFIXES = (".weight", ".weight_packed", ".down.weight", ".down.weight_packed")
_COMPANIONS = (
    "generation_config.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja",
    "chat_template.json", "spiece.model", "sentencepiece.bpe.model", "LICENSE", "LICENSE.txt", "NOTICE",
)  # fmt: skip


class _Shards:
    """Tensor name -> file, and lazy reads."""

    def __init__(self, path: Path, allow_pickle: bool):
        self._open: dict[Path, Any] = {}
        self._pickled: dict[str, Tensor] = {}
        self.headers: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        self.files = _weight_files(path)
        if not self.files:
            self.files = pickled = sorted(path.glob("pytorch_model*.bin"))
            if not pickled:
                raise BadInput(f"{path}: no *.safetensors file found; download the weights, or convert them to safetensors")
            if not allow_pickle:
                raise BadInput(
                    f"{path}: only pickled weights ({pickled[0].name}) found; a pickle can run code when it is opened. Convert "
                    "the checkpoint to safetensors, or pass --allow-pickle if you trust it"
                )
            for file in pickled:
                self._pickled.update(_read_pickle(file))
            self.where = dict.fromkeys(self._pickled, pickled[0])
            return
        self.where: dict[str, Path] = {}
        for file in self.files:
            for key, description in read_header(file).items():
                self.where[key] = file
                self.headers[key] = description
        self._check_index(path)

    def _check_index(self, path: Path) -> None:
        if (path / INDEX).exists():
            named = _read_json(path / INDEX, "cannot be read:").get("weight_map", {})
            for key, file in named.items():
                if key not in self.where or self.where[key].name != Path(file).name:
                    raise BadInput(f"{path / INDEX}: says that {key!r} is in {file!r}, which does not hold it")

    def describe(self, key: str) -> tuple[tuple[int, ...], torch.dtype]:
        if key in self._pickled:
            return tuple(self._pickled[key].shape), self._pickled[key].dtype
        return self.headers[key]

    def read(self, key: str) -> Tensor:
        if key in self._pickled:
            return self._pickled[key]
        file = self.where[key]
        if file not in self._open:
            self._open[file] = safe_open(file, framework="pt", device="cpu")
        return self._open[file].get_tensor(key)

    def unmap(self) -> None:
        self._open.clear()


def resolve(source: str | Path) -> Path:
    """A local directory for a path, a hub id or ``demo``. Raises :class:`BadInput` where there is none."""
    if str(source) == "demo":
        from compress.demo import MODEL

        return MODEL
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or str(source).startswith((".", "~")) or str(source).count("/") > 1 or path.exists():
        raise BadInput(f"{source}: no such model directory")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), allow_patterns=_HUB_FILES))
    except Exception as error:  # the hub client raises a dozen kinds, all of which mean the same to the user
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BadInput(f"{source}: neither a local directory nor a model that the hub gave: {reason}") from None


def _weight_files(path: Path) -> list[Path]:
    if not (path / INDEX).exists():
        single = path / "model.safetensors"
        return [single] if single.exists() else sorted(path.glob("*.safetensors"))
    weight_map = _read_json(path / INDEX, "cannot be read:").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(name, str) for name in weight_map.values()):
        raise BadInput(f"{path / INDEX}: holds no weight_map from tensors to files")
    files = []
    for name in sorted(set(weight_map.values())):
        relative = Path(name)
        if relative.is_absolute() or ".." in relative.parts:
            raise BadInput(f"{path / INDEX}: entry {name!r} points outside the checkpoint's directory; refusing to read it")
        if not (path / relative).is_file():
            raise BadInput(f"{path}: shard {name!r} named by {INDEX} is missing; download it again")
        files.append(path / relative)
    return files


_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


def read_header(file: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Names, shapes and dtypes of a safetensors file. Raises :class:`BadInput` where it is truncated or damaged."""
    try:
        with open(file, "rb") as stream:
            length = struct.unpack("<Q", stream.read(8))[0]
            header = json.loads(stream.read(length)) if length <= file.stat().st_size else None
        if header is None:
            raise ValueError("header is cut off")
        if not isinstance(header, dict):
            raise ValueError("header is no JSON object")
        header.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if 8 + length + end != file.stat().st_size:
            raise ValueError(f"{file.stat().st_size} bytes where {8 + length + end} are promised")
        with safe_open(file, framework="pt"):
            pass
        return {key: (tuple(entry["shape"]), _DTYPES[entry["dtype"]]) for key, entry in header.items()}
    except (ValueError, KeyError, TypeError, RecursionError, struct.error, SafetensorError) as error:
        raise BadInput(f"{file}: truncated or damaged safetensors file ({error}); download it again") from None


def _read_pickle(file: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zipfile(file))
    except UnpicklingError:
        raise BadInput(f"{file}: holds more than tensors, and opening that could run code; refusing to read it") from None
    except Exception as error:  # torch raises every kind of exception for a damaged file
        reason = explain(error).partition(". ")[0]
        raise BadInput(f"{file}: truncated or damaged pickle ({reason}); download it again") from None
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise BadInput(f"{file}: expected tensors by name, it holds something else")
    return content


def digest_files(files: list[Path]) -> str:
    """SHA-256 over the names and contents of files."""
    total = hashlib.sha256()
    for file in files:
        total.update(file.name.encode())
        for chunk in _chunks(file):
            total.update(chunk)
    return total.hexdigest()


def _chunks(file: Path, size: int = 1 << 22) -> Iterator[bytes]:
    with open(file, "rb") as stream:
        while chunk := stream.read(size):
            yield chunk


def _read_json(file: Path, complaint: str) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text())
    except FileNotFoundError:
        raise BadInput(f"{file.parent} {complaint} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{file}: cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise BadInput(f"{file}: expected a JSON object")
    return value
