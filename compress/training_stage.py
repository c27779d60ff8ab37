"""A training pass as a stage: load the student and its teacher, run the loop, write what came out block by block."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compress import methods
from compress.calibration import Windows
from compress.checkpoint import Checkpoint
from compress.errors import BadInput
from compress.export import layers
from compress.journal import OUTER, block_part
from compress.processes import together
from compress.progress import Progress
from compress.records import Streamed, describe, grids
from compress.skeleton import Skeleton
from compress.stream import PROBE_LENGTH, PROBE_SEQUENCES
from compress.teacher import cached_teacher
from compress.train import Teacher, TrainResult, train
from compress.train_pass import Batch, TrainPass
from compress.weights import Weight, assert_structure_kept, structure
from compress.writer import BlockStore


def train_stage(
    source: Checkpoint,
    original: Checkpoint,
    step: TrainPass,
    training: Windows,
    probe: Tensor,
    store: BlockStore,
    directory: Path,
    *,
    seed: int,
    device: str,
    dtype: torch.dtype,
    progress: Progress,
) -> tuple[Skeleton, Streamed]:
    """Train ``source`` with ``step``; the ``original`` model is the teacher where it needs one.

    training: windows to train on. probe: windows whose first tokens give the logits to verify by.
    Returns the skeleton and records of the result, like a stream. A rerun resumes at the last saved step.
    """
    if source.tables and step.trains == "everything":
        raise BadInput(f"{step.label()}: the embedding is compressed, and training would open it: train before, or trains=blocks")
    if step.cache:
        if step.correct:
            together(_corrected, original, step, training, directory, seed, device, progress=progress)
        # before the student takes up memory, and other processes ask
        _teacher(original, step, training, directory, seed, device, progress)
    student, before, trained = together(_train, source, original, step, training, directory, seed, device, progress=progress)
    quantized = grids(trained.weights | student.tables())
    student.mixed = layers.library(quantized).is_mixed(quantized, source.cache_scheme)
    after = {name: student.settled(weight) for name, weight in trained.weights.items()}
    for name, weight in after.items():
        assert_structure_kept(f"{step.method()} at {name}", structure(before[name]), weight)
    others = _round_others(student)
    result = Streamed({}, {}, {}, (probe, probe), cache=source.cache_scheme, training=trained.summary())
    for index in range(len(student.blocks)):
        tensors: dict[str, Tensor] = {}
        for local in student.arch.linears if index not in student.owners else ():
            name = student.module_name(index, local)
            result.add(
                name,
                after[name],
                describe(name, after[name], before[name], [step.label()], None),
                student.is_conv1d(local),
            )
            transposed = student.is_conv1d(local) and name not in result.reshaped
            tensors |= layers.tensors(name, after[name], transposed=transposed)
        names = [student.file_name(name) for name in student.block_names(index)]
        store.write(block_part(index), tensors | {name: others[name] for name in names}, {})
    result.add_tables(student.tables(), {}, student.tied_head())
    store.write(OUTER, {name: others.get(name, tensor) for name, tensor in student.read_outer().items()}, {})
    result.probe = _probe(student, after, dtype, probe[:PROBE_SEQUENCES, :PROBE_LENGTH].contiguous())
    return student, result


def _train(
    source: Checkpoint, original: Checkpoint, step: TrainPass, training: Windows, directory: Path, seed: int, device: str,
    progress: Progress,
) -> tuple[Skeleton, dict[str, Weight], TrainResult]:  # fmt: skip
    """The student, its weights before, and what came out: the part of the stage that processes share."""
    student = Skeleton(source, device)
    before = student.materialise()
    teacher = _teacher(original, step, training, directory, seed, device, progress) if step.needs.teacher else None
    if isinstance(teacher, PreTrainedModel):
        picked = step.pick(student.model, teacher, Batch(training.tokens, training.counted), seed)
        training = training if picked is None else training.only(picked)
    result = train(
        student.model, before, teacher, training.tokens, step,
        seed=seed, device=device, directory=directory, progress=progress, counted=training.counted, tasks=training.tasks,
    )  # fmt: skip
    return student, before, result


def _teacher(
    original: Checkpoint, step: TrainPass, training: Windows, directory: Path, seed: int, device: str, progress: Progress
) -> Teacher:
    """The model that teaches, or what it predicts on the training windows."""

    def load() -> PreTrainedModel:
        return _corrected(original, step, training, directory, seed, device, progress)

    identity = f"{original.digest} {step.correction()} {training.digest} {seed}" if step.correct else original.digest
    return cached_teacher(identity, training.tokens, step.cache, load, progress) if step.cache else load()


def _corrected(
    original: Checkpoint, step: TrainPass, training: Windows, directory: Path, seed: int, device: str, progress: Progress
) -> PreTrainedModel:
    """The original, itself trained on the text that it is to teach where that is asked for; again at once what is trained."""
    skeleton = Skeleton(original, device)
    weights = skeleton.materialise()
    if step.correct:
        correction = methods.build("fine_tune", step.correction())
        assert isinstance(correction, TrainPass)
        train(
            skeleton.model, weights, None, training.tokens, correction,
            seed=seed, device=device, directory=directory / "teacher", progress=progress, counted=training.counted,
        )  # fmt: skip
    return skeleton.model


def _round_others(student: Skeleton) -> dict[str, Tensor]:
    """Norms, biases, embeddings as they will be stored; the student computes with them from here on."""
    names = [student.file_name(name) for i in range(len(student.blocks)) for name in student.block_names(i)]
    state = student.model.state_dict()
    rounded = {}
    outer = [name for name in student.outer_names() if name.removesuffix(".weight") not in student.checkpoint.tables]
    for name in names + outer:
        rounded[name] = state[name].to(student.checkpoint.meta(student.outer_source(name)).dtype)
        state[name].copy_(rounded[name])
    return rounded


@torch.no_grad()
def _probe(student: Skeleton, weights: dict[str, Weight], dtype: torch.dtype, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """(tokens, logits) of the trained model, computing as a reader of the artifact will."""
    student.dtype = dtype
    student.model.to(dtype)
    for index, block in enumerate(student.blocks):
        for local in student.arch.linears if index not in student.owners else ():
            student.install(block, local, weights[student.module_name(index, local)])
    logits = student.model(input_ids=tokens.to(student.device), use_cache=False).logits
    return tokens, logits.float().cpu()
