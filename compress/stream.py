"""THE block loop: read a block, gather the statistics its passes need, apply them, propagate, write, free.

Memory holds one block, its statistics and the calibration activations (on disk above a limit), whatever the model's size.
A finished block is never done again: a rerun loads what was written for it and only propagates, which gives bit for bit
the activations that the interrupted run had.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import BadInput, CompressError
from compress.export import compressed_tensors
from compress.manifest import ModuleRecord
from compress.passes import LinearPass
from compress.skeleton import Skeleton, shape_kind
from compress.stats import LinearStats, energy
from compress.weights import Dense, LowRank, Masked, Quantized, Weight, assert_structure_kept, structure
from compress.writer import BlockStore

log = logging.getLogger(__name__)

Progress = Callable[[int, int, str], None]
OUTER = "outer"
_TOKENS_PER_FORWARD = 4096
PROBE_SEQUENCES, PROBE_LENGTH = 2, 64


@dataclass
class Streamed:
    """records: what each linear layer became. reshaped: modules that need the shim loader. quantized: the packed linear
    modules, with meta tensors. probe: (tokens, logits) of the result in memory."""

    records: dict[str, ModuleRecord]
    reshaped: dict[str, dict[str, Any]]
    quantized: dict[str, Quantized]
    probe: tuple[Tensor, Tensor]

    def add(self, name: str, weight: Weight, record: ModuleRecord, conv1d: bool) -> None:
        """Take in one linear layer; conv1d: the architecture's own module is a Conv1D."""
        self.records[name] = record
        if kind := shape_kind(weight, conv1d):
            self.reshaped[name] = kind
        for module, matrix in matrices(name, weight):
            if isinstance(matrix, Quantized):
                self.quantized[module] = matrix.map(lambda tensor: tensor.to("meta"))  # type: ignore[assignment]


class _Enough(Exception):
    """Every wanted input has been seen: the rest of the block's forward would compute what nobody reads."""


