"""Write an artifact as one GGUF file, which llama.cpp and what is built on it run.

Two passes: the shapes say where every tensor will lie, so that the weights then go into the file one by one, whatever the
model's size. A variant names the type of the matrices: ``gguf:q4_0``. A grid that fits the type's blocks (signed and up to
4 bits wide for q4_0, say, in groups of a multiple of 32) keeps its codes, and with them what a quantizer made of them; so do
ternary matrices in tq1_0 and tq2_0, and in q4_0 where their rows are no multiple of 256. Everything else is multiplied out and
rounded anew. K-quants and their like are rounded by llama.cpp itself.

Norms, biases and embedded positions stay f32. The token embedding and the head are q8_0 under types of 4 and 5 bits and
f16 under narrower ones, as their rows matter more than their size.
"""

from __future__ import annotations

import ctypes
import importlib
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from compress.checkpoint import Checkpoint
from compress.errors import BadInput, CompressError
from compress.export.gguf_architectures import Row, add_metadata, rope_tensors, row_factor, row_of, row_order
from compress.export.gguf_vocabulary import read_vocabulary
from compress.methods import did_you_mean
from compress.skeleton import Skeleton
from compress.weights import Masked, Quantized, Weight, opened
from compress.workspace import Workspace, check_not_source

log = logging.getLogger(__name__)

DEFAULT = "f16"
_BLOCK = 32
_FLOATS = ("f32", "f16", "bf16")
_WRITTEN = {  # what the gguf package rounds -> the type of the token embedding and the head
    "f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0", "q5_0": "Q8_0", "q5_1": "Q8_0", "q4_0": "Q8_0", "q4_1": "Q8_0",
    "mxfp4": "F16", "tq2_0": "F16", "tq1_0": "F16",
}  # fmt: skip
_FILE_TYPES = {"f32": "ALL_F32", "mxfp4": "MOSTLY_MXFP4_MOE"}  # by their number; all others are MOSTLY_ and the type
_BY_LLAMA_CPP = (
    "q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k", "iq3_s", "iq3_m",
    "iq4_nl", "iq4_xs",
)  # fmt: skip
_SYNONYMS = {"q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m"}
VARIANTS = (*_WRITTEN, *_BY_LLAMA_CPP)
_GRIDS = {"Q4_0": (4, False), "Q4_1": (4, True), "Q5_0": (5, False), "Q5_1": (5, True), "Q8_0": (8, False)}  # bits, minimum
_TERNARY = {"TQ1_0": "Q4_0", "TQ2_0": "Q4_0"}  # what holds their codes too where rows are no multiple of 256, as in llama.cpp
_TERNARY_BLOCK = 256
_LARGEST_HALF = 65504.0
_WARNING_OR_ERROR, _CONTINUED = (3, 4), 5  # of llama.cpp's log levels
_SMALLEST_HALF = 2.0**-14  # below, half precision loses digits


class Entry(NamedTuple):
    """A tensor of the file. shape: as torch has it. kind: the type's name. read: its values or codes, float32 or packed."""

    name: str
    shape: tuple[int, ...]
    kind: str
    read: Callable[[], np.ndarray]


@torch.no_grad()
def export(source: Path, out: Path, *, overwrite: bool = False, variant: str | None = None) -> Path:
    """Write ``source`` as the GGUF file ``out``.

    variant: one of ``VARIANTS``, the type of the matrices; None for f16. Raises BadInput where ``out`` exists, a package is
    missing, the variant is unknown, or llama.cpp does not compute the model.
    """
    kind = _check_variant(variant)
    gguf = _library("gguf", "gguf", "GGUF files are written by the gguf package")
    llama = _library("llama_cpp", "gguf-run", f"{kind} is rounded by llama.cpp") if kind in _BY_LLAMA_CPP else None
    checkpoint = Checkpoint(source)
    check_not_source(out, source)
    row = row_of(checkpoint.base_model_type, checkpoint.config)
    skeleton = Skeleton(checkpoint)
    skeleton.check()
    first = "f32" if llama else kind
    layout = _Layout(gguf, skeleton, row, first)
    with Workspace(_claim(out, overwrite), f"gguf-{kind}-{checkpoint.digest}", overwrite) as workspace:
        written = sum(_nbytes(gguf, entry) for part in layout.parts for entry in part)
        workspace.check_space(2 * written if llama else written)
        stage = workspace.directory / "files"
        try:
            stage.mkdir(exist_ok=True)
            file = stage / f"{first}.gguf"
            _write(gguf, file, layout.parts, row, checkpoint, first)
            if llama:
                file = _round_by_llama_cpp(gguf, llama, file, stage / f"{kind}.gguf", kind)
            _sync(file)
        except BaseException:
            workspace.discard()  # one file written in one go: there is nothing to continue
            raise
        workspace.publish(file, out)
    if layout.unpacked and kind not in _FLOATS:
        log.warning("%d quantized layers do not fit the blocks of %s and were rounded a second time", layout.unpacked, kind)
    return out


