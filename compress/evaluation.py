"""Measure a compressed model beside its base, then write the report."""

from __future__ import annotations

import hashlib
import logging
import shlex
import shutil
import sys
import tempfile
from pathlib import Path

import torch

from compress import __version__
from compress.amounts import parse_tokens
from compress.checkpoint import Checkpoint, resolve
from compress.errors import BadInput, explain
from compress.eval.baselines import baseline_directory
from compress.eval.bit_runs import with_low_bits
from compress.eval.compare import Comparison, compare_models
from compress.eval.harness import check_data, check_tasks
from compress.eval.metrics import Metrics, Report, merge
from compress.eval.reference import check_references, read_references, with_density
from compress.eval.report import write_report
from compress.gates import Gates
from compress.judge import FACTS_TASK, Judge, layer_rows
from compress.manifest import Manifest
from compress.methods import did_you_mean
from compress.passes import Pass
from compress.progress import Progress
from compress.recipe import Evaluation, Recipe

TEXT_TASK, DEMO = "demo_text", "demo_"
log = logging.getLogger(__name__)


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

    Raises :class:`BadInput` for an unknown task, with the nearest name, for local data that are not there, and for reference
    models that were not measured.
    """
    tasks = evaluation.tasks or ((FACTS_TASK, TEXT_TASK) if demo else (TEXT_TASK,))
    include = evaluation.include
    if any(name.startswith(DEMO) for name in tasks):  # also one that is mistyped
        include = (*include, str(bundled_tasks()))
    resolved = evaluation.model_copy(update={"tasks": tuple(tasks), "include": include})
    try:
        manager = check_tasks(resolved)  # reads names only
    except ValueError as error:
        raise BadInput(f"--tasks: {error}") from None
    try:
        check_data(resolved, manager)
    except ValueError as error:
        raise BadInput(f"--data: {error}") from None
    if references := _references(resolved):
        try:
            check_references(references, resolved.limit, resolved.n_shot)
        except ValueError as error:
            raise BadInput(f"--reference: {error}") from None
    return resolved


def _references(evaluation: Evaluation) -> list[Metrics]:
    """The reference models' measurements. Raises :class:`BadInput` where they cannot be read."""
    try:
        return read_references(evaluation.references)
    except (OSError, ValueError) as error:
        raise BadInput(f"--reference: {explain(error)}") from None


def _judged(report: Report, evaluation: Evaluation) -> Report:
    """With densities where there are references, and with what low bits cost."""
    if references := _references(evaluation):
        try:
            report = with_density(report, references)
        except ValueError as error:
            raise BadInput(f"--reference: {error}") from None
    return with_low_bits(report, evaluation.training_tokens)


def evaluate_run(
    recipe: Recipe, base: Checkpoint, artifact: Path, name: str, out: Path, dtype: torch.dtype, progress: Progress
) -> tuple[Metrics, Report]:
    """Measure the artifact, soon to be ``out``, and its base; write metrics.json, chart and report beside the weights."""
    assert recipe.evaluation is not None
    label = point_label(recipe.passes)
    evaluation = resolve_evaluation(recipe.evaluation, is_demo(base, name))
    judge = Judge(evaluation, base, Path(name).name, dtype, recipe.device, progress)
    report = Report(title=f"{Path(name).name}: {label}", base=judge.base_metrics(), command=command(recipe, name))
    point = judge.metrics(artifact, label, out.name)
    report = _judged(report.add(point.model_copy(update={"command": report.command})), evaluation)
    judge.write_samples(artifact)
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
    calibration = recipe.calibration
    flags = [
        ("--calibration", calibration.data, None),
        ("--column", calibration.column, "text"),
        ("--samples", calibration.samples, 128),
        ("--length", calibration.length, None),
        ("--seed", recipe.seed, 0),
        ("--dtype", recipe.dtype, "auto"),
        ("--device", recipe.device, "cpu"),
    ]
    return shlex.join(words + _typed(flags) + evaluation_flags(recipe.evaluation or Evaluation()))


def evaluation_flags(evaluation: Evaluation) -> list[str]:
    """The options of the command line that say how to measure."""
    tokens = evaluation.training_tokens
    words = _typed([
        ("--tasks", ",".join(evaluation.tasks), ""),
        ("--limit", evaluation.limit, None),
        ("--n-shot", evaluation.n_shot, None),
        ("--batch-size", evaluation.batch_size, 8),
        ("--data", evaluation.task_data, None),
        ("--task-seed", evaluation.task_seed, None),
        ("--training-tokens", tokens and f"{tokens:.12g}", None),
        ("--begin", evaluation.begin, "anywhere"),
    ])  # fmt: skip
    own = str(baseline_directory().parent / "tasks")
    repeated = [("--include", entry) for entry in evaluation.include if not entry.startswith(own)]
    repeated += [("--reference", entry) for entry in evaluation.references]
    return words + [word for pair in repeated for word in pair]


def _typed(flags: list[tuple[str, object, object]]) -> list[str]:
    return [word for flag, value, default in flags if value not in (None, default) for word in (flag, str(value))]