class Stream:
    """One pass over the model's blocks with consecutive linear passes.

    tokens: (n, length) calibration windows; of these only two short ones are used where no pass needs statistics.
    store: receives finished blocks. spill_bytes: activations above this go to a memory-mapped file in ``scratch``.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        passes: Sequence[LinearPass],
        tokens: Tensor,
        store: BlockStore,
        scratch: Path,
        *,
        spill_bytes: int = 1 << 28,
        progress: Progress = lambda done, total, message: None,
    ):
        self.skeleton, self.passes, self.store, self.scratch = skeleton, tuple(passes), store, scratch
        self.spill_bytes, self.progress = spill_bytes, progress
        self.wanted = frozenset().union(*(step.needs.stats for step in passes)) if passes else frozenset()
        if self.wanted and any(step.factorises for step in passes):
            self.wanted |= {"hessian"}  # so that a later pass's statistics can be carried to the factors
        self.probe_tokens = tokens[:PROBE_SEQUENCES, :PROBE_LENGTH].contiguous()
        self.tokens = tokens if self.wanted else None
        self.sequential = any(step.sequential for step in passes)

    @torch.no_grad()
    def run(self) -> Streamed:
        """Compress every block that is not done yet, and the part outside the blocks."""
        n_blocks = len(self.skeleton.blocks)
        self._start_activations()
        result = Streamed({}, {}, {}, (self.probe_tokens, self.probe_tokens))
        for index in range(n_blocks):
            part = block_part(index)
            self.progress(index, n_blocks, f"block {index + 1} of {n_blocks}")
            if self.store.done(part):
                weights = self._read_back(index)
                self.skeleton.load_block(index, weights)
            else:
                weights = self._compress(index)
            self._propagate(index)
            self._describe(index, weights, result)
            self.skeleton.free_block(index)
            del weights
            _return_free_memory()
        if not self.store.done(OUTER):
            checkpoint = self.skeleton.checkpoint
            outer = {n: checkpoint.tensor(self.skeleton.outer_source(n)) for n in self.skeleton.outer_names()}
            self.store.write(OUTER, outer, {})
        self.progress(n_blocks, n_blocks, "blocks done")
        result.probe = (self.probe_tokens, self.skeleton.logits(self.probe_tokens, self.probe))
        if not bool(torch.isfinite(result.probe[1]).all()):
            raise CompressError("the compressed model's logits are not finite; use a milder setting, or --dtype float32")
        return result

    # activations

    def _start_activations(self) -> None:
        skeleton = self.skeleton
        self.activations: Tensor | None = None
        if self.tokens is not None:
            batch = max(1, _TOKENS_PER_FORWARD // self.tokens.shape[1])
            batches = list(self.tokens.split(batch))
            start = 0
            for hidden in skeleton.embed(batches):
                if self.activations is None:
                    self.activations = self._allocate((*self.tokens.shape, hidden.shape[-1]), hidden.dtype)
                self.activations[start : start + len(hidden)] = hidden.to("cpu")
                start += len(hidden)
            self.calls = skeleton.block_arguments
            self.batch = batch
        self.probe = next(iter(skeleton.embed([self.probe_tokens]))).cpu()
        self.probe_calls = skeleton.block_arguments

    def _allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        n_elements = torch.Size(shape).numel()
        if n_elements * dtype.itemsize <= self.spill_bytes:
            return torch.empty(shape, dtype=dtype)
        file = self.scratch / "activations.bin"
        log.info("calibration activations of %.1f GB go to %s", n_elements * dtype.itemsize / 1e9, file)
        return torch.from_file(str(file), shared=True, size=n_elements, dtype=dtype).reshape(shape)

    def _propagate(self, index: int) -> None:
        """Inputs of the next block, from the block as it is now."""
        skeleton = self.skeleton
        if self.activations is not None and index + 1 < len(skeleton.blocks):
            skeleton.block_arguments = self.calls
            for rows in self.activations.split(self.batch):
                rows.copy_(skeleton.run_block(index, rows))
        skeleton.block_arguments = self.probe_calls
        self.probe = skeleton.run_block(index, self.probe).cpu()

    # one block

    def _compress(self, index: int) -> dict[str, Weight]:
        skeleton = self.skeleton
        weights = skeleton.read_weights(index)
        block = skeleton.load_block(index, weights)
        records: dict[str, ModuleRecord] = {}
        groups = skeleton.arch.groups
        for step_groups in [(group,) for group in groups] if self.sequential else [groups]:
            gathered = self._collect(index, block, step_groups, weights)
            for group in step_groups:
                _return_free_memory()
                stats = gathered.pop(group, None)
                for local in group:
                    name = skeleton.module_name(index, local)
                    before, applied = weights[local], [step for step in self.passes if step.matches(name)]
                    for step in applied:
                        weights[local] = self._apply(step, name, weights[local], stats)
                    records[name] = describe(name, weights[local], before, [s.label() for s in applied], stats)
                    if applied:
                        skeleton.install(block, local, weights[local])
        self._write(index, block, weights, records)
        return weights

    def _collect(self, index: int, block: nn.Module, groups: Sequence[tuple[str, ...]], weights: dict[str, Weight]):
        """Statistics of the inputs of those groups that some pass compresses; empty where no pass needs any."""
        skeleton = self.skeleton
        names = {group: [skeleton.module_name(index, local) for local in group] for group in groups}
        wanted_groups = [g for g in groups if any(step.matches(n) for n in names[g] for step in self.passes if step.needs.stats)]
        if self.activations is None or not wanted_groups:
            return {}
        factored = {group for group in wanted_groups if any(isinstance(weights[local], LowRank) for local in group)}
        gathered = {
            group: LinearStats(
                weights[group[0]].shape[1], self.wanted | ({"hessian"} if group in factored else set()), skeleton.device
            )
            for group in wanted_groups
        }

        def hook(group: tuple[str, ...]):
            def see(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                gathered[group].add(inputs[0])
                if group == wanted_groups[-1]:
                    raise _Enough

            return see

        handles = [block.get_submodule(group[0]).register_forward_pre_hook(hook(group)) for group in wanted_groups]
        skeleton.block_arguments = self.calls
        try:
            for rows in self.activations.split(self.batch):
                try:
                    skeleton.run_block(index, rows)
                except _Enough:
                    continue
        finally:
            for handle in handles:
                handle.remove()
        for stats in gathered.values():
            stats.finish()
        return gathered

    def _apply(self, step: LinearPass, name: str, weight: Weight, stats: LinearStats | None) -> Weight:
        try:
            device = self.skeleton.device
            on_device = weight.map(lambda tensor: tensor.to(device))
            if step.needs.stats and stats is None:
                raise CompressError(f"{name}: no statistics were gathered")
            result = apply(step, on_device, stats or LinearStats(weight.shape[1], (), device))
        except torch.OutOfMemoryError:
            raise CompressError(f"{step.method()} at {name}: out of memory; use fewer --samples or --device cpu") from None
        except (ValueError, torch.linalg.LinAlgError) as error:
            raise CompressError(f"{step.method()} at {name}: {error}") from error
        if not step.factorises:
            assert_structure_kept(f"{step.method()} at {name}", structure(on_device), result)
        return result

    # records and files

    def _write(self, index: int, block: nn.Module, weights: dict[str, Weight], records: dict[str, ModuleRecord]) -> None:
        skeleton = self.skeleton
        tensors: dict[str, Tensor] = {}
        for local, weight in weights.items():
            own_conv1d = type(block.get_submodule(local)).__name__ == "Conv1D"
            tensors |= compressed_tensors.tensors(skeleton.module_name(index, local), weight, transposed=own_conv1d)
        for name in skeleton.block_names(index):
            tensors[self._output_name(index, name, weights)] = skeleton.checkpoint.tensor(skeleton.file_name(name))
        record = {name: record.model_dump(mode="json") for name, record in records.items()}
        self.store.write(block_part(index), tensors, record)

    def _output_name(self, index: int, name: str, weights: dict[str, Weight]) -> str:
        for local, weight in weights.items():
            if isinstance(weight, LowRank) and name == f"{self.skeleton.module_name(index, local)}.bias":
                return name.removesuffix("bias") + "up.bias"
        return name

    def _read_back(self, index: int) -> dict[str, Weight]:
        tensors, record = self.store.tensors(block_part(index)), self.store.record(block_part(index))
        schemes = {"config_groups": {}}
        for name, entry in record.items():
            for module, bits in _packed(name, entry):
                schemes["config_groups"][module] = {"targets": [module], "weights": _scheme(bits)}
        weights = {}
        for local in self.skeleton.arch.linears:
            name = self.skeleton.module_name(index, local)
            masked = set(record[name]["masked"])
            transposed = self.skeleton.is_conv1d(local)
            weights[local] = compressed_tensors.read_weight(
                name,
                tensors.__getitem__,
                tensors.__contains__,
                schemes,
                masked=masked.__contains__,
                transposed=transposed,
            )
        return weights

    def _describe(self, index: int, weights: dict[str, Weight], result: Streamed) -> None:
        stored = self.store.record(block_part(index))
        for local, weight in weights.items():
            name = self.skeleton.module_name(index, local)
            result.add(name, weight, ModuleRecord.model_validate(stored[name]), self.skeleton.is_conv1d(local))


def _return_free_memory() -> None:
    """Give freed memory back to the system: glibc keeps what lies between live blocks, more of it with every block."""
    with suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def apply(step: LinearPass, weight: Weight, stats: LinearStats, *, outline: bool = False) -> Weight:
    """Apply one pass to a weight in any representation.

    A pass that does not factorise is applied to each factor of a low-rank weight, the second one with the statistics
    carried through the first as compressed. An earlier mask is given to the pass and holds in its result.
    """
    if isinstance(weight, LowRank) and not step.factorises:
        down = apply(step, weight.down, stats, outline=outline)
        through = stats.through(down.dense(torch.float32)) if step.needs.stats and not outline else stats
        return LowRank(down, apply(step, weight.up, through, outline=outline))
    mask = weight.mask
    compute = step.outline if outline else step.linear
    result = compute(weight.dense(), stats.only(step.needs.stats), mask)
    if step.factorises:
        if isinstance(result, LowRank):
            return result if not isinstance(weight, LowRank) or result.rank < weight.rank else weight
        return weight
    inner = weight.inner if isinstance(weight, Masked) else weight
    if isinstance(inner, Quantized) and isinstance(result, Masked) and isinstance(result.inner, Dense):
        return weight.masked(result.kept)  # pruning a quantized matrix keeps its grid
    if mask is not None and result.mask is None:
        return result.masked(mask)
    return result


def block_part(index: int) -> str:
    """Name of a block's file in the store."""
    return f"block-{index:05d}"