def _check_variant(variant: str | None) -> str:
    name = (variant or DEFAULT).lower()
    name = _SYNONYMS.get(name, name)
    if name not in VARIANTS:
        raise BadInput(f"gguf:{variant}: unknown type{did_you_mean(name, dict.fromkeys(VARIANTS))}; types: {', '.join(VARIANTS)}")
    return name


def _library(module: str, extra: str, why: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise BadInput(f"{why}, which is not installed; run: pip install 'compress-lm[{extra}]'") from None


def _claim(out: Path, overwrite: bool) -> Path:
    """The path that the workspace is to claim: ``out``, or where a GGUF file lies there that is to be replaced, one beside it."""
    if not out.exists() or not overwrite:
        return out
    with suppress(OSError), open(out, "rb") as file:
        if file.read(4) == b"GGUF":
            return out.with_name(out.name + ".new")  # a workspace takes nothing but model directories for replaceable
    raise BadInput(f"{out} is not a GGUF file and will not be replaced; choose another -o")


def _sync(file: Path) -> None:
    with open(file, "rb") as stream:
        os.fsync(stream.fileno())


# what goes into the file


class _Layout:
    """The file's tensors in order, and how each is read."""

    def __init__(self, gguf: Any, skeleton: Skeleton, row: Row, variant: str):
        self.gguf, self.skeleton, self.row = gguf, skeleton, row
        self.checkpoint, self.config = skeleton.checkpoint, skeleton.checkpoint.config
        self.matrices, self.outer_matrices = variant.upper(), _WRITTEN[variant]
        architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == row.name)
        self.names = gguf.get_tensor_name_map(architecture, len(skeleton.blocks))
        self.read_weights = lru_cache(maxsize=1)(skeleton.read_weights)  # the block at hand
        self.unpacked = 0  # grids whose codes could not be kept
        self.parts = [self._outer(), *(self._block(index) for index in range(len(skeleton.blocks)))]

    def _name(self, name: str) -> str:
        found = self.names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise BadInput(f"{name}: llama.cpp has no such tensor in its {self.row.name}")
        return found

    def _fitting(self, name: str, shape: tuple[int, ...], kind: str) -> str:
        """The wanted type, or where its blocks do not divide the rows q4_0 for a ternary one, and f16 for all others."""
        block = self.gguf.GGML_QUANT_SIZES[self.gguf.GGMLQuantizationType[kind]][0]
        if shape[-1] % block == 0:
            return kind
        instead = _TERNARY.get(kind, "F16")
        what = "stays f16" if instead == "F16" else f"becomes {instead.lower()}"
        log.warning("%s: rows of %d are no multiple of the %d that %s packs together; it %s", name, shape[-1], block, kind, what)
        return instead if instead == "F16" else self._fitting(name, shape, instead)

    def _outer(self) -> list[Entry]:
        part = []
        for name in self.skeleton.outer_names():
            source, own = self.skeleton.outer_source(name), self._name(name)
            shape = tuple(self.checkpoint.meta(source).shape)
            if len(shape) < 2 or own.startswith("position_embd"):
                part.append(Entry(own, shape, "F32", partial(self._read_plain, source)))
                continue
            kind = self._fitting(name, shape, self.outer_matrices)
            part.append(Entry(own, shape, kind, partial(self._read_outer_matrix, source, kind)))
        if self.row.own_head and all(entry.name != "output.weight" for entry in part):
            part.append(next(e for e in part if e.name == "token_embd.weight")._replace(name="output.weight"))
        for name, values in rope_tensors(self.config).items():
            part.append(Entry(name, tuple(values.shape), "F32", values.numpy))
        return part

    def _block(self, index: int) -> list[Entry]:
        part = []
        for local in self.skeleton.arch.linears:
            name = self.skeleton.module_name(index, local)
            shape = self.skeleton.shape(index, local)
            kind = self._fitting(name, shape, self.matrices)
            part.append(Entry(self._name(f"{name}.weight"), shape, kind, partial(self._read_linear, index, local, kind)))
        for name, source in self.skeleton.own_tensors(index).items():
            local = name.removeprefix(f"{self.skeleton.arch.blocks}.{index}.").removesuffix(".bias")
            shape = tuple(self.checkpoint.meta(source).shape)
            part.append(Entry(self._name(name), shape, "F32", partial(self._read_plain, source, local)))
        return part

    def _read_plain(self, source: str, local: str = "") -> np.ndarray:
        values = self.checkpoint.tensor(source).float()
        if self.row.norm_shift and source.endswith("norm.weight"):
            values = values + self.row.norm_shift
        order = row_order(self.row, local, len(values), self.config)
        return (values if order is None else values[order]).numpy()

    def _read_outer_matrix(self, source: str, kind: str) -> np.ndarray:
        return _packed(self.gguf, source, self.checkpoint.tensor(source).float(), kind)

    def _read_linear(self, index: int, local: str, kind: str) -> np.ndarray:
        weight = opened(self.read_weights(index)[local])
        order, factor = row_order(self.row, local, weight.shape[0], self.config), row_factor(self.row, local, self.config)
        if (packed := pack_grid(weight, kind, order, factor)) is not None:
            return packed
        self.unpacked += _grid_of(weight) is not None and kind == self.matrices and not rounds_to_itself(weight, kind)
        values = weight.dense(torch.float32) * factor
        return _packed(self.gguf, self.skeleton.module_name(index, local), values if order is None else values[order], kind)


