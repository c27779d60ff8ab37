"""Measures one model after another on one protocol: tasks, divergence from the base, size, speed, what it knows.

The base is measured once per digest and protocol and cached. Both models are never in memory at the same time: the base's
log-probabilities on the held-out windows and its answers to the tasks lie in files. A model that does not fit into memory is
read block by block, with the same numbers but without a speed.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from compress.calibration import load_tokenizer, read_text, window_length, windows
from compress.checkpoint import Checkpoint
from compress.demo.measure import knowledge_bits
from compress.errors import CompressError
from compress.eval import documents
from compress.eval.baselines import baseline_directory, baseline_key, cached_baseline
from compress.eval.cost import Cost, artifact_cost, measure_speed
from compress.eval.documents import Document
from compress.eval.fidelity import base_logprobs, compare
from compress.eval.files import write_whole
from compress.eval.flips import Flips, flips
from compress.eval.harness import Answers, check_tasks, evaluate
from compress.eval.metrics import Metrics, Protocol, versions
from compress.eval.roofline import devices, estimate
from compress.eval.streamed import StreamedModel
from compress.eval.uncertainty import Difference, calibration_error, paired_difference
from compress.export.bitsandbytes import misread_here
from compress.manifest import Manifest
from compress.profile import profile, size
from compress.progress import Progress, no_foreign_bars
from compress.recipe import Evaluation
from compress.skeleton import Skeleton

log = logging.getLogger(__name__)

FACTS_TASK = "demo_facts"
_BEGUN = ", each begun by a document"
ROOM = 1.2  # of the weights: what opening and running a model takes


def load_model(path: Path, dtype: torch.dtype, device: str, trust_remote_code: bool = False) -> nn.Module:
    """Open a checkpoint or artifact of any tier with transformers, for evaluation."""
    from transformers import AutoModelForCausalLM

    config = json.loads((path / "config.json").read_text())
    if (config.get("quantization_config") or {}).get("quant_method") == "bitsandbytes":
        # Its reader would give that dtype to some tensors only, and put everything on a GPU where there is one.
        where: dict[str, Any] = {"dtype": "auto", "device_map": {"": device}}
    else:
        where = {"dtype": dtype}
    model: Any = AutoModelForCausalLM.from_pretrained(path, **where, trust_remote_code=trust_remote_code)
    return model.to(device).eval()


def fits(checkpoint: Checkpoint, dtype: torch.dtype, device: str) -> bool:
    """Whether the opened model has room in the device's free memory, its layers taken as dense ones."""
    on_gpu = device.startswith("cuda")
    free = torch.cuda.mem_get_info(torch.device(device))[0] if on_gpu else psutil.virtual_memory().available
    return ROOM * size(checkpoint).active_parameters * dtype.itemsize <= free


