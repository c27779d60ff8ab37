"""THE block loop: read a block, gather the statistics its passes need, apply them, propagate, write, free.

Memory holds one block, its statistics and the calibration activations (on disk above a limit), whatever the model's size.
A finished block is never done again: a rerun loads what was written for it and only propagates, which gives bit for bit
the activations that the interrupted run had.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import torch
from torch import Tensor, nn

from compress.apply import apply, outline, outlines
from compress.block import Block
from compress.errors import BadInput, CompressError
from compress.export import layers
from compress.journal import OUTER, block_part, collect_records, read_block, write_block
from compress.manifest import ModuleRecord
from compress.passes import BlockPass, CorrectionPass, LinearPass, Needs, StreamPass
from compress.records import Streamed, describe, grids
from compress.reference import Reference, incomparable
from compress.skeleton import Skeleton
from compress.stats import LinearStats
from compress.weights import Composed, Incoherent, LowRank, TensorTrain, Weight, assert_structure_kept, structure
from compress.weights.composed import unmasked
from compress.writer import BlockStore

log = logging.getLogger(__name__)

Progress = Callable[[int, int, str], None]
_TOKENS_PER_FORWARD = 4096
PROBE_SEQUENCES, PROBE_LENGTH = 2, 64
FISHER = "fisher"  # where in ``scratch`` that statistic lies, block by block


class _Enough(Exception):
    """Every wanted input has been seen: the rest of the block's forward would compute what nobody reads."""