def evaluate_artifact(
    source: str, base: str | None, evaluation: Evaluation, device: str, dtype: str, out: Path | None, progress: Progress,
    *, gates: Gates | None = None,
) -> Report:  # fmt: skip
    """Measure any checkpoint. base: what to compare with; by default the model that an artifact was made from, where it is
    found, else nothing but the checkpoint itself. out: where to write the report, if anywhere. gates: to be checked on the
    result, which must therefore be comparable."""
    from compress.pipeline import check_device, compute_dtype, stored_dtype

    check_device(device)
    if evaluation.log_samples and out is None:
        raise BadInput("--log-samples writes files: say where, with --out")
    checkpoint = Checkpoint.open(source)
    manifest = checkpoint.manifest
    if base is None and manifest is not None:
        base = _own_base(manifest)
    if base is None and gates is not None and gates.need_measuring:
        raise BadInput(f"{' and '.join(gates.need_measuring)} need the base model, which was not found; name it with --base")
    reference = Checkpoint.open(base) if base else checkpoint
    _check_vocabulary(checkpoint, reference)
    if manifest is not None and base == manifest.base and reference.digest != manifest.base_digest:
        log.warning("%s has changed since %s was made from it", base, source)
    if out is not None:
        _make_directory(out)
    name = base or source
    chosen = compute_dtype(dtype, device, stored_dtype(reference))
    resolved = resolve_evaluation(evaluation, is_demo(checkpoint, name))
    judge = Judge(resolved, reference, Path(name).name, chosen, device, progress)
    flags = [("--base", base, manifest.base if manifest else None), ("--device", device, "cpu"), ("--dtype", dtype, "auto")]
    typed = shlex.join(["compress", "eval", source, *_typed(flags), *evaluation_flags(evaluation)])
    report = Report(title=f"{Path(source).name}", base=judge.base_metrics(), command=typed)
    if base is not None:
        label = " > ".join(step.label for step in manifest.steps) if manifest else Path(source).name
        report = report.add(judge.metrics(checkpoint.path, label))
    report = _judged(report, resolved)
    if out is not None:
        judge.write_samples(out)
        write_report(report, out, layers=layer_rows(checkpoint.path))
    return report


def _own_base(manifest: Manifest) -> str | None:
    """The model that an artifact was made from, where this machine has it."""
    try:
        resolve(manifest.base, cached=True)
    except BadInput:
        log.warning("the base model %s is not here: there is nothing to compare with; name it with --base", manifest.base)
        return None
    return manifest.base


def _check_vocabulary(checkpoint: Checkpoint, base: Checkpoint) -> None:
    """Raise :class:`BadInput` where the two do not predict the same tokens: their predictions do not compare."""
    ours, theirs = checkpoint.config.vocab_size, base.config.vocab_size
    if ours != theirs:
        raise BadInput(f"{checkpoint.path} and its base {base.path} have vocabularies of {ours:,} and {theirs:,} tokens")


def _make_directory(out: Path) -> None:
    """Raises :class:`BadInput`, before any compute, for what can be no directory."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"--out {out}: cannot be a directory to write into: {error.strerror}") from None


def load_report(source: Path) -> Report:
    """The measurements beside an artifact, or of a metrics.json file. Raises :class:`BadInput` where there are none."""
    file = source / "metrics.json" if source.is_dir() else source
    if not file.is_file():
        raise BadInput(f"no measurements at {file}; run `compress eval` on it first")
    try:
        return Report.load(file)
    except ValueError as error:
        raise BadInput(f"{file}: not measurements that compress wrote: {explain(error)}") from None


def compare_artifacts(a: str, b: str) -> Comparison:
    """Compare two measured models: artifacts, or metrics.json files, each followed by ``#LABEL`` where it holds several points
    (``#base``: the base model's). Raises :class:`BadInput` where they do not compare."""
    (before, first), (after, second) = _measured(a), _measured(b)
    try:
        return compare_models(before, after, same_base=first.base.digest == second.base.digest)
    except ValueError as error:
        raise BadInput(f"{a} and {b}: {error}") from None


def _measured(source: str) -> tuple[Metrics, Report]:
    path, _, label = (source, "", "") if Path(source).exists() else source.partition("#")
    report = load_report(Path(path))
    models = {"base": report.base, report.base.label: report.base} | {point.label: point for point in report.points}
    if label and label not in models:
        raise BadInput(f"{path} has no model {label!r}{did_you_mean(label, models)}; there is {', '.join(models)}")
    if not label and len(report.points) > 1:
        raise BadInput(f"{path} has several models; write {path}#LABEL, with one of: {', '.join(models)}")
    return models[label] if label else (*report.points, report.base)[0], report


def chart_artifacts(sources: list[Path], out: Path, training_tokens: str | None = None) -> Path:
    """One report over the metrics.json of many artifacts. training_tokens: that the base model was trained on, such as 15T; by
    default what the measurements say. Raises :class:`BadInput` where they do not compare."""
    try:
        tokens = parse_tokens(training_tokens) if training_tokens is not None else None
    except BadInput as error:
        raise BadInput(f"--training-tokens: {error}") from None
    reports = [load_report(source) for source in sources]
    told = {report.low_bits.training_tokens for report in reports if report.low_bits is not None} - {None}
    if tokens is None and len(told) > 1:
        raise BadInput("these measurements name different numbers of training tokens; say which with --training-tokens")
    try:
        report = merge(reports)
    except ValueError as error:
        raise BadInput(f"these measurements do not go into one chart: {error}") from None
    _make_directory(out)
    return write_report(with_low_bits(with_lineage(report), tokens or next(iter(told), None)), out)


def with_lineage(report: Report) -> Report:
    """Let each chain name the point that is its longest proper prefix as its parent."""
    by_passes = {point.passes: point.label for point in report.points}

    def parent(point: Metrics) -> str | None:
        prefixes = (point.passes[:n] for n in range(len(point.passes) - 1, 0, -1))
        return next((by_passes[prefix] for prefix in prefixes if prefix in by_passes), None)

    points = tuple(point.model_copy(update={"parent": parent(point)}) for point in report.points)
    return report.model_copy(update={"points": points})