class Judge:
    """evaluation: resolved. base: the uncompressed checkpoint. name: what it is called. logged: where ``log_samples`` asks for
    them, what lm-eval logged, by model and task."""

    def __init__(self, evaluation: Evaluation, base: Checkpoint, name: str, dtype: torch.dtype, device: str, progress: Progress):
        self.evaluation, self.base, self.name = evaluation, base, name
        self.dtype, self.device, self.progress = dtype, device, progress
        self.logged: dict[str, dict[str, list[dict[str, Any]]]] = {}
        self.manager = check_tasks(evaluation)
        self.tokenizer = load_tokenizer(base.path, base.config.vocab_size, base.trust_remote_code)
        length = window_length(evaluation.length, base.config)
        texts, source = read_text(evaluation.data, bundled="held_out")
        self.windows = windows(
            self.tokenizer,
            texts,
            source,
            n=evaluation.windows,
            length=length,
            seed=evaluation.seed,
            at_most=evaluation.data is None,
            begin=evaluation.begin,
        )
        self.n_bytes = sum(self._text_bytes(row) - self._text_bytes(row[:1]) for row in self.windows.tokens)
        self.protocol = Protocol(
            data=f"{source}, {len(self.windows.tokens)} windows{_BEGUN if evaluation.begin == 'documents' else ''}",
            context_length=length, dtype=str(dtype).removeprefix("torch."),
            device=device, seed=evaluation.seed, limit=evaluation.limit, n_shot=evaluation.n_shot, versions=versions(),
        )  # fmt: skip
        settings = evaluation.model_dump(mode="json", exclude={"log_samples", "references", "training_tokens"}) | {
            "dtype": str(dtype),
            "device": device,
            "windows": self.windows.digest,
        }
        settings["name"] = name
        local = (evaluation.task_data,) if evaluation.task_data else ()
        self.key = baseline_key(base.digest, settings, include=(*evaluation.include, *local))

    def base_metrics(self) -> Metrics:
        """The base model's measurements, from the cache where it was measured before."""
        complete = self._logprobs.exists() and self._stored_answers() is not None and not self.evaluation.log_samples
        return cached_baseline(self.key, self._measure_base, fresh=not complete)

    def metrics(self, artifact: Path, label: str, name: str | None = None) -> Metrics:
        """Measure an artifact. name: what it is to be called; its directory's name if left out."""
        manifest = Manifest.read(artifact)
        checkpoint = Checkpoint(artifact, trust_remote_code=self.base.trust_remote_code)
        found, answers = self._measure(
            checkpoint, lambda model: {"fidelity": compare(model, self.windows.tokens, self._logprobs, n_bytes=self.n_bytes)}
        )
        compared = compare_answers(self._stored_answers() or {}, answers, self.evaluation.seed)
        update: dict[str, Any] = {
            "label": label, "model": name or artifact.name, "layers": tuple(layer_rows(artifact)),
            "flips": {task: own for task, (own, _) in compared.items() if own is not None},
            "differences": {task: own for task, (_, own) in compared.items() if own is not None},
        }  # fmt: skip
        if manifest is not None:
            update |= {
                "taxon": manifest.steps[-1].taxon,
                "passes": tuple(step.label for step in manifest.steps),
                "digest": manifest.weights_digest or "",
            }
        return found.model_copy(update=update)

    def write_samples(self, directory: Path) -> None:
        """All that lm-eval logged of each document, as ``samples/<model>/<task>.jsonl`` under ``directory``."""
        from lm_eval.utils import handle_non_serializable

        for model, tasks in self.logged.items():
            for task, samples in tasks.items():
                lines = (json.dumps(sample, default=handle_non_serializable, ensure_ascii=False) for sample in samples)
                write_whole(directory / "samples" / model / f"{task}.jsonl", "".join(f"{line}\n" for line in lines))

    def _text_bytes(self, tokens: torch.Tensor) -> int:
        return len(self.tokenizer.decode(tokens.tolist()).encode())

    @property
    def _logprobs(self) -> Path:
        return baseline_directory() / f"{self.key}.npy"

    def _stored_answers(self) -> dict[str, list[Document]] | None:
        try:
            return documents.load(self._answers)
        except (OSError, ValueError):
            return None

    @property
    def _answers(self) -> Path:
        return baseline_directory() / f"{self.key}.answers"

    def _measure_base(self) -> Metrics:
        def finish(model: nn.Module | StreamedModel) -> dict[str, Any]:
            base_logprobs(model, self.windows.tokens, self._logprobs)
            return {}

        found, answers = self._measure(self.base, finish)
        documents.save(self._answers, answers)
        return found

    def _measure(
        self, checkpoint: Checkpoint, finish: Callable[[nn.Module | StreamedModel], dict[str, Any]]
    ) -> tuple[Metrics, dict[str, list[Document]]]:
        name = checkpoint.path.name if checkpoint is not self.base else self.name
        self.progress(0, 1, f"evaluating {name}")
        context = getattr(self.base.config, "max_position_embeddings", None)
        with no_foreign_bars():
            start = time.perf_counter()
            model = self._open(checkpoint)
            seconds = time.perf_counter() - start
            more = finish(model)
            try:
                answers = evaluate(
                    model, self.tokenizer, self.evaluation, device=self.device, max_length=context, task_manager=self.manager
                )
            except ValueError as error:
                raise CompressError(f"evaluating {name}: {error}") from error
            if self.evaluation.log_samples:
                self.logged[name if checkpoint is self.base else "compressed"] = answers.samples
            if FACTS_TASK in self.evaluation.tasks:
                more["knowledge_bits"] = knowledge_bits(answers.lm, self.evaluation.limit)
            measured = {} if isinstance(model, StreamedModel) else {"speed": measure_speed(model), "load_seconds": seconds}
        return self._metrics(answers, self._cost(checkpoint).model_copy(update=measured), more), answers.documents

    def _metrics(self, answers: Answers, cost: Cost, more: dict[str, Any]) -> Metrics:
        outcomes = {task: tuple(document.outcome for document in own) for task, own in answers.documents.items()}
        weights = {task: tuple(document.weight for document in own) for task, own in answers.documents.items()}
        return Metrics(
            label=self.name, model=self.name, digest=self.base.digest, cost=cost, tasks=answers.scores, protocol=self.protocol,
            outcomes=outcomes, weights={task: own for task, own in weights.items() if len(set(own)) > 1},
            calibration_error=calibration(answers.documents), **more,
        )  # fmt: skip

    def _open(self, checkpoint: Checkpoint) -> nn.Module | StreamedModel:
        streamed = self.evaluation.streamed
        if streamed is None:
            streamed = not fits(checkpoint, self.dtype, self.device) or misread_here(checkpoint, self.device)
        if streamed:
            log.info("%s is measured block by block", checkpoint.path)
            return StreamedModel(Skeleton(checkpoint, self.device, self.dtype))
        return load_model(checkpoint.path, self.dtype, self.device, self.base.trust_remote_code)

    def _cost(self, checkpoint: Checkpoint) -> Cost:
        """Size, and speed on paper."""
        work = profile(checkpoint, self.dtype)
        return artifact_cost(checkpoint.path, manifest_size(Manifest.read(checkpoint.path))).model_copy(
            update={
                **size(checkpoint)._asdict(),
                "kv_cache_bytes_per_token": round(work.cache_bytes * len(work.windows)),
                "estimates": tuple(estimate(work, device) for device in devices()),
            }
        )


