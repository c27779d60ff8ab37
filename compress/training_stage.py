"""A training pass as a stage: load the student and its teacher, run the loop, write what came out block by block."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compress import methods
from compress.calibration import Windows
from compress.checkpoint import Checkpoint
from compress.errors import BadInput, CompressError
from compress.export import layers
from compress.journal import OUTER, block_part
from compress.processes import together
from compress.progress import RESUMED, Progress
from compress.records import Streamed, describe, grids
from compress.skeleton import Skeleton
from compress.stream import PROBE_LENGTH, PROBE_SEQUENCES
from compress.teacher import cache_file, cached_teacher
from compress.train import Teacher, TrainResult, train
from compress.train_pass import Batch, TrainPass
from compress.weights import Weight, assert_structure_kept, structure
from compress.writer import BlockStore

log = logging.getLogger(__name__)


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
    lesson = _Lesson(original, step, training, directory / "teacher", seed, device)
    if step.cache:
        lesson.prepare(progress)
    student, before, trained = together(_train, source, lesson, directory, progress=progress)
    quantized = grids(trained.weights | student.tables())
    student.mixed = layers.library(quantized).is_mixed(quantized, source.cache_scheme)
    after = {name: student.settled(weight) for name, weight in trained.weights.items()}
    for name, weight in after.items():
        assert_structure_kept(f"{step.method()} at {name}", structure(before[name]), weight)
    others = _round_others(student)
    result = Streamed({}, {}, {}, (probe, probe), cache=source.cache_scheme, training=trained.summary() | lesson.summary)
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
    source: Checkpoint, lesson: _Lesson, directory: Path, progress: Progress
) -> tuple[Skeleton, dict[str, Weight], TrainResult]:
    """The student, its weights before, and what came out: the part of the stage that processes share."""
    step, training, seed, device = lesson.step, lesson.training, lesson.seed, lesson.device
    student = Skeleton(source, device)
    before = student.materialise()
    teacher = lesson.teacher(progress) if step.needs.teacher else None
    if isinstance(teacher, PreTrainedModel):
        picked = step.pick(student.model, teacher, Batch(training.tokens, training.counted), seed)
        training = training if picked is None else training.only(picked)
    result = train(
        student.model, before, teacher, training.tokens, step,
        seed=seed, device=device, directory=directory, progress=progress, counted=training.counted, tasks=training.tasks,
    )  # fmt: skip
    return student, before, result


@dataclass
class _Lesson:
    """Who teaches. directory: of the state of the teacher's own training. summary: of that training, where there was one."""

    original: Checkpoint
    step: TrainPass
    training: Windows
    directory: Path
    seed: int
    device: str
    summary: dict[str, Any] = field(default_factory=dict)

    def prepare(self, progress: Progress) -> None:
        """Have the predictions on disk that ``cache`` asks for, before the student takes up memory, and other processes ask."""
        assert self.step.cache
        if self.step.correct and not cache_file(self.identity, self.training.tokens, self.step.cache).exists():
            together(_Lesson.corrected, self, progress=progress)
        self.teacher(progress)

    def teacher(self, progress: Progress) -> Teacher:
        """The model, or what it predicts on the training windows."""

        def load() -> PreTrainedModel:
            model, self.summary = self.corrected(progress)
            return model

        return cached_teacher(self.identity, self.training.tokens, self.step.cache, load, progress) if self.step.cache else load()

    @property
    def identity(self) -> str:
        """What decides what the teacher predicts."""
        if not self.step.correct:
            return self.original.digest
        settings = self._correction.model_dump(mode="json", exclude={"accumulate", "checkpointing"})
        return f"{self.original.digest} {settings} {self.training.digest} {self.seed}"

    @property
    def _correction(self) -> TrainPass:
        counted = self.training.counted
        n_windows = len(self.training.tokens) if counted is None else int(counted[:, 1:].any(1).sum())
        settings = self.step.correction(n_windows) | ({"trains": "blocks"} if self.original.tables else {})
        correction = methods.build("fine_tune", settings)
        assert isinstance(correction, TrainPass)
        return correction

    def corrected(self, progress: Progress) -> tuple[PreTrainedModel, dict[str, Any]]:
        """The original, itself trained on the text where that is asked for, and how that went. Done once, it is done at once."""
        skeleton = Skeleton(self.original, self.device)
        weights = skeleton.materialise()
        if not self.step.correct:
            return skeleton.model, {}

        def tell(done: int, total: int, message: str) -> None:
            progress(done, total, message if message == RESUMED else f"teacher: {message}")

        try:
            result = train(
                skeleton.model, weights, None, self.training.tokens, self._correction, seed=self.seed, device=self.device,
                directory=self.directory, progress=tell, counted=self.training.counted,
            )  # fmt: skip
        except CompressError as error:
            raise type(error)(f"{self.step.label()}: when the teacher was corrected: {error}") from None
        if not result.n_steps:
            log.warning("%s: no step of the correction made the teacher better; it teaches as it was", self.step.label())
        return skeleton.model, {"teacher": result.summary()}


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
