"""Run a recipe: validate, stream, train, reload, evaluate, report, publish.

Everything happens in ``OUT.partial`` and is renamed to OUT once it is complete, so OUT is never half-written, and the same
command after a crash continues at the last finished block.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

from compress.artifact import carry_records, write_artifact
from compress.calibration import Windows, load_tokenizer, read_text, window_length, windows
from compress.card import write_card
from compress.checkpoint import Checkpoint
from compress.errors import BadInput, GateMissed
from compress.gates import Checked, Gates, missed
from compress.manifest import Manifest, Step, installed_versions
from compress.passes import Pass, StreamPass
from compress.plan import Plan, make_plan
from compress.processes import asks_for_shares, carry_out
from compress.progress import Progress, silent
from compress.recipe import Calibration, Evaluation, Recipe
from compress.records import Streamed
from compress.skeleton import Skeleton
from compress.stages import group, run_stage
from compress.stream import check_targets
from compress.teacher import open_teacher
from compress.train_pass import TrainPass
from compress.verify import Verification, save_probe, verify
from compress.workspace import Workspace, check_not_source, check_output
from compress.writer import BlockStore, write_text

log = logging.getLogger(__name__)


class Result(BaseModel):
    """What a run made. path: the artifact. bytes: of its weight files. metrics: the compressed model's measurements, report:
    these beside the base model's (both None where evaluation was off). report_path: report.html. checked: every gate."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    path: Path
    bytes: int
    manifest: Manifest
    verification: Verification
    metrics: Any = None
    report: Any = None
    report_path: Path | None = None
    checked: list[Checked] = []

    def lines(self) -> list[str]:
        """The result in words."""
        found = [
            f"{self.path}: {self.bytes:,} bytes ({self.manifest.tier}), reloaded in a fresh process: "
            f"logits differ by at most {self.verification.max_difference:.2g}"
        ]
        if self.metrics is not None:
            for name, score in self.metrics.tasks.items():
                before = self.report.base.tasks[name].value
                kept = self.metrics.recovery.get(name)
                found.append(f"{name} {score.primary}: {before:.4g} -> {score.value:.4g}" + (f" ({kept:.1%})" if kept else ""))
            if self.metrics.fidelity is not None:
                fidelity = self.metrics.fidelity
                found.append(f"KL to base {fidelity.kl_mean:.4g}, same top token {fidelity.top1_agreement:.1%}")
        return [*found, f"report: {self.report_path}"] if self.report_path else found

    def summary(self) -> dict[str, Any]:
        """The result as one JSON object."""
        found = {
            "path": str(self.path),
            "bytes": self.bytes,
            "ideal_bytes": round(self.manifest.ideal_nbytes),
            "tier": self.manifest.tier,
            "steps": [step.label for step in self.manifest.steps],
            "verification": self.verification.model_dump(mode="json"),
            "report": str(self.report_path) if self.report_path else None,
        }
        if self.checked:
            found["gates"] = {each.option.removeprefix("--"): each.told for each in self.checked}
        if self.metrics is not None:
            found["metrics"] = self.metrics.model_dump(mode="json")
        return found


class Pipeline:
    """Passes in order, ready to run on any model; the arguments are those of :class:`Recipe`.

    >>> Pipeline([Wanda(sparsity=0.5), GPTQ(bits=4)]).run("MODEL", "OUT")
    """

    def __init__(
        self,
        passes: Sequence[Pass | str],
        *,
        calibration: Calibration | None = None,
        evaluation: Evaluation | None = None,
        evaluate: bool = True,
        **settings: Any,
    ):
        chosen = (evaluation or Evaluation()) if evaluate else None
        self.recipe = Recipe.parse(
            {"passes": list(passes), "calibration": calibration or Calibration(), "evaluation": chosen, **settings},
            "Pipeline",
        )

    def run(
        self,
        model: str | Path | nn.Module,
        out: str | Path,
        *,
        tokenizer: Any = None,
        overwrite: bool = False,
        progress: Progress = silent,
    ) -> Result:
        """Compress ``model`` (a directory, a hub id, ``demo``, or a live module with its tokenizer) into the directory ``out``.

        Raises :class:`BadInput` before any compute where something is wrong, :class:`CompressError` where a step fails.
        """
        return run(self.recipe, model=model, out=out, tokenizer=tokenizer, overwrite=overwrite, progress=progress)


