"""Say what a run will do before it does it: matched layers, stages, bytes, tier, memory, time.

Sizes are exact up to the length of file headers: every pass outlines its result with meta tensors. Memory and time are
estimates, the latter from the machine's own speed at a matrix product.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

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
from compress.weights import Coded, Composed, Weight
from compress.weights.composed import settled, unmasked

_HEADER_BYTES_PER_TENSOR = 52  # of its entry in the header, without its name and the two offsets
_FORWARD_TOKENS = 4096


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
    peak, operations = 0, 0.0
    for index, stage in enumerate(stages):
        peak = max(peak, _stage_peak(outlined.skeleton, stage, samples, length, dtype))
        operations += _stage_operations(outlined.skeleton, stage, samples, length)
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
        predicted_bytes=_file_bytes(outlined, weights),
        tier="shim" if shim else "native-quantized" if quantized or outlined.cache else "native",
        warnings=warnings,
        computes_as_stored=library is layers.bitsandbytes,
        peak_bytes=peak,
        seconds=operations / operations_per_second(dtype),
    )


def _planned(skeleton: Skeleton, step: Pass, stage: int) -> PlannedPass:
    names = skeleton.linear_names()
    matched = sum(map(step.matches, names)) if isinstance(step, StreamPass) else len(names)
    return PlannedPass(label=step.label(), taxon=step.taxon.value, matched=matched, total=len(names), stage=stage)


def _apply(outlined: Outline, step: Pass) -> list[str]:
    """Let a pass change the outline; returns what the user should know."""
    given_up: dict[str, int] = {}
    seen = []
    for _, before, weight in outlined.apply(step):
        seen.append(before)
        lost = "mask" if before.mask is not None and weight.mask is None else None
        lost = "grid" if isinstance(before, Coded) and isinstance(weight, Composed) else lost
        if lost and not _has(weight, lost):
            given_up[lost] = given_up.get(lost, 0) + 1
    if isinstance(step, StreamPass) and step.surveys:
        try:
            step.check_budget(seen)
        except ValueError as error:
            raise BadInput(f"{step.label()}: {error}") from None
    return [f"{step.label()} gives up the {lost} that an earlier pass made ({n} layers)" for lost, n in given_up.items()]


def _has(weight: Weight, what: str) -> bool:
    """Whether a mask or a grid is left anywhere in a composed weight."""
    inner = unmasked(weight)
    parts = [weight, *(inner.children().values() if isinstance(inner, Composed) else ())]
    return any(part.mask is not None if what == "mask" else isinstance(unmasked(part), Coded) for part in parts)


def _file_bytes(outlined: Outline, weights: dict[str, Weight]) -> int:
    total, names = outlined.tensors(weights)
    return total + sum(_HEADER_BYTES_PER_TENSOR + len(name) + 2 * len(str(total)) for name in names)


def _stage_peak(skeleton: Skeleton, stage: Sequence[Pass], samples: int, length: int, dtype: torch.dtype) -> int:
    shapes = _block_shapes(skeleton)
    block = sum(rows * columns for rows, columns in shapes.values())
    if isinstance(stage[0], TrainPass):  # master weights, gradients, two moments; the teacher
        step = stage[0]
        total = skeleton.checkpoint.nbytes // 2
        activations = 34 * step.batch_size * (step.length or length) * max(columns for _, columns in shapes.values())
        return 4 * total * (4 + step.needs.teacher) + 4 * activations * len(skeleton.blocks)
    needs = frozenset().union(*(step.needs.stats for step in stage))
    hidden = skeleton.checkpoint.config.hidden_size
    activations = min(samples * length * hidden * dtype.itemsize, 1 << 28) if needs else 0
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
    if isinstance(stage[0], TrainPass):
        step = stage[0]
        seen = step.steps * step.batch_size * (step.length or 512)
        return len(skeleton.blocks) * 2.0 * block * seen * (3 + step.needs.teacher)
    needs = frozenset().union(*(step.needs.stats for step in stage))
    per_token = 4.0 * block if needs else 0.0
    if needs & {"hessian", "covariance"}:
        per_token += sum(shapes[group[0]][1] ** 2 for group in skeleton.arch.groups)
    solve = (
        sum(4.0 * rows * columns**2 for rows, columns in shapes.values()) if needs & {"hessian", "covariance"} else 20.0 * block
    )
    learned = sum(step.learning_tokens(samples, length) for step in stage if isinstance(step, StreamPass))
    return len(skeleton.blocks) * (per_token * samples * length + 6.0 * block * learned + solve * len(stage))


def _block_shapes(skeleton: Skeleton) -> dict[str, tuple[int, int]]:
    return {local: linear_shape(skeleton.blocks[0].get_submodule(local)) for local in skeleton.arch.linears}


def operations_per_second(dtype: torch.dtype) -> float:
    """Speed of a matrix product on this machine's CPU, from one that takes milliseconds."""
    matrix = torch.ones(512, 512, dtype=dtype)
    torch.mm(matrix, matrix)
    start = time.perf_counter()
    for _ in range(4):
        torch.mm(matrix, matrix)
    return 4 * 2 * 512**3 / max(time.perf_counter() - start, 1e-6)