class Stream:
    """One pass over the model's blocks with consecutive linear and block passes.

    tokens: (n, length) calibration windows; of these only two short ones are used where no pass needs any. store:
    receives finished blocks. spill_bytes: activations above this go to memory-mapped files in ``scratch``. allocations:
    for a pass that surveys the model first, the pass to apply to each layer, by name. original: the uncompressed model, for
    passes that compare with it; None: it is the skeleton's.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        passes: Sequence[StreamPass],
        tokens: Tensor,
        store: BlockStore,
        scratch: Path,
        *,
        spill_bytes: int = 1 << 28,
        progress: Progress = lambda done, total, message: None,
        allocations: dict[StreamPass, dict[str, LinearPass]] | None = None,
        original: Skeleton | None = None,
    ):
        self.skeleton, self.store, self.scratch = skeleton, store, scratch
        self.spill_bytes, self.progress, self.allocations = spill_bytes, progress, allocations or {}
        self.passes, self.phases = passes, phases(passes)
        self.probe_tokens = tokens[:PROBE_SEQUENCES, :PROBE_LENGTH].contiguous()
        needs = [self.needs(step) for step in passes]
        self.tokens = tokens if any(need.captured or need.inputs or need.reference for need in needs) else None
        self.fisher = BlockStore(scratch / FISHER) if any("fisher" in need.stats for need in needs) else None
        self.needs_cross = any("cross" in need.stats for need in needs)
        self.needs_reference = {need.teacher for need in needs if need.reference}  # of which models: the teacher's, the stage's
        self.needs_reference |= {False} if self.needs_cross else set()
        self.original = original
        capturing = [[step for step in phase if self.needs(step).captured] for phase in self.phases]
        self.undisturbed = all(step.undisturbed for phase in capturing for step in phase) and sum(map(bool, capturing)) == 1
        self.undisturbed &= not any(need.inputs or need.reference for need in needs)
        self.entered = 0  # the block whose inputs the activations are, where they run ahead of what is compressed

    def needs(self, step: StreamPass) -> Needs:
        """What a pass needs of this stream."""
        return step.needs

    @torch.no_grad()
    def run(self) -> Streamed:
        """Compress every block that is not done yet, and the part outside the blocks."""
        n_blocks = len(self.skeleton.blocks)
        self._start_activations()
        cache = self.skeleton.checkpoint.cache_scheme
        planned = dict(outlines(self.skeleton, self.passes, self.allocations))
        tables = self.skeleton.tables()
        quantized = grids(planned | tables)
        self.skeleton.mixed = layers.library(quantized).is_mixed(quantized, cache)
        result = Streamed({}, {}, {}, (self.probe_tokens, self.probe_tokens), cache=cache)
        result.add_tables(tables, {}, self.skeleton.tied_head())
        for index in range(n_blocks):
            part = block_part(index)
            self.progress(index, n_blocks, f"block {index + 1} of {n_blocks}")
            for reference in {id(found): found for found in self.references.values()}.values():
                reference.advance(index)
            block = read_block(self.store, self.skeleton, index) if self.store.done(part) else self._compress(index)
            self._propagate(index)
            collect_records(self.store, block, result)
            self.skeleton.free_block(index)
            del block
            _return_free_memory()
        if not self.store.done(OUTER):
            self.store.write(OUTER, self.skeleton.read_outer(), {})
        self.progress(n_blocks, n_blocks, "blocks done")
        result.probe = (self.probe_tokens, self.skeleton.logits(self.probe_tokens, self.probe))
        if not bool(torch.isfinite(result.probe[1]).all()):
            raise CompressError("the compressed model's logits are not finite; use a milder setting, or --dtype float32")
        return result

    # activations

    def _start_activations(self) -> None:
        skeleton = self.skeleton
        self.activations: Tensor | None = None
        self.references: dict[bool, Reference] = {}  # by whether they are the teacher's
        if self.tokens is not None:
            self.batch = max(1, _TOKENS_PER_FORWARD // self.tokens.shape[1])
            self.activations, self.calls = self._embed(skeleton, self.tokens, "activations"), skeleton.block_arguments
            self._start_references()
        self.probe = next(iter(skeleton.embed([self.probe_tokens]))).cpu()
        self.probe_calls = skeleton.block_arguments

    def _embed(self, skeleton: Skeleton, tokens: Tensor, name: str) -> Tensor:
        """What enters the first block, (n, length, d)."""
        found, start = None, 0
        for hidden in skeleton.embed(list(tokens.split(self.batch))):
            if found is None:
                found = self._allocate((*tokens.shape, hidden.shape[-1]), hidden.dtype, name)
            found[start : start + len(hidden)] = hidden.to("cpu")
            start += len(hidden)
        assert found is not None
        return found

    def _start_references(self) -> None:
        assert self.activations is not None and self.tokens is not None
        if True in self.needs_reference and self.original is not None:
            theirs = Reference(self.original, self._embed(self.original, self.tokens, "teacher"), self.batch)
            if (reason := incomparable(self.original, theirs.outputs, self.skeleton, self.activations)) is None:
                self.references[True] = theirs
            else:
                log.warning("the original, %s, has no blocks to compare with: those that the stage began with stand in", reason)
        if self.needs_reference - self.references.keys():
            shape, dtype, skeleton, inputs = tuple(self.activations.shape), self.activations.dtype, self.skeleton, None
            if self.needs_cross:  # its blocks are held beside the compressed ones
                skeleton = Skeleton(self.skeleton.checkpoint, self.skeleton.device, self.skeleton.dtype)
                skeleton.block_arguments, inputs = self.calls, self._allocate(shape, dtype, "reference-inputs")
            outputs = self._allocate(shape, dtype, "reference").copy_(self.activations)
            own = Reference(skeleton, outputs, self.batch, inputs)
            self.references |= dict.fromkeys(self.needs_reference - self.references.keys(), own)

    def _allocate(self, shape: tuple[int, ...], dtype: torch.dtype, name: str) -> Tensor:
        n_elements = torch.Size(shape).numel()
        if n_elements * dtype.itemsize <= self.spill_bytes:
            return torch.empty(shape, dtype=dtype)
        file = self.scratch / f"{name}.bin"
        log.info("calibration activations of %.1f GB go to %s", n_elements * dtype.itemsize / 1e9, file)
        return torch.from_file(str(file), shared=True, size=n_elements, dtype=dtype).reshape(shape)

    def _propagate(self, index: int) -> None:
        """Inputs of the next block, from the block as it is now, or as it was where these are to be undisturbed."""
        skeleton = self.skeleton
        skeleton.block_arguments = self.probe_calls
        self.probe = skeleton.run_block(index, self.probe).cpu()
        if self.activations is None or index + 1 == len(skeleton.blocks) or self.entered > index:
            return
        if self.undisturbed:
            skeleton.load_block(index, skeleton.read_weights(index))
        skeleton.block_arguments = self.calls
        for rows in self.activations.split(self.batch):
            rows.copy_(skeleton.run_block(index, rows))

    # one block

    def _compress(self, index: int) -> Block:
        skeleton = self.skeleton
        if index in skeleton.owners:  # what it computes with has been compressed already, on the inputs of its owner
            owner = read_block(self.store, skeleton, skeleton.owner(index))
            block = Block(skeleton, index, owner.weights, skeleton.read_others(index))
            write_block(self.store, block, {})
            return block
        block = Block(skeleton, index, skeleton.read_weights(index), skeleton.read_others(index))
        block.inputs = self.activations
        records: dict[str, ModuleRecord] = {}
        for phase in self.phases:
            if isinstance(phase[0], BlockPass):
                self._tune(block, phase[0], records)
            else:
                self._compress_layers(block, phase, records)
        write_block(self.store, block, records)
        return block

    def _compress_layers(self, block: Block, steps: Sequence[StreamPass], records: dict[str, ModuleRecord]) -> None:
        groups = self.skeleton.arch.groups
        sequential = any(step.sequential for step in steps)
        for step_groups in [(group,) for group in groups] if sequential else [groups]:
            gathered = self._collect(block, steps, step_groups)
            for group in step_groups:
                _return_free_memory()
                stats = gathered.pop(group, None)
                for local in group:
                    applied = [step for step in steps if step.matches(block.name(local))]
                    original, weight, own = block.before[local], block.weights[local], self._with_fisher(block, local, stats)
                    for step in applied:
                        weight = self._apply(step, block.name(local), weight, own, original)
                    if applied:
                        block.set(local, weight)
                    self._record(block, local, [step.label() for step in applied], stats, records)

    def _tune(self, block: Block, step: BlockPass, records: dict[str, ModuleRecord]) -> None:
        groups = self.skeleton.arch.groups
        block.selected = frozenset(local for local in block.weights if step.matches(block.name(local)))
        gathered = self._collect(block, [step], groups)
        if self.activations is not None:  # the pass may run the block, though it needs no statistics
            self.skeleton.block_arguments = self.calls
        block.targets = self.references[step.needs.teacher].outputs if step.needs.reference else None
        block.stats = {local: stats.only(step.needs.stats) for group, stats in gathered.items() for local in group}
        kept = {local: structure(weight) for local, weight in block.weights.items()}
        block.open_bitmasks()
        if step.regrids:
            block.open_grids()
        try:
            with torch.enable_grad():
                step.block(block)
        except torch.OutOfMemoryError:
            raise CompressError(f"{step.method()}: out of memory; use fewer --samples or --device cpu") from None
        except (ValueError, torch.linalg.LinAlgError) as error:
            raise CompressError(f"{step.method()} at block {block.index}: {error}") from error
        for local in block.weights:
            assert_structure_kept(f"{step.method()} at {block.name(local)}", kept[local], block.weights[local])
            self._record(block, local, [step.label()] * (local in block.selected), block.stats.get(local), records)
        block.stats = {}

    def _record(
        self, block: Block, local: str, labels: list[str], stats: LinearStats | None, records: dict[str, ModuleRecord]
    ) -> None:
        name = block.name(local)
        if labels or name not in records:
            block.applied[local] += labels
            before, passes = block.before[local], list(block.applied[local])
            records[name] = describe(name, block.weights[local], before, passes, stats)

    def _collect(
        self, block: Block, steps: Sequence[StreamPass], groups: Sequence[tuple[str, ...]]
    ) -> dict[tuple[str, ...], LinearStats]:
        """Statistics of the inputs of those groups that some pass compresses; empty where no pass needs any."""
        skeleton = self.skeleton
        wanted = self._wanted(steps)
        names = {group: [block.name(local) for local in group] for group in groups}
        capturing = [step for step in steps if self.needs(step).captured]
        wanted_groups = [group for group in groups if any(step.matches(name) for name in names[group] for step in capturing)]
        if self.activations is None or not wanted_groups:
            return {}
        factored = {g for g in wanted_groups if any(self._carries_statistics(steps, block, local) for local in g)}
        gathered = {
            g: LinearStats(block.weights[g[0]].shape[1], wanted | ({"hessian"} if g in factored else set()), skeleton.device)
            for g in wanted_groups
        }

        def hook(group: tuple[str, ...]):
            def see(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                gathered[group].add(inputs[0], before.get(group[0]))
                if group == wanted_groups[-1] and not runs_on:
                    raise _Enough

            return see

        runs_on = self.undisturbed and block.index + 1 < len(skeleton.blocks)  # what the block puts out is what the next reads
        handles = [block.module.get_submodule(group[0]).register_forward_pre_hook(hook(group)) for group in wanted_groups]
        before: dict[str, Tensor] = {}
        try:
            with ExitStack() as stack:
                entering = None
                if "cross" in wanted:
                    firsts = [group[0] for group in wanted_groups]
                    entering = stack.enter_context(self.references[False].entering(block.index, firsts))
                for number, rows in enumerate(self.activations.split(self.batch)):
                    before = entering(number) if entering else before
                    skeleton.block_arguments = self.calls
                    with suppress(_Enough):
                        outputs = skeleton.run_block(block.index, rows)
                        rows.copy_(outputs)  # which none but undisturbed inputs come to
            self.entered = block.index + self.undisturbed
        finally:
            for handle in handles:
                handle.remove()
        for stats in gathered.values():
            stats.finish()
        return gathered

    def _wanted(self, steps: Sequence[StreamPass]) -> frozenset[str]:
        """The statistics that passes on one capture need between them."""
        wanted = frozenset().union(*(self.needs(step).captured for step in steps))
        if wanted and any(isinstance(step, LinearPass) and step.factorises for step in steps):
            wanted |= {"hessian"}  # so that a later pass's statistics can be carried to the factors
        return wanted

    def _carries_statistics(self, steps: Sequence[StreamPass], block: Block, local: str) -> bool:
        """Whether a step will meet a weight that statistics are carried through: factors that it has, or is given by then."""
        name, weight = block.name(local), block.weights[local].map(lambda tensor: tensor.to("meta"))
        for step in (step for step in steps if step.matches(name)):
            if _has_factors(weight):
                return True
            weight = outline(self.allocations.get(step, {}).get(name, step), weight)
        return False

    def _with_fisher(self, block: Block, local: str, stats: LinearStats | None) -> LinearStats | None:
        """The statistics of a layer's inputs, beside its own of the model's gradients where a pass needs these."""
        if self.fisher is None:
            return stats
        found = self.fisher.tensors(block_part(self.skeleton.owner(block.index)))[local]
        return (stats or self._no_stats(len(found))).with_fisher(found)

    def _no_stats(self, n_inputs: int) -> LinearStats:
        return LinearStats(n_inputs, (), self.skeleton.device)

    def _apply(self, step: StreamPass, name: str, weight: Weight, stats: LinearStats | None, original: Weight) -> Weight:
        try:
            device = self.skeleton.device
            on_device = weight.map(lambda tensor: tensor.to(device))
            if step.needs.stats and stats is None:
                raise CompressError(f"{name}: no statistics were gathered")
            chosen = self.allocations[step][name] if step in self.allocations else step
            result = apply(chosen, on_device, stats or self._no_stats(weight.shape[1]), original.dense().to(device))
        except torch.OutOfMemoryError:
            raise CompressError(f"{step.method()} at {name}: out of memory; use fewer --samples or --device cpu") from None
        except (ValueError, torch.linalg.LinAlgError) as error:
            raise CompressError(f"{step.method()} at {name}: {error}") from error
        if not (isinstance(step, LinearPass) and step.factorises):
            moves_masks = isinstance(step, CorrectionPass) and step.moves_masks  # but not those of earlier stages
            kept = structure(original.map(lambda tensor: tensor.to(device)) if moves_masks else on_device)
            assert_structure_kept(f"{step.method()} at {name}", kept, result)
        return result


def _return_free_memory() -> None:
    """Give freed memory back to the system: glibc keeps what lies between live blocks, more of it with every block."""
    with suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def phases(passes: Sequence[StreamPass]) -> list[list[StreamPass]]:
    """Consecutive linear passes, which share one capture of statistics, and block passes, each for itself."""
    found: list[list[StreamPass]] = []
    for step in passes:
        if found and not isinstance(step, BlockPass) and not isinstance(found[-1][-1], BlockPass):
            found[-1].append(step)
        else:
            found.append([step])
    return found


def _has_factors(weight: Weight) -> bool:
    inner = unmasked(weight)
    children = inner.children().values() if isinstance(inner, Composed) else ()
    return isinstance(inner, LowRank | TensorTrain | Incoherent) or any(map(_has_factors, children))


def check_targets(passes: Sequence[StreamPass], names: Sequence[str]) -> None:
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
