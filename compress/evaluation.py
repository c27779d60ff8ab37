"""Measure a compressed model beside its base: tasks, divergence, cost; then the report.

The base is measured once per digest and protocol and cached. Both models are never in memory at the same time: the
base's log-probabilities on the held-out windows lie in a file.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compress import __version__
from compress.calibration import load_tokenizer, read_text, window_length, windows
from compress.checkpoint import Checkpoint
from compress.errors import BadInput, explain
from compress.eval.baselines import baseline_directory, baseline_key, cached_baseline
from compress.eval.cost import artifact_cost, measure_speed
from compress.eval.fidelity import base_logprobs, compare
from compress.eval.harness import check_tasks, evaluate
from compress.eval.metrics import Metrics, Protocol, Report, merge, versions
from compress.eval.report import write_report
from compress.manifest import Manifest
from compress.passes import Pass
from compress.progress import Progress, no_foreign_bars
from compress.recipe import Evaluation, Recipe

TEXT_TASK, FACTS_TASK = "demo_text", "demo_facts"


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


def bundled_tasks() -> Path:
    """The directory of the bundled lm-eval tasks, written once per interpreter and release."""
    from compress.demo.tasks import write_tasks

    identity = hashlib.sha256(f"{sys.version} {__version__} {Path(__file__).parent}".encode()).hexdigest()[:12]
    directory = baseline_directory().parent / "tasks" / identity
    if not directory.exists():
        directory.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=directory.parent))
        write_tasks(aside)
        for file in aside.glob("*.yaml"):
            file.write_text(file.read_text().replace(str(aside), str(directory)))
        try:
            aside.rename(directory)
        except OSError:  # another process was faster
            shutil.rmtree(aside)
    return directory


def resolve_evaluation(evaluation: Evaluation, demo: bool) -> Evaluation:
    """Fill in what was left open: without tasks, the bundled held-out text, and for the demo model its facts.

    Raises :class:`BadInput` for an unknown task, with the nearest name.
    """
    tasks = evaluation.tasks or ((FACTS_TASK, TEXT_TASK) if demo else (TEXT_TASK,))
    include = evaluation.include
    if {TEXT_TASK, FACTS_TASK} & set(tasks):
        include = (*include, str(bundled_tasks()))
    resolved = evaluation.model_copy(update={"tasks": tuple(tasks), "include": include})
    try:
        check_tasks(resolved)  # reads names only
    except ValueError as error:
        raise BadInput(f"--tasks: {error}") from None
    return resolved


class Judge:
    """Measures models on one protocol. evaluation: resolved. base: the uncompressed checkpoint."""

    def __init__(self, evaluation: Evaluation, base: Checkpoint, name: str, dtype: torch.dtype, device: str, progress: Progress):
        self.evaluation, self.base, self.name = evaluation, base, name
        self.dtype, self.device, self.progress = dtype, device, progress
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
        )
        self.protocol = Protocol(
            data=f"{source}, {len(self.windows.tokens)} windows", context_length=length, dtype=str(dtype).removeprefix("torch."),
            device=device, seed=evaluation.seed, limit=evaluation.limit, n_shot=evaluation.n_shot, versions=versions(),
        )  # fmt: skip
        settings = evaluation.model_dump(mode="json") | {
            "dtype": str(dtype),
            "device": device,
            "windows": self.windows.digest,
        }
        settings["name"] = name
        self.key = baseline_key(base.digest, settings, include=evaluation.include)

    def base_metrics(self) -> Metrics:
        """The base model's measurements, from the cache where it was measured before."""
        found = cached_baseline(self.key, lambda: self._measure(self.base.path, self._measure_base))
        if not self._logprobs.exists():
            with no_foreign_bars():
                self._measure_base(load_model(self.base.path, self.dtype, self.device, self.base.trust_remote_code))
        return found

    def metrics(self, artifact: Path, label: str, name: str | None = None) -> Metrics:
        """Measure an artifact. name: what it is to be called; its directory's name if left out."""
        manifest = Manifest.read(artifact)

        def finish(model: nn.Module) -> dict[str, Any]:
            return {"fidelity": compare(model, self.windows.tokens, self._logprobs)}

        found = self._measure(artifact, finish)
        update: dict[str, Any] = {"label": label, "model": name or artifact.name}
        if manifest is not None:
            update |= {
                "taxon": manifest.steps[-1].taxon,
                "passes": tuple(step.label for step in manifest.steps),
                "digest": manifest.weights_digest or "",
            }
        return found.model_copy(update=update)

    @property
    def _logprobs(self) -> Path:
        return baseline_directory() / f"{self.key}.npy"

    def _measure_base(self, model: nn.Module) -> dict[str, Any]:
        base_logprobs(model, self.windows.tokens, self._logprobs)
        return {}

    def _measure(self, path: Path, finish: Callable[[nn.Module], dict[str, Any]]) -> Metrics:
        self.progress(0, 1, f"evaluating {path.name if path != self.base.path else self.name}")
        context = getattr(self.base.config, "max_position_embeddings", None)
        with no_foreign_bars():
            model = load_model(path, self.dtype, self.device, self.base.trust_remote_code)
            more = finish(model)
            tasks = evaluate(
                model, self.tokenizer, self.evaluation, device=self.device, max_length=context, task_manager=self.manager
            )
            speed = measure_speed(model)
        cost = artifact_cost(path, manifest_size(Manifest.read(path))).model_copy(update={"speed": speed})
        return Metrics(
            label=self.name, model=self.name, digest=self.base.digest, cost=cost, tasks=tasks, protocol=self.protocol, **more
        )


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