def compare_answers(
    base: dict[str, list[Document]], own: dict[str, list[Document]], seed: int
) -> dict[str, tuple[Flips | None, Difference | None]]:
    """Flips and the difference of the score, for each task whose documents both models answered; no difference where an
    outcome is infinite or not a number."""
    found: dict[str, tuple[Flips | None, Difference | None]] = {}
    for task, answers in own.items():
        before = base.get(task, [])
        if [document.index for document in before] != [document.index for document in answers]:
            log.warning("%s: the base answered other documents; their answers are not compared", task)
            continue
        new, old = ([document.outcome for document in side] for side in (answers, before))
        weights = [document.weight for document in answers]
        finite = all(map(math.isfinite, (*new, *old)))
        difference = paired_difference(new, old, weights, seed=seed) if finite else None
        found[task] = (flips(before, answers), difference)
    return found


def calibration(answers: dict[str, list[Document]]) -> dict[str, float]:
    """The calibration error of each multiple-choice task."""
    sure = {task: [d for d in own if d.confidence is not None] for task, own in answers.items()}
    return {
        task: calibration_error([d.confidence or 0.0 for d in own], [bool(d.likeliest_is_right) for d in own])
        for task, own in sure.items() if own
    }  # fmt: skip


def manifest_size(manifest: Manifest | None) -> dict[str, Any]:
    """Sizes that only the manifest knows; bits per weight are over the compressed matrices, scales and all."""
    if manifest is None:
        return {}
    changed = [record for record in manifest.modules.values() if record.passes]
    dense = sum(record.shape[0] * record.shape[1] for record in changed)
    return {
        "ideal_bytes": manifest.ideal_nbytes,
        "parameters": manifest.dense_parameters,
        "compressed_bits_per_weight": 8 * sum(record.nbytes for record in changed) / dense if dense else None,
    }


def layer_rows(artifact: Path) -> list[dict[str, Any]]:
    """The report's per-layer table, from the manifest; passes: labels of those that changed the layer, in order."""
    manifest = Manifest.read(artifact)
    shown = ("kind", "bits", "group_size", "rank", "sparsity", "weight_error", "output_error", "nbytes", "dense_nbytes")
    modules = manifest.modules if manifest else {}
    return [
        {"name": name} | {key: getattr(record, key) for key in shown} | {"passes": " > ".join(record.passes)}
        for name, record in modules.items()
    ]