# numbers


def _packed(gguf: Any, name: str, values: Tensor, kind: str) -> np.ndarray:
    if kind not in ("F32", "BF16") and not values.abs().max() <= _LARGEST_HALF:
        raise BadInput(
            f"{name}: weights above {_LARGEST_HALF:.0f} do not fit the half-precision numbers of {kind}; use bf16 or f32"
        )
    return gguf.quants.quantize(values.contiguous().numpy(), gguf.GGMLQuantizationType[kind])


def pack_grid(weight: Weight, kind: str, order: Tensor | None = None, factor: float = 1.0) -> np.ndarray | None:
    """A quantized matrix (out, in) in the blocks of a GGUF type with its codes kept: (out, bytes a row) uint8.

    kind: the type's name. order: rows to take, (out,). factor: multiplies every weight. None where the type does not hold
    the grid: other groups, wider codes, scales beyond half precision, or no grid at all.
    """
    grid = _grid_of(weight)
    if kind not in _GRIDS or grid is None or grid.group_size % _BLOCK:
        return None
    bits, has_minimum = _GRIDS[kind]
    per_block = grid.group_size // _BLOCK
    scale = (grid.scale.float() * factor).repeat_interleave(per_block, dim=1)
    codes = grid.codes.reshape(grid.shape[0], -1, _BLOCK).to(torch.int16)
    zero = torch.zeros_like(scale) if grid.zero_point is None else grid.zero_point.repeat_interleave(per_block, dim=1)
    if has_minimum:
        low = -(2 ** (grid.bits - 1))
        minimum, codes = (low - zero.float()) * scale, codes - low
        if grid.bits > bits or not _are_halves(minimum):
            return None
    else:
        minimum, codes = None, codes - zero.to(torch.int16).unsqueeze(-1)
        if codes.min() < -(2 ** (bits - 1)) or codes.max() >= 2 ** (bits - 1):
            return None
        codes = codes if bits == 8 else codes + 2 ** (bits - 1)
    if not _are_halves(scale):
        return None
    if order is not None:
        codes, scale = codes[order], scale[order]
        minimum = None if minimum is None else minimum[order]
    return _blocks(codes.numpy(), scale.numpy(), None if minimum is None else minimum.numpy(), bits)