def evaluate_run(
    recipe: Recipe, base: Checkpoint, artifact: Path, name: str, out: Path, dtype: torch.dtype, progress: Progress
) -> tuple[Metrics, Report]:
    """Measure the artifact, soon to be ``out``, and its base; write metrics.json, chart and report beside the weights."""
    assert recipe.evaluation is not None
    label = point_label(recipe.passes)
    evaluation = resolve_evaluation(recipe.evaluation, is_demo(base, name))
    judge = Judge(evaluation, base, Path(name).name, dtype, recipe.device, progress)
    report = Report(title=f"{Path(name).name}: {label}", base=judge.base_metrics(), command=command(recipe, name))
    report = report.add(judge.metrics(artifact, label, out.name))
    write_report(report, artifact, layers=layer_rows(artifact))
    return report.points[-1], report


def is_demo(base: Checkpoint, name: str) -> bool:
    """Whether a model is the bundled one or made from it, and so knows the bundled facts."""
    return name == "demo" or (base.manifest is not None and base.manifest.base == "demo")


def point_label(passes: tuple[Pass, ...]) -> str:
    """A point's name in charts: its passes in order."""
    return " > ".join(step.label() for step in passes)


def command(recipe: Recipe, name: str) -> str:
    """What reproduces a run, as typed in a shell."""
    words = ["compress", "run", name, *(step.label() for step in recipe.passes), "-o", "OUT"]
    calibration, evaluation = recipe.calibration, recipe.evaluation
    for flag, value, default in (
        ("--calibration", calibration.data, None),
        ("--samples", calibration.samples, 128),
        ("--length", calibration.length, None),
        ("--tasks", ",".join(evaluation.tasks) if evaluation else None, ""),
        ("--limit", evaluation.limit if evaluation else None, None),
        ("--seed", recipe.seed, 0),
        ("--dtype", recipe.dtype, "auto"),
        ("--device", recipe.device, "cpu"),
    ):
        if value is not None and value != default:
            words += [flag, str(value)]
    return shlex.join(words)