def run(
    recipe: Recipe | str | Path | dict[str, Any],
    *,
    model: str | Path | nn.Module | None = None,
    out: str | Path | None = None,
    tokenizer: Any = None,
    overwrite: bool = False,
    progress: Progress = silent,
    gates: Gates | None = None,
) -> Result:
    """Run a recipe (an object, a file, a preset's name or plain data); ``model`` and ``out`` override what it names.

    gates: conditions on the result; where one is missed, :class:`GateMissed` is raised and the artifact is kept as
    ``OUT.rejected``.
    """
    if isinstance(recipe, dict):
        recipe = Recipe.parse(recipe)
    elif not isinstance(recipe, Recipe):
        recipe = Recipe.load(recipe)
    source, target = model if model is not None else recipe.model, out if out is not None else recipe.output
    if source is None or target is None:
        raise BadInput("a run needs a model and an output directory: name them in the recipe or in the call")
    target = Path(target).expanduser()
    if not recipe.passes:
        raise BadInput("the recipe has no passes; `compress methods` lists what there is")

    def execute() -> Result:
        with _live(source, tokenizer, target) as path:
            name = str(source) if isinstance(source, str | Path) else type(source).__name__
            return _Run(recipe, path, name, target, overwrite, progress, gates or Gates()).execute()

    return carry_out(execute, recipe.device)


def plan(recipe: Recipe) -> Plan:
    """What a run of ``recipe`` would do. Raises :class:`BadInput` like the run itself; computes and writes nothing."""
    if recipe.model is None or not recipe.passes:
        raise BadInput("a plan needs a model and passes")
    checkpoint = Checkpoint.open(recipe.model, trust_remote_code=recipe.trust_remote_code, allow_pickle=recipe.allow_pickle)
    check_device(recipe.device)
    skeleton = Skeleton(checkpoint)
    skeleton.check()
    check_targets([step for step in recipe.passes if isinstance(step, StreamPass)], skeleton.linear_names())
    return make_plan(
        checkpoint, recipe.model, group(recipe.passes, recipe.fuse), samples=recipe.calibration.samples,
        length=window_length(recipe.calibration.length, checkpoint.config),
        dtype=compute_dtype(recipe.dtype, recipe.device, stored_dtype(checkpoint)),
    )  # fmt: skip