def rounds_to_itself(weight: Weight, kind: str) -> bool:
    """Whether a ternary type rounds a matrix to the codes that it has: the largest magnitude in a block is then its scale."""
    grid = _grid_of(weight)
    if kind not in _TERNARY or grid is None or grid.zero_point is not None or grid.group_size % _TERNARY_BLOCK:
        return False
    return int(grid.codes.abs().max()) <= 1 and _are_halves(grid.scale.float())


def _grid_of(weight: Weight) -> Quantized | None:
    inner = weight.inner if isinstance(weight, Masked) else weight
    return inner if isinstance(inner, Quantized) else None


def _are_halves(values: Tensor) -> bool:
    size = values.abs()
    return bool(((size == 0) | ((size >= _SMALLEST_HALF) & (size <= _LARGEST_HALF))).all())


def _blocks(codes: np.ndarray, scale: np.ndarray, minimum: np.ndarray | None, bits: int) -> np.ndarray:
    """codes: (out, blocks, 32), from zero where they are narrower than 8 bits; scale, minimum: (out, blocks)."""
    pieces: list[np.ndarray] = [
        half[..., None].astype(np.float16).view(np.uint8) for half in (scale, minimum) if half is not None
    ]
    if bits == 8:
        pieces.append(codes.astype(np.int8).view(np.uint8))
    else:
        codes = codes.astype(np.uint8)
        if bits == 5:
            pieces.append(np.packbits(codes >> 4, axis=-1, bitorder="little"))
        low = codes & 15
        pieces.append(low[..., : _BLOCK // 2] | (low[..., _BLOCK // 2 :] << 4))
    return np.concatenate(pieces, axis=-1).reshape(codes.shape[0], -1)


# the file


def _nbytes(gguf: Any, entry: Entry) -> int:
    block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[entry.kind]]
    return int(np.prod(entry.shape)) // block * block_bytes


def _write(gguf: Any, file: Path, parts: list[list[Entry]], row: Row, checkpoint: Checkpoint, variant: str) -> None:
    """Header, metadata and places of all tensors first, then their data in the same order."""
    writer = gguf.GGUFWriter(file, row.name)
    try:
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(checkpoint.path.resolve().name)
        writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES.get(variant, f"MOSTLY_{variant.upper()}")])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        add_metadata(writer, row, checkpoint.config)
        vocabulary = read_vocabulary(checkpoint.path, checkpoint.config.vocab_size)
        for doubt in vocabulary.doubts:
            log.warning("%s: %s", checkpoint.path, doubt)
        vocabulary.add_to(writer)
        for entry in (entry for part in parts for entry in part):
            kind = gguf.GGMLQuantizationType[entry.kind]
            writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), _nbytes(gguf, entry), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for part in parts:
            for entry in part:
                writer.write_tensor_data(entry.read())
            checkpoint.unmap()
    finally:
        writer.close()


def _round_by_llama_cpp(gguf: Any, llama: Any, source: Path, target: Path, variant: str) -> Path:
    parameters = llama.llama_model_quantize_default_params()
    parameters.ftype = int(gguf.LlamaFileType[f"MOSTLY_{variant.upper()}"])
    parameters.nthread = torch.get_num_threads()
    with _messages(llama) as messages:
        failed = llama.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(parameters))
    for message in messages:  # which rows take another type than the variant's
        log.warning("llama.cpp: %s", message)
    if failed:
        raise CompressError(
            f"{target.name}: llama.cpp could not round the model: {messages[-1] if messages else 'no reason given'}"
        )
    source.unlink()
    return target


@contextmanager
def _messages(llama: Any) -> Iterator[list[str]]:
    """Collect llama.cpp's warnings and errors instead of letting it print every detail."""
    found: list[str] = []
    kept = False

    def hear(level: int, text: bytes, _: Any) -> None:
        nonlocal kept
        line = " ".join(text.decode("utf-8", "replace").split())
        if level != _CONTINUED and not line.startswith("->"):
            kept = level in _WARNING_OR_ERROR
            found.extend([line] if kept else [])
        elif kept:
            found[-1] += f" {line}"

    before, data, callback = llama.llama_log_callback(), ctypes.c_void_p(), llama.llama_log_callback(hear)
    llama.llama_log_get(ctypes.byref(before), ctypes.byref(data))
    llama.llama_log_set(callback, None)
    try:
        yield found
    finally:
        llama.llama_log_set(before, data)