def layer_rows(artifact: Path) -> list[dict[str, Any]]:
    """The report's per-layer table, from the manifest."""
    manifest = Manifest.read(artifact)
    shown = ("kind", "bits", "group_size", "rank", "sparsity", "weight_error", "output_error", "nbytes", "dense_nbytes")
    modules = manifest.modules if manifest else {}
    return [{"name": name} | {key: getattr(record, key) for key in shown} for name, record in modules.items()]


def card_lines(metrics: Metrics, report: Report) -> list[str]:
    """The model card's table of results."""
    lines = ["| | base | compressed |", "|---|---|---|"]
    lines.append(f"| bytes on disk | {report.base.cost.bytes_on_disk:,} | {metrics.cost.bytes_on_disk:,} |")
    for name, score in metrics.tasks.items():
        lines.append(f"| {name} ({score.primary}) | {report.base.tasks[name].value:.4g} | {score.value:.4g} |")
    if metrics.fidelity is not None:
        lines.append(f"| KL to base, nats/token | 0 | {metrics.fidelity.kl_mean:.4g} |")
    protocol = metrics.protocol
    lines += [
        "",
        f"Held-out text: {protocol.data} of {protocol.context_length} tokens; {protocol.dtype}, seed {protocol.seed}.",
    ]
    return lines


def evaluate_artifact(
    source: str, base: str | None, evaluation: Evaluation, device: str, dtype: str, out: Path | None, progress: Progress
) -> Report:
    """Measure any checkpoint. base: what to compare with; by default the model that an artifact was made from, where it is
    found, else nothing but the checkpoint itself. out: where to write the report, if anywhere."""
    from compress.pipeline import check_device, compute_dtype, stored_dtype

    check_device(device)
    checkpoint = Checkpoint.open(source)
    manifest = checkpoint.manifest
    if base is None and manifest is not None and (manifest.base == "demo" or Path(manifest.base).is_dir()):
        base = manifest.base
    reference = Checkpoint.open(base) if base else checkpoint
    name = base or source
    chosen = compute_dtype(dtype, device, stored_dtype(reference))
    resolved = resolve_evaluation(evaluation, is_demo(checkpoint, name))
    judge = Judge(resolved, reference, Path(name).name, chosen, device, progress)
    report = Report(title=f"{Path(source).name}", base=judge.base_metrics(), command=shlex.join(["compress", "eval", source]))
    if base is not None:
        label = " > ".join(step.label for step in manifest.steps) if manifest else Path(source).name
        report = report.add(judge.metrics(checkpoint.path, label))
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_report(report, out, layers=layer_rows(checkpoint.path))
    return report


def chart_artifacts(sources: list[Path], out: Path) -> Path:
    """One report over the metrics.json of many artifacts. Raises :class:`BadInput` where they do not compare."""
    files = [source / "metrics.json" if source.is_dir() else source for source in sources]
    if absent := [str(file) for file in files if not file.is_file()]:
        raise BadInput(f"no measurements at {', '.join(absent)}; run `compress eval` on it first")
    reports = []
    for file in files:
        try:
            reports.append(Report.load(file))
        except ValueError as error:
            raise BadInput(f"{file}: not measurements that compress wrote: {explain(error)}") from None
    try:
        report = merge(reports)
    except ValueError as error:
        raise BadInput(f"these measurements do not go into one chart: {error}") from None
    out.mkdir(parents=True, exist_ok=True)
    return write_report(with_lineage(report), out)


def with_lineage(report: Report) -> Report:
    """Let each chain name the point that is its longest proper prefix as its parent."""
    by_passes = {point.passes: point.label for point in report.points}

    def parent(point: Metrics) -> str | None:
        prefixes = (point.passes[:n] for n in range(len(point.passes) - 1, 0, -1))
        return next((by_passes[prefix] for prefix in prefixes if prefix in by_passes), None)

    points = tuple(point.model_copy(update={"parent": parent(point)}) for point in report.points)
    return report.model_copy(update={"points": points})
