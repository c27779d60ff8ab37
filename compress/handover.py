"""What happens to results besides being written: a record for CI, an entry in a tracker, an upload."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from compress.errors import BadInput
from compress.eval.compare import task_cases
from compress.eval.junit import write_junit
from compress.eval.metrics import Metrics, Report
from compress.gates import Checked, gate_cases
from compress.hub import Destination
from compress.manifest import Manifest
from compress.pipeline import Result
from compress.recipe import Evaluation, Recipe
from compress.tracking import Tracker, evaluation_parameters, lineage, numbers, run_parameters


class Handover:
    """junit: a file to write. track: a tracker's name. push_to: a repository on the hub. What cannot work is found at once,
    before any compute; raises :class:`BadInput`."""

    def __init__(self, junit: Path | None = None, track: str | None = None, push_to: str | None = None):
        if junit is not None and junit.is_dir():
            raise BadInput(f"--junit {junit}: is a directory; name a file")
        self.junit = junit
        self.tracker = Tracker(track) if track is not None else None
        self.destination = Destination(push_to) if push_to is not None else None

    def made(self, recipe: Recipe, result: Result) -> Iterator[str]:
        """After a run, also one that missed a gate, which is not uploaded. Yields what was done, in words."""
        base = result.report.base if result.report is not None else None
        self._write(result.path, result.checked, result.metrics, base)
        held = all(each.held for each in result.checked)
        if self.tracker is not None:
            found = numbers(result.metrics, base) if result.metrics is not None else {"cost.bytes_on_disk": float(result.bytes)}
            run = self.tracker.log(
                result.path.name, run_parameters(recipe, result.manifest), found,
                lineage(result.manifest, result.checked, result.path), result.path, held,
            )  # fmt: skip
            yield f"MLflow run {run}"
        if self.destination is not None and held:
            yield f"uploaded to {self.destination.push(result.path)}"

    def measured(
        self, model: Path, evaluation: Evaluation, report: Report, checked: list[Checked], out: Path | None
    ) -> Iterator[str]:
        """After an evaluation. model: the directory that was measured. out: where its report is."""
        metrics = report.points[-1] if report.points else report.base
        base = report.base if report.points else None
        self._write(model, checked, metrics, base)
        if self.tracker is not None:
            parameters = {"model": str(model), "base": report.base.model, **evaluation_parameters(evaluation)}
            tags = lineage(Manifest.read(model), checked, model)
            held = all(each.held for each in checked)
            yield f"MLflow run {self.tracker.log(metrics.label, parameters, numbers(metrics, base), tags, out, held)}"

    def _write(self, name: Path, checked: list[Checked], metrics: Metrics | None, base: Metrics | None) -> None:
        if self.junit is not None:
            cases = [*gate_cases(checked), *(task_cases(metrics, base) if metrics is not None else ())]
            write_junit(self.junit, name.name, cases, {"artifact": name})