def matrices(name: str, weight: Weight) -> list[tuple[str, Weight]]:
    """(module name, matrix) of a weight: itself, or its factors; masks are looked through."""
    if isinstance(weight, LowRank):
        return matrices(f"{name}.down", weight.down) + matrices(f"{name}.up", weight.up)
    return [(name, weight.inner if isinstance(weight, Masked) else weight)]


def describe(name: str, weight: Weight, before: Weight, passes: list[str], stats: LinearStats | None) -> ModuleRecord:
    """The manifest's row of one linear layer."""
    parts = matrices(name, weight)
    grid = next((matrix for _, matrix in parts if isinstance(matrix, Quantized)), None)
    masked = _masked_names(name, weight)
    weight_error, output_error = errors(weight, before, stats) if passes else (None, None)
    n_outputs, n_inputs = weight.shape
    return ModuleRecord(
        kind="low_rank" if isinstance(weight, LowRank) else "quantized" if grid else "masked" if masked else "dense",
        shape=(n_outputs, n_inputs),
        passes=passes,
        bits=grid.bits if grid else None,
        group_size=grid.group_size if grid and grid.scale.shape[1] > 1 else None,
        rank=weight.rank if isinstance(weight, LowRank) else None,
        sparsity=round(1 - weight.numel / sum(m.shape[0] * m.shape[1] for _, m in parts), 6) if masked else None,
        masked=masked,
        weight_error=weight_error,
        output_error=output_error,
        nbytes=weight.nbytes,
        ideal_nbytes=weight.ideal_nbytes,
        dense_nbytes=n_outputs * n_inputs * weight.dtype.itemsize,
        numel=weight.numel,
    )