class _Run:
    """One execution: the state that its phases share."""

    def __init__(
        self,
        recipe: Recipe,
        source: str | Path,
        name: str,
        out: Path,
        overwrite: bool,
        progress: Progress,
        gates: Gates,
    ):
        self.recipe, self.name, self.out, self.overwrite, self.progress = recipe, name, out, overwrite, progress
        self.gates = gates
        gates.check_measurable(recipe.evaluation is not None)
        self.checkpoint = Checkpoint.open(source, trust_remote_code=recipe.trust_remote_code, allow_pickle=recipe.allow_pickle)
        check_not_source(out, self.checkpoint.path)
        self.dtype = compute_dtype(recipe.dtype, recipe.device, stored_dtype(self.checkpoint))
        self.stages = group(recipe.passes, recipe.fuse)
        self.lineage = self.checkpoint.manifest

    def execute(self) -> Result:
        """All phases in order."""
        prepared = self._validate()
        files = [each.digest for each in (prepared, *self.training_windows.values(), *self.teachers.values())]
        files += filter(None, (step.contents() for step in self.recipe.passes))
        identity = f"{self.recipe.fingerprint()}-{self.checkpoint.digest}-{'-'.join(files)}-{self.dtype}"
        with Workspace(self.out, identity, self.overwrite) as workspace:
            workspace.check_space(2 * (self.plan.predicted_bytes + (len(self.stages) - 1) * self.checkpoint.nbytes))
            current = self.checkpoint
            for number, stage in enumerate(self.stages):
                directory = workspace.directory / f"stage-{number}"
                if Manifest.read(directory / "artifact") is None:
                    self._stage(current, number, stage, directory, prepared)
                current = Checkpoint(directory / "artifact", trust_remote_code=self.recipe.trust_remote_code)
            artifact = current.path
            self.progress(0, 1, "reloading in a fresh process")
            dtype_name = str(self.dtype).removeprefix("torch.")
            verification = verify(artifact, dtype=dtype_name, device=self.recipe.device)
            write_text(artifact / "recipe.yaml", self.recipe.model_copy(update={"model": self.name}).dump())
            metrics = report = None
            if self.recipe.evaluation is not None:
                from compress.evaluation import evaluate_run

                metrics, report = evaluate_run(
                    self.recipe, self.checkpoint, artifact, self.name, self.out, self.dtype, self.progress
                )
            manifest = Manifest.read(artifact)
            assert manifest is not None
            write_card(artifact, manifest, self.checkpoint.path, metrics, report)
            checked = self.gates.checked(manifest.nbytes, metrics)
            failure = missed(checked)
            path = self.out.resolve().with_name(self.out.resolve().name + ".rejected") if failure else self.out
            workspace.publish(artifact, path)
        result = Result(
            path=path, bytes=manifest.nbytes, manifest=manifest, verification=verification, metrics=metrics, checked=checked,
            report=report, report_path=path / "report.html" if report is not None else None,
        )  # fmt: skip
        if failure:
            raise GateMissed(f"{failure}. The artifact was kept as {path}", result)
        return result

    def _validate(self) -> Windows:
        """Everything that can be wrong with the request, before any compute; returns the calibration windows."""
        check_output(self.out, self.overwrite)
        check_device(self.recipe.device)
        for step in self.recipe.passes:
            if isinstance(step, TrainPass):
                asks_for_shares(step)
        skeleton = Skeleton(self.checkpoint)
        skeleton.check()
        check_targets([step for step in self.recipe.passes if isinstance(step, StreamPass)], skeleton.linear_names())
        vocabulary = self.checkpoint.config.vocab_size
        self.tokenizer = load_tokenizer(self.checkpoint.path, vocabulary, self.recipe.trust_remote_code)
        if self.recipe.evaluation is not None:
            from compress.evaluation import is_demo, resolve_evaluation

            resolve_evaluation(self.recipe.evaluation, is_demo(self.checkpoint, self.name))
        settings = self.recipe.calibration
        length = window_length(settings.length, self.checkpoint.config)
        self.plan = make_plan(self.checkpoint, self.name, self.stages, samples=settings.samples, length=length, dtype=self.dtype)
        for warning in self.plan.warnings:
            log.warning(warning)
        self.dtype = self._readers_dtype()
        chosen = self._windows(settings.data, "calibration", settings.samples, length)
        self.training_windows = {
            number: self._training_windows(stage[0], chosen)
            for number, stage in enumerate(self.stages) if isinstance(stage[0], TrainPass)
        }  # fmt: skip
        self.teachers = {
            number: open_teacher(step, self.checkpoint, self.tokenizer, self.training_windows[number].tokens.shape[1])
            for number, (step, *_) in enumerate(self.stages) if isinstance(step, TrainPass)
        }  # fmt: skip
        self.progress(0, 1, "checking the source's weights")
        self.checkpoint.check_finite()
        return chosen

    def _readers_dtype(self) -> torch.dtype:
        """What the result computes in once it is opened: as the run does, unless its format's readers decide that."""
        stored = stored_dtype(self.checkpoint)
        if not self.plan.computes_as_stored or self.dtype == stored:
            return self.dtype
        log.warning(
            "readers of bitsandbytes artifacts compute in the file's %s outside the quantized layers, whatever dtype they are "
            "asked for, and so does this run", str(stored).removeprefix("torch."),
        )  # fmt: skip
        return stored

    def _stage(self, source: Checkpoint, number: int, stage: list[Pass], directory: Path, chosen: Windows) -> None:
        store = BlockStore(directory / "blocks")
        original, training = self.teachers.get(number, self.checkpoint), self.training_windows.get(number)
        skeleton, streamed = run_stage(
            source, original, stage, chosen, training, store, directory,
            seed=self.recipe.seed, device=self.recipe.device, dtype=self.dtype, progress=self.progress,
        )  # fmt: skip
        carry_records(streamed, source.manifest)
        self._finish(skeleton, streamed, store, source, number, directory, chosen)

    def _finish(
        self, skeleton: Skeleton, streamed: Streamed, store: BlockStore, source: Checkpoint, number: int, directory: Path,
        chosen: Windows,
    ) -> None:  # fmt: skip
        earlier = source.manifest.steps if source.manifest else []
        manifest = Manifest(
            base=self.lineage.base if self.lineage else self.name,
            base_digest=self.lineage.base_digest if self.lineage else self.checkpoint.digest,
            parent=self.name if self.lineage else None,
            parent_digest=self.checkpoint.digest if self.lineage else None,
            steps=[*earlier, *(_step(step, number, streamed.training) for step in self.stages[number])],
            calibration={
                "source": chosen.source, "samples": len(chosen.tokens), "length": chosen.tokens.shape[1], "sha256": chosen.digest,
            },
            seed=self.recipe.seed,
            compute_dtype=str(self.dtype).removeprefix("torch."),
            versions=installed_versions(),
        )  # fmt: skip
        aside = directory / "assembling"
        write_artifact(aside, skeleton, streamed, store, manifest)
        save_probe(aside, *streamed.probe)
        aside.rename(directory / "artifact")
        for entry in directory.iterdir():  # blocks, activations, training state: the artifact holds all that is needed
            if entry.name != "artifact":
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    def _training_windows(self, step: TrainPass, chosen: Windows) -> Windows:
        length = window_length(step.length or chosen.tokens.shape[1], self.checkpoint.config)
        return self._windows(step.data or self.recipe.calibration.data, "train", step.n_windows, length, at_most=True)

    def _windows(self, data: str | None, bundled: str, n: int, length: int, at_most: bool = False) -> Windows:
        ways, seed = self.recipe.calibration, self.recipe.seed
        texts, origin = read_text(data, ways.column, ways.split, bundled=bundled)
        return windows(self.tokenizer, texts, origin, n=n, length=length, seed=seed, at_most=at_most, begin=ways.begin)


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The floating dtype in which the checkpoint keeps most of its numbers."""
    counts: dict[torch.dtype, int] = {}
    for key in checkpoint.keys:
        tensor = checkpoint.meta(key)
        if tensor.is_floating_point() and ".weight." not in key:  # not the scales of bitsandbytes
            counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numel()
    return max(counts, key=lambda dtype: counts[dtype])


def compute_dtype(wanted: str, device: str, stored: torch.dtype) -> torch.dtype:
    """ "auto" is the stored dtype where the device multiplies in it fast, else float32.

    A CPU without bfloat16 instructions emulates them hundreds of times slower than float32.
    """
    if wanted != "auto":
        return getattr(torch, wanted)
    if not device.startswith("cpu"):
        return stored if stored in (torch.bfloat16, torch.float16) else torch.float32
    fast = torch.cpu._is_avx512_bf16_supported() if hasattr(torch.cpu, "_is_avx512_bf16_supported") else False
    return torch.bfloat16 if stored == torch.bfloat16 and fast else torch.float32


def check_device(device: str) -> None:
    """Raise :class:`BadInput` for a device that torch does not know or find here."""
    try:
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise BadInput(f"--device {device}: not usable on this machine ({reason}); try --device cpu") from None


def _step(step: Pass, stage: int, training: dict[str, Any] | None) -> Step:
    return Step(
        method=step.method(), label=step.label(), taxon=step.taxon.value, paper=step.paper,
        settings=step.model_dump(mode="json"), stage=stage, training=training, contents=step.contents(),
    )  # fmt: skip


def _live(source: str | Path | nn.Module, tokenizer: Any, out: Path):
    """A path as it is; a live module is saved to a temporary directory first, so that there is one way to read a model."""
    if not isinstance(source, nn.Module):
        return nullcontext(source)
    if tokenizer is None:
        raise BadInput("a live module needs its tokenizer: run(model, out, tokenizer=...)")
    return _saved(source, tokenizer, out)


class _saved:
    def __init__(self, model: nn.Module, tokenizer: Any, out: Path):
        self.model, self.tokenizer, self.out = model, tokenizer, out

    def __enter__(self) -> Path:
        try:
            self.out.absolute().parent.mkdir(parents=True, exist_ok=True)
            self.temporary = tempfile.TemporaryDirectory(dir=self.out.absolute().parent, prefix=".compress-")
        except OSError as error:
            raise BadInput(f"{self.out}: cannot be written: {error.strerror}") from None
        self.model.save_pretrained(self.temporary.name)  # type: ignore[operator]
        self.tokenizer.save_pretrained(self.temporary.name)
        return Path(self.temporary.name)

    def __exit__(self, *_: object) -> None:
        self.temporary.cleanup()
