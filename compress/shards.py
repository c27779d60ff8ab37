"""Weight files as they lie in a directory: which tensor is where, and reads of one at a time, distrustful of every byte."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from compress.errors import BadInput, explain

INDEX = "model.safetensors.index.json"


class Shards:
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
            named = read_json(path / INDEX, "cannot be read:").get("weight_map", {})
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


def _weight_files(path: Path) -> list[Path]:
    if not (path / INDEX).exists():
        single = path / "model.safetensors"
        return [single] if single.exists() else sorted(path.glob("*.safetensors"))
    weight_map = read_json(path / INDEX, "cannot be read:").get("weight_map")
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


def read_json(file: Path, complaint: str) -> dict[str, Any]:
    """The JSON object in a file. Raises :class:`BadInput` for anything else; complaint: what to say where it is missing."""
    try:
        value = json.loads(file.read_text())
    except FileNotFoundError:
        raise BadInput(f"{file.parent} {complaint} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{file}: cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise BadInput(f"{file}: expected a JSON object")
    return value
