"""Stages: passes that are carried out together, from one checkpoint to the next."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from compress.calibration import Windows
from compress.checkpoint import Checkpoint
from compress.errors import BadInput
from compress.gradients import write_fisher
from compress.passes import CorrectionPass, ModelPass, Pass, StreamPass
from compress.progress import Progress
from compress.records import Streamed
from compress.skeleton import Skeleton
from compress.stream import FISHER, Stream
from compress.surgery import operate
from compress.survey import allocations
from compress.train_pass import TrainPass
from compress.training_stage import train_stage
from compress.walk import Walk
from compress.writer import BlockStore


def group(passes: Sequence[Pass], fuse: bool) -> list[list[Pass]]:
    """Consecutive passes over layers and blocks share a stream (unless ``fuse`` is off); one that must first survey the
    model begins a new one, and training and model passes are stages of their own.

    Raises :class:`BadInput` for a correction with nothing before it to correct.
    """
    stages: list[list[Pass]] = []
    for step in passes:
        follows = bool(stages) and isinstance(stages[-1][0], StreamPass)
        if isinstance(step, CorrectionPass) and not follows:
            raise BadInput(f"{step.label()} corrects what a pass just before it did: write it after a quantizer or a pruner")
        joins = isinstance(step, CorrectionPass) or (fuse and isinstance(step, StreamPass) and not step.surveys)
        if follows and joins:
            stages[-1].append(step)
        else:
            stages.append([step])
    return stages


def run_stage(
    source: Checkpoint, original: Checkpoint, stage: Sequence[Pass], chosen: Windows, training: Windows | None, store: BlockStore,
    directory: Path, *, seed: int, device: str, dtype: torch.dtype, progress: Progress,
) -> tuple[Skeleton, Streamed]:  # fmt: skip
    """Carry out one stage on ``source``; finished parts go to ``store``, work files to ``directory``.

    original: the model that the run began with, a teacher's. chosen: calibration windows; training: those to train on.
    """
    first = stage[0]
    if isinstance(first, TrainPass):
        assert training is not None
        return train_stage(
            source, original, first, training, chosen.tokens, store, directory,
            seed=seed, device=device, dtype=dtype, progress=progress,
        )  # fmt: skip
    if isinstance(first, ModelPass):
        return operate(source, first, chosen.tokens, store, directory, device=device, dtype=dtype, progress=progress)
    skeleton = Skeleton(source, device, dtype)
    passes = [step for step in stage if isinstance(step, StreamPass)]
    if any("fisher" in step.needs.stats for step in passes):
        write_fisher(Walk(skeleton, chosen.tokens, directory, progress), BlockStore(directory / FISHER))
    allotted = allocations(skeleton, passes, chosen.tokens, directory, progress)
    teaches = source is not original and any(step.needs.teacher for step in passes)
    stream = Stream(
        skeleton, passes, chosen.tokens, store, directory, progress=progress, allocations=allotted,
        original=Skeleton(original, device, dtype) if teaches else None,
    )  # fmt: skip
    return skeleton, stream.run()