def _masked_names(name: str, weight: Weight) -> list[str]:
    if isinstance(weight, LowRank):
        return _masked_names(f"{name}.down", weight.down) + _masked_names(f"{name}.up", weight.up)
    return [name] if weight.mask is not None else []


def errors(weight: Weight, before: Weight, stats: LinearStats | None) -> tuple[float, float | None]:
    """(|dW|^2 / |W|^2, the same weighted by the calibration inputs' second moment, where that was gathered)."""
    old = before.dense(torch.float32)
    new = weight.dense(torch.float32).to(old.device)
    change = new - old
    weight_error = float(change.square().sum() / old.square().sum().clamp_min(1e-30))
    if stats is None or not stats.allowed & {"hessian", "covariance"}:
        return weight_error, None
    hessian = (stats.hessian if "hessian" in stats.allowed else stats.covariance.float()).to(old.device)
    return weight_error, float(energy(change, hessian) / energy(old, hessian).clamp_min(1e-30))


def _packed(name: str, entry: dict[str, Any]) -> list[tuple[str, int]]:
    if entry["bits"] is None:
        return []
    return [(module, entry["bits"]) for module in (name, f"{name}.down", f"{name}.up")]


def _scheme(bits: int) -> dict[str, Any]:
    return {"num_bits": bits, "type": "int", "strategy": "group"}


def check_targets(passes: Sequence[LinearPass], names: Sequence[str]) -> None:
    """Raise :class:`BadInput` for a pass that compresses nothing."""
    for step in passes:
        if not any(step.matches(name) for name in names):
            raise BadInput(
                f"{step.label()}: targets {list(step.targets)} without skip {list(step.skip)} match none of the {len(names)} "
                f"linear layers, such as {names[0]}"
            )


@torch.no_grad()
def forward(skeleton: Skeleton, tokens: Tensor) -> Tensor:
    """Logits (batch, length, V) of a checkpoint that need not fit into memory: one block at a time."""
    hidden = next(iter(skeleton.embed([tokens])))
    for index in range(len(skeleton.blocks)):
        skeleton.load_block(index, skeleton.read_weights(index))
        hidden = skeleton.run_block(index, hidden)
        skeleton.free_block(index)
        _return_free_memory()
    return skeleton.logits(tokens, hidden)
