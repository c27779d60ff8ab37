"""Say what a run will do before it does it: matched layers, stages, bytes, tier, memory, time.

Sizes are exact up to the length of file headers: every pass outlines its result with meta tensors. Memory and time are
estimates, the latter from the machine's own speed at a matrix product.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from itertools import chain

import torch
from pydantic import BaseModel

from compress.checkpoint import Checkpoint
from compress.errors import BadInput
from compress.export import layers
from compress.loader import linear_shape
from compress.outline import Outline
from compress.passes import Pass, StreamPass
from compress.records import grids
from compress.skeleton import Skeleton
from compress.train_pass import TrainPass
from compress.trainable import trained_names
from compress.weights import Affine, Coded, Composed, Weight
from compress.weights.composed import settled, unmasked

_HEADER_BYTES_PER_TENSOR = 52  # of its entry in the header, without its name and the two offsets
_FORWARD_TOKENS = 4096
_BEST_RATIO, _LARGEST_RATIO = 2.5, 3.0  # of a teacher's parameters to its student's; above the latter it is said


class PlannedPass(BaseModel):
    """matched of total linear layers (a training pass trains them all)."""

    label: str
    taxon: str
    matched: int
    total: int
    stage: int


class Plan(BaseModel):
    """What a run will do. source_bytes, predicted_bytes: of weight files. peak_bytes: memory beyond the imports;
    seconds: without evaluation; both estimates. computes_as_stored: whether readers of the result compute in the dtypes of its
    file, whatever dtype they are asked for."""

    model: str
    architecture: str
    passes: list[PlannedPass]
    stages: int
    source_bytes: int
    predicted_bytes: int
    tier: str
    warnings: list[str]
    computes_as_stored: bool = False
    peak_bytes: int
    seconds: float

    def lines(self) -> list[str]:
        """The plan in words."""
        found = [f"{self.model} ({self.architecture}), {self.source_bytes:,} bytes"]
        for step in self.passes:
            found.append(f"  stage {step.stage + 1}: {step.label}  [{step.taxon}]  {step.matched} of {step.total} linear layers")
        found += [f"  warning: {warning}" for warning in self.warnings]
        share = self.predicted_bytes / self.source_bytes
        found.append(f"predicted: {self.predicted_bytes:,} bytes on disk ({share:.1%} of the source), tier {self.tier}")
        found.append(
            f"estimated: peak memory {self.peak_bytes / 1e9:.2f} GB beyond imports, {self.seconds:.0f} s before evaluation"
        )
        return found


def make_plan(
    checkpoint: Checkpoint,
    name: str,
    stages: Sequence[Sequence[Pass]],
    *,
    samples: int,
    length: int,
    dtype: torch.dtype,
) -> Plan:
    """Plan ``stages`` (passes grouped as the pipeline runs them). Raises BadInput for a result that no reader would open."""
    outlined, planned, warnings = Outline(Skeleton(checkpoint)), [], []
    peak, operations, trained, n_original = 0, 0.0, 0.0, n_parameters(outlined)
    for index, stage in enumerate(stages):
        if isinstance(stage[0], TrainPass):
            n_student, n_teacher = n_parameters(outlined), _n_teacher(stage[0], n_original)
            peak = max(peak, _training_peak(outlined.skeleton, stage[0], n_student, n_teacher, length))
            trained += _training_operations(stage[0], n_student, n_teacher, length)
            warnings += _capacity_gap(stage[0], n_student, n_teacher)
        else:
            peak = max(peak, _stage_peak(outlined.skeleton, stage, samples, length, dtype))
            operations += _stage_operations(outlined.skeleton, stage, samples, length)
            trained += _learning_operations(outlined.skeleton, stage, samples, length)
        for step in stage:
            planned.append(_planned(outlined.skeleton, step, index))
            warnings += _apply(outlined, step)
    weights = outlined.linears() | outlined.tables
    quantized = grids(weights)
    library = layers.library(quantized)
    library.check_readable(quantized, outlined.cache, dtype)
    weights = {name: settled(weight, library.is_mixed(quantized, outlined.cache)) for name, weight in weights.items()}
    shim = outlined.is_reshaped(weights)
    return Plan(
        model=name,
        architecture=checkpoint.base_model_type,
        passes=planned,
        stages=len(stages),
        source_bytes=checkpoint.nbytes,
        predicted_bytes=file_bytes(outlined, weights),
        tier="shim" if shim else "native-quantized" if quantized or outlined.cache else "native",
        warnings=warnings,
        computes_as_stored=library is layers.bitsandbytes,
        peak_bytes=peak,
        seconds=operations / operations_per_second(dtype) + trained / operations_per_second(torch.float32),  # as masters are
    )


def _planned(skeleton: Skeleton, step: Pass, stage: int) -> PlannedPass:
    names = skeleton.linear_names()
    matched = sum(map(step.matches, names)) if isinstance(step, StreamPass) else len(names)
    return PlannedPass(label=step.label(), taxon=step.taxon.value, matched=matched, total=len(names), stage=stage)


def _apply(outlined: Outline, step: Pass) -> list[str]:
    """Let a pass change the outline; returns what the user should know."""
    given_up: dict[str, int] = {}
    seen, names = [], []
    for name, before, weight in outlined.apply(step):
        seen.append(before)
        names += trained_names(name, before)
        lost = "mask" if before.mask is not None and weight.mask is None else None
        lost = "grid" if isinstance(before, Coded) and isinstance(weight, Composed) and not isinstance(weight, Affine) else lost
        if lost and not _has(weight, lost):
            given_up[lost] = given_up.get(lost, 0) + 1
    if isinstance(step, TrainPass) and not any(map(step.trains_layer, names)):
        raise BadInput(
            f"{step.label()}: targets {list(step.targets)} without skip {list(step.skip)} match none of the {len(names)} "
            f"matrices, such as {names[0]}"
        )
    parameters = chain.from_iterable(weight.parameters() for weight in seen)
    if isinstance(step, TrainPass) and step.trains == "scales" and not any(map(step.trains_parameter, parameters)):
        raise BadInput(f"{step.label()}: no layer is on a grid whose scales could be trained: put a quantizer before it")
    if isinstance(step, StreamPass) and step.surveys:
        try:
            step.check_budget(seen)
        except ValueError as error:
            raise BadInput(f"{step.label()}: {error}") from None
    told = [f"{step.label()} gives up the {lost} that an earlier pass made ({n} layers)" for lost, n in given_up.items()]
    return told + (step.remarks(seen) if isinstance(step, TrainPass) else [])


def _has(weight: Weight, what: str) -> bool:
    """Whether a mask or a grid is left anywhere in a composed weight."""
    inner = unmasked(weight)
    parts = [weight, *(inner.children().values() if isinstance(inner, Composed) else ())]
    return any(part.mask is not None if what == "mask" else isinstance(unmasked(part), Coded) for part in parts)


def file_bytes(outlined: Outline, weights: dict[str, Weight], entry_bytes: int = _HEADER_BYTES_PER_TENSOR) -> int:
    """Bytes of the weight file with those layers and tables. entry_bytes: of each tensor in its header, without its name and the
    two offsets."""
    total, names = outlined.tensors(weights)
    return total + sum(entry_bytes + len(name) + 2 * len(str(total)) for name in names)


def _stage_peak(skeleton: Skeleton, stage: Sequence[Pass], samples: int, length: int, dtype: torch.dtype) -> int:
    shapes = _block_shapes(skeleton)
    block = sum(rows * columns for rows, columns in shapes.values())
    needs = frozenset().union(*(step.needs.stats for step in stage))
    hidden = skeleton.checkpoint.config.hidden_size
    n_copies = bool(needs or any(step.needs.inputs for step in stage)) + any(step.needs.reference for step in stage)
    activations = n_copies * min(samples * length * hidden * dtype.itemsize, 1 << 28)  # what is above lies on disk
    width = max(max(shape) for shape in shapes.values())
    forward = 6 * _FORWARD_TOKENS * width * dtype.itemsize if needs else 0
    inputs = {group: shapes[group[0]][1] for group in skeleton.arch.groups}
    per_entry = 8 if "covariance" in needs else 4 if "hessian" in needs else 0
    statistics = per_entry * sum(n * n for n in inputs.values())
    solver = (3 * per_entry * max(inputs.values()) ** 2) + 4 * 4 * max(rows * columns for rows, columns in shapes.values())
    return block * dtype.itemsize + activations + forward + statistics + solver


def _stage_operations(skeleton: Skeleton, stage: Sequence[Pass], samples: int, length: int) -> float:
    shapes = _block_shapes(skeleton)
    block = sum(rows * columns for rows, columns in shapes.values())
    needs = frozenset().union(*(step.needs.stats for step in stage))
    per_token = 4.0 * block if needs else 0.0
    if needs & {"hessian", "covariance"}:
        per_token += sum(shapes[group[0]][1] ** 2 for group in skeleton.arch.groups)
    solve = (
        sum(4.0 * rows * columns**2 for rows, columns in shapes.values()) if needs & {"hessian", "covariance"} else 20.0 * block
    )
    return len(skeleton.blocks) * (per_token * samples * length + solve * len(stage))


def _learning_operations(skeleton: Skeleton, stage: Sequence[Pass], samples: int, length: int) -> float:
    parameters = len(skeleton.blocks) * sum(rows * columns for rows, columns in _block_shapes(skeleton).values())
    return 6.0 * parameters * sum(step.learning_tokens(samples, length) for step in stage if isinstance(step, StreamPass))


def n_parameters(outlined: Outline) -> int:
    """Numbers that the outlined model computes with; zeros of masks count."""
    weights = outlined.linears() | outlined.tables
    others = [*outlined.outer.values(), *(tensor for block in outlined.others for tensor in block.values())]
    return sum(unmasked(weight).numel for weight in weights.values()) + sum(tensor.numel() for tensor in others)


def _n_teacher(step: TrainPass, n_original: int) -> int:
    """Parameters of the model that teaches; 0: none does."""
    if step.teacher is not None:
        return n_parameters(Outline(Skeleton(Checkpoint.open(step.teacher))))
    return n_original if step.needs.teacher else 0


def _training_peak(skeleton: Skeleton, step: TrainPass, n_student: int, n_teacher: int, length: int) -> int:
    """Bytes: float32 masters, gradients, two moments, what early stop keeps; the teacher; activations; a chunk of logits."""
    width = max(columns for _, columns in _block_shapes(skeleton).values())
    n_tokens = step.batch_size // step.accumulate * (step.length or length)
    kept_blocks = 1 + len(skeleton.blocks) / 34 if step.checkpointing else len(skeleton.blocks)
    logits = 6 * min(n_tokens, 256) * skeleton.checkpoint.config.vocab_size
    activations = int(34 * n_tokens * width * kept_blocks) + logits
    trained = n_student * (4 + (step.patience is not None)) + activations
    needed = max(trained, n_teacher) if step.cache else trained + n_teacher
    return 4 * max(needed, activations + 5 * n_teacher if step.correct else 0)


def _training_operations(step: TrainPass, n_student: int, n_teacher: int, length: int) -> float:
    n_tokens = step.steps * step.batch_size * (step.length or length)
    correction = n_tokens * step.correct / step.steps * (3 + step.checkpointing)
    return 2.0 * (n_tokens * (n_student * (3 + step.checkpointing) + n_teacher) + correction * n_teacher)


def _capacity_gap(step: TrainPass, n_student: int, n_teacher: int) -> list[str]:
    """Advice where the teacher is too large to learn from: the law of capacity gap (Zhang et al., 2311.07052)."""
    ratio = n_teacher / n_student
    if ratio <= _LARGEST_RATIO:
        return []
    between = [n_teacher / _BEST_RATIO**power for power in range(1, math.ceil(math.log(ratio, _BEST_RATIO) - 1e-9))]
    ladder = " -> ".join(f"{size / 1e6:,.3g}M" for size in (n_teacher, *between, n_student))
    return [
        f"{step.label()}: the teacher has {ratio:.1f} times the student's parameters; one of about {_BEST_RATIO} times teaches "
        f"best. Compress and distil in stages ({ladder}), or give one between the two (teacher=...)"
    ]


def _block_shapes(skeleton: Skeleton) -> dict[str, tuple[int, int]]:
    return {local: linear_shape(skeleton.blocks[0].get_submodule(local)) for local in skeleton.arch.linears}


def operations_per_second(dtype: torch.dtype) -> float:
    """Speed of a matrix product on this machine's CPU: the best of a few that take milliseconds, since others may run beside."""
    matrix = torch.ones(512, 512, dtype=dtype)
    seconds = []
    for _ in range(8):
        start = time.perf_counter()
        torch.mm(matrix, matrix)
        seconds.append(time.perf_counter() - start)
    return 2 * 512**3 / max(min(seconds), 1e-6)
