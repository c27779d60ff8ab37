"""Say what a run will do before it does it: matched layers, stages, bytes, tier, memory, time.

Sizes are exact up to the length of file headers: every pass outlines its result with meta tensors. Memory and time are
estimates, the latter from the machine's own speed at a matrix product.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from pydantic import BaseModel
from torch import Tensor

from compress.apply import outlines
from compress.checkpoint import Checkpoint
from compress.errors import BadInput
from compress.export import layers
from compress.loader import linear_shape
from compress.passes import ModelPass, Pass, StreamPass, TrainPass
from compress.records import grids
from compress.skeleton import Skeleton
from compress.weights import Coded, Composed, Weight, spec_of
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
    skeleton = Skeleton(checkpoint)
    names = skeleton.linear_names()
    passes = [step for stage in stages for step in stage]
    weights, warnings = _outline(skeleton, passes)
    surgeries = []
    for step in passes:
        if isinstance(step, ModelPass):
            surgeries.append(step.surgery(skeleton))
            tables = {name.removesuffix(".weight"): weight for name, weight in surgeries[-1].tables.items()}
            skeleton.foresee(surgeries[-1].added, tables)
    cache = next((surgery.cache for surgery in reversed(surgeries) if surgery.cache), checkpoint.cache_scheme)
    weights |= skeleton.tables()
    added = {name: tensor for name, tensor in skeleton.planned.items() if name.removesuffix(".weight") not in weights}
    quantized = grids(weights)
    library = layers.library(quantized)
    library.check_readable(quantized, cache, dtype)
    weights = {name: settled(weight, library.is_mixed(quantized, cache)) for name, weight in weights.items()}
    reshaped = [n for n, weight in weights.items() if spec_of(weight, conv1d=skeleton.is_conv1d(_local(n, skeleton)))]
    return Plan(
        model=name,
        architecture=checkpoint.base_model_type,
        passes=[
            PlannedPass(
                label=step.label(), taxon=step.taxon.value, total=len(names), stage=index,
                matched=sum(map(step.matches, names)) if isinstance(step, StreamPass) else len(names),
            )
            for index, stage in enumerate(stages) for step in stage
        ],
        stages=len(stages),
        source_bytes=checkpoint.nbytes,
        predicted_bytes=_file_bytes(skeleton, weights, added),
        tier="shim" if reshaped else "native-quantized" if quantized or cache else "native",
        warnings=warnings,
        computes_as_stored=library is layers.bitsandbytes,
        peak_bytes=max((_stage_peak(skeleton, stage, samples, length, dtype) for stage in stages), default=0),
        seconds=sum(_stage_operations(skeleton, stage, samples, length) for stage in stages) / operations_per_second(dtype),
    )  # fmt: skip


def _local(name: str, skeleton: Skeleton) -> str:
    return name.removeprefix(skeleton.arch.blocks + ".").partition(".")[2]


def _outline(skeleton: Skeleton, passes: Sequence[Pass]) -> tuple[dict[str, Weight], list[str]]:
    weights: dict[str, Weight] = {}
    given_up: dict[str, int] = {}
    seen: dict[StreamPass, list[Weight]] = {}
    for name, step, before, weight in outlines(skeleton, passes):
        weights[name] = weight
        if isinstance(step, StreamPass) and step.surveys:
            seen.setdefault(step, []).append(before)
        lost = "mask" if before.mask is not None and weight.mask is None else None
        lost = "grid" if isinstance(before, Coded) and isinstance(weight, Composed) else lost
        if step is not None and lost and not _has(weight, lost):
            key = f"{step.label()} gives up the {lost} that an earlier pass made"
            given_up[key] = given_up.get(key, 0) + 1
    for step, befores in seen.items():
        try:
            step.check_budget(befores)
        except ValueError as error:
            raise BadInput(f"{step.label()}: {error}") from None
    return weights, [f"{message} ({count} layers)" for message, count in given_up.items()]


def _has(weight: Weight, what: str) -> bool:
    """Whether a mask or a grid is left anywhere in a composed weight."""
    inner = unmasked(weight)
    parts = [weight, *(inner.children().values() if isinstance(inner, Composed) else ())]
    return any(part.mask is not None if what == "mask" else isinstance(unmasked(part), Coded) for part in parts)


def _file_bytes(skeleton: Skeleton, weights: dict[str, Weight], added: dict[str, Tensor]) -> int:
    checkpoint = skeleton.checkpoint
    others = [name for name in skeleton.outer_names() if name.removesuffix(".weight") not in weights] + [
        skeleton.file_name(n) for i in range(len(skeleton.blocks)) for n in skeleton.block_names(i)
    ]
    total = sum(checkpoint.meta(skeleton.outer_source(name)).nbytes for name in others)
    total += sum(weight.nbytes for weight in weights.values()) + sum(tensor.nbytes for tensor in added.values())
    names = [*others, *added]
    for name, weight in weights.items():
        names += _tensor_names(name, weight)
    return total + sum(_HEADER_BYTES_PER_TENSOR + len(name) + 2 * len(str(total)) for name in names)


def _tensor_names(module: str, weight: Weight) -> list[str]:
    weight = unmasked(weight)
    if isinstance(weight, Composed):
        parts = [name for key, part in weight.children().items() for name in _tensor_names(f"{module}.{key}", part)]
        return [*(f"{module}.{name}" for name in weight.tensor_names), *parts]
    return [f"{module}.{name}" for name in (layers.tensor_names(weight) if isinstance(weight, Coded) else ["weight"])]


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
