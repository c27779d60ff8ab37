"""Parts joined byte by byte are the file that one save would have made, whatever their shapes and dtypes."""

from __future__ import annotations

import json
import struct
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from compress.writer import BlockStore, join

DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
)  # fmt: skip


def random_tensor(shape: list[int], dtype: torch.dtype, seed: int) -> Tensor:
    numbers = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed)) * (seed % 50)
    return numbers.to(dtype)


@st.composite
def parts(draw: st.DrawFn) -> list[dict[str, Tensor]]:
    """One to four files of tensors with odd sizes, scalars and empty ones among them."""
    kinds = st.tuples(st.lists(st.integers(0, 5), max_size=3), st.sampled_from(DTYPES), st.integers(0, 1000))
    found = draw(st.lists(st.lists(kinds, max_size=5), min_size=1, max_size=4))
    return [{f"part.{i}.tensor.{j}": random_tensor(*kind) for j, kind in enumerate(part)} for i, part in enumerate(found)]


def header(file: Path) -> tuple[dict, int]:
    with open(file, "rb") as stream:
        length = struct.unpack("<Q", stream.read(8))[0]
        return json.loads(stream.read(length)), 8 + length


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(parts())
def test_join_equals_one_save(parts: list[dict[str, Tensor]]):
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        files = [directory / f"{i}.safetensors" for i in range(len(parts))]
        for file, part in zip(files, parts, strict=True):
            save_file(part, file)
        everything = {key: tensor for part in parts for key, tensor in part.items()}
        save_file(everything, directory / "once.safetensors", {"format": "pt"})

        entries = join(files, directory / "joined.safetensors")

        joined, once = load_file(directory / "joined.safetensors"), load_file(directory / "once.safetensors")
        assert set(entries) == set(joined) == set(once)
        for key, tensor in once.items():
            assert joined[key].dtype == tensor.dtype and joined[key].shape == tensor.shape
            assert torch.equal(joined[key].view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8))
        found, start = header(directory / "joined.safetensors")
        assert found.pop("__metadata__") == {"format": "pt"}
        for key, entry in found.items():
            assert (start + entry["data_offsets"][0]) % everything[key].element_size() == 0
        assert (directory / "joined.safetensors").stat().st_size == start + sum(t.nbytes for t in everything.values())
        assert not list(directory.glob("*.writing"))


def write_parts(store: BlockStore, tensors: dict[str, Tensor], n_parts: int) -> list[str]:
    names = sorted(tensors)
    for i in range(n_parts):
        store.write(f"part-{i}", {name: tensors[name] for name in names[i::n_parts]}, {"number": i})
    return [f"part-{i}" for i in range(n_parts)]


@pytest.mark.parametrize("max_shard_bytes", [1, 60_000, 120_000])
def test_shards_reload_in_transformers(make_checkpoint, reload, tmp_path: Path, max_shard_bytes: int):
    source = make_checkpoint("llama", torch.bfloat16)
    tensors = load_file(source / "model.safetensors")
    store = BlockStore(tmp_path / "blocks")
    names = write_parts(store, tensors, 5)
    out = tmp_path / "out"
    out.mkdir()
    files = store.assemble(names, out, max_shard_bytes)
    (out / "config.json").write_bytes((source / "config.json").read_bytes())

    assert len(files) > 1 and sorted(out.glob("*.safetensors")) == files
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert set(index["weight_map"]) == set(tensors)
    for file in files:
        with safe_open(file, "pt") as reader:
            assert set(reader.keys()) == {name for name, shard in index["weight_map"].items() if shard == file.name}
    if max_shard_bytes > 60_000:  # no single part is larger
        assert all(file.stat().st_size <= max_shard_bytes for file in files)
    ours, theirs = reload(out, torch.bfloat16).state_dict(), reload(source, torch.bfloat16).state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_one_shard_has_no_index(make_checkpoint, tmp_path: Path):
    tensors = load_file(make_checkpoint("llama") / "model.safetensors")
    store = BlockStore(tmp_path / "blocks")
    files = store.assemble(write_parts(store, tensors, 3), tmp_path)
    assert files == [tmp_path / "model.safetensors"]
    assert not (tmp_path / "model.safetensors.index.json").exists()


def test_a_part_is_done_when_its_record_is_there(tmp_path: Path):
    store = BlockStore(tmp_path)
    assert not store.done("part")
    store.write("part", {"x": torch.arange(3)}, {"note": 1})
    assert store.done("part") and store.record("part") == {"note": 1}
    assert torch.equal(store.tensors("part")["x"], torch.arange(3))
    (tmp_path / "part.json").unlink()
    assert not store.done("part")
    assert not list(tmp_path.glob("*.writing"))


def test_strided_and_shared_tensors_are_written_whole(tmp_path: Path):
    matrix = torch.arange(12.0).reshape(3, 4)
    store = BlockStore(tmp_path)
    store.write("part", {"transposed": matrix.T, "column": matrix[:, 1]}, {})
    assert torch.equal(store.tensors("part")["transposed"], matrix.T)
    assert torch.equal(store.tensors("part")["column"], matrix[:, 1])
