"""Write an artifact so that a crash at any point loses nothing and leaves nothing half-written.

Each finished block goes to a file of its own, with its records in a JSON beside it; both are written aside, synced and then
renamed, so their presence *is* the journal. When the last block is in, the files are joined into shards byte by byte,
without loading them.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

MAX_SHARD_BYTES = 5 * 10**9
_LENGTH_BYTES = 8  # the header's length, little-endian
_ITEM_BYTES = {
    "F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip


class BlockStore:
    """Files of finished parts under ``directory``: one per decoder block, and one for what belongs to no block."""

    def __init__(self, directory: Path):
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def _file(self, part: str) -> Path:
        return self.directory / f"{part}.safetensors"

    def done(self, part: str) -> bool:
        """Whether that part has been written completely."""
        return self._file(part).exists() and self._file(part).with_suffix(".json").exists()

    def write(self, part: str, tensors: Mapping[str, Tensor], record: dict[str, Any]) -> None:
        """Store a part. The record is renamed last: it is what says that the part is done."""
        file = self._file(part)
        aside = file.with_suffix(".writing")
        save_tensors({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, aside, {"format": "pt"})
        _sync(aside)
        os.replace(aside, file)
        write_text(file.with_suffix(".json"), json.dumps(record))

    def record(self, part: str) -> dict[str, Any]:
        """The record of a finished part."""
        return json.loads(self._file(part).with_suffix(".json").read_text())

    def tensors(self, part: str) -> dict[str, Tensor]:
        """The tensors of a finished part, mapped from its file."""
        from safetensors import safe_open

        with safe_open(self._file(part), framework="pt") as reader:
            return {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118

    def assemble(self, parts: list[str], destination: Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> list[Path]:
        """Join the parts, in order, into ``model*.safetensors`` (and an index where there are several)."""
        shards: list[list[Path]] = [[]]
        size = 0
        for file in (self._file(part) for part in parts):
            if shards[-1] and size + file.stat().st_size > max_shard_bytes:
                shards.append([])
                size = 0
            shards[-1].append(file)
            size += file.stat().st_size
        count = len(shards)
        names = ["model.safetensors"] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        weight_map: dict[str, str] = {}
        total = 0
        for name, files in zip(names, shards, strict=True):
            header = join(files, destination / name)
            weight_map.update(dict.fromkeys(header, name))
            total += sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in header.values())
        if count > 1:
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            write_text(destination / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
        return [destination / name for name in names]


def join(files: list[Path], destination: Path) -> dict[str, Any]:
    """Concatenate safetensors files into one without loading their tensors; returns its header.

    Wider dtypes come first, so that every tensor is aligned: the format allows no padding in between.
    """
    entries = []
    for file in files:
        own, data = _header(file)
        entries += [(file, data, name, entry) for name, entry in own.items()]
    entries.sort(key=lambda item: -_ITEM_BYTES[item[3]["dtype"]])
    header: dict[str, Any] = {}
    offset = 0
    for _, _, name, entry in entries:
        start, stop = entry["data_offsets"]
        header[name] = {**entry, "data_offsets": [offset, offset + stop - start]}
        offset += stop - start
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + _LENGTH_BYTES) % 8)
    aside = destination.with_suffix(".writing")
    with open(aside, "wb") as output:
        output.write(struct.pack("<Q", len(text)) + text)
        for file, data, _, entry in entries:
            start, stop = entry["data_offsets"]
            with open(file, "rb") as source:
                source.seek(data + start)
                _copy(source, output, stop - start)
        output.flush()
        os.fsync(output.fileno())
    os.replace(aside, destination)
    return header


def _copy(source: BinaryIO, output: BinaryIO, n_bytes: int) -> None:
    while n_bytes > 0:
        chunk = source.read(min(n_bytes, 1 << 22))
        output.write(chunk)
        n_bytes -= len(chunk)


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """(entries, offset of the first tensor byte)."""
    with open(file, "rb") as stream:
        length = struct.unpack("<Q", stream.read(_LENGTH_BYTES))[0]
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    return header, _LENGTH_BYTES + length


def save_tensors(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file. Raises the OSError of a full disk, which that library wraps in an exception of its own."""
    try:
        save_file(tensors, file, metadata)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(file)) from error


def write_text(file: Path, text: str) -> None:
    """Write a text file aside, sync it, then rename it into place."""
    aside = file.with_name(file.name + ".writing")
    aside.write_text(text)
    _sync(aside)
    os.replace(aside, file)


def _sync(file: Path) -> None:
    with open(file, "rb") as stream:
        os.fsync(stream.fileno())
