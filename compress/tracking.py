"""Runs in an MLflow store: parameters, metrics, the small artifacts, and lineage as tags.

Where and under which experiment is MLflow's own business: ``MLFLOW_TRACKING_URI`` and ``MLFLOW_EXPERIMENT_NAME`` say it.
Metrics have the names that they have in ``metrics.json``: ``tasks.arc_easy.acc``, ``fidelity.kl_mean``. Weights are not
uploaded: a tag says where they lie.
"""

from __future__ import annotations

import logging
import math
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from compress.errors import BadInput, CompressError, explain
from compress.eval.metrics import Metrics
from compress.gates import Checked
from compress.manifest import Manifest
from compress.recipe import Evaluation, Recipe

TRACKERS = ("mlflow",)
EXPERIMENT = "compress"
FILES = (
    "metrics.json", "report.html", "chart.svg", "chart.png", "recipe.yaml", "README.md", "compress_manifest.json", "config.json",
)  # fmt: skip
_NOT_CURVES = {"label", "model", "digest", "taxon", "passes", "parent", "protocol", "outcomes", "weights", "layers", "command"}
_NOT_NUMBERS = {"cost": {"estimates"}, "flips": {"__all__": {"examples"}}}
_MOST_AT_ONCE = 100  # parameters that a store takes in one call


class Tracker:
    """Opened before any compute. Raises :class:`BadInput` where the tracker is unknown or absent, or its store cannot be used."""

    def __init__(self, name: str):
        if name not in TRACKERS:
            raise BadInput(f"--track {name}: unknown; there is {', '.join(TRACKERS)}")
        try:
            from mlflow import MlflowClient
            from mlflow.exceptions import MlflowException
        except ImportError:
            raise BadInput("--track mlflow: MLflow is not installed; `pip install 'compress-lm[mlflow]'`") from None
        for noisy in ("mlflow", "alembic"):
            logging.getLogger(noisy).setLevel(logging.WARNING)
        self.failures = (MlflowException, OSError)
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
        try:
            self.client = MlflowClient()
            found = self.client.get_experiment_by_name(experiment)
            self.experiment = found.experiment_id if found else self.client.create_experiment(experiment)
        except self.failures as error:
            raise BadInput(f"--track mlflow: the store cannot be used: {explain(error)}") from None

    def log(self, name: str, parameters: Mapping[str, Any], metrics: Mapping[str, float], tags: Mapping[str, str],
            directory: Path | None, held: bool) -> str:  # fmt: skip
        """Record one run and return its id. directory: where the files lie. held: whether all gates did."""
        from mlflow.entities import Metric, Param, RunTag

        now = int(time.time() * 1000)
        try:
            run = self.client.create_run(self.experiment, run_name=name).info.run_id
            given = [Param(key, str(value)[:500]) for key, value in parameters.items()]
            numbers = [Metric(key, value, now, 0) for key, value in metrics.items()]
            for start in range(0, max(len(given), len(numbers), 1), _MOST_AT_ONCE):
                part = slice(start, start + _MOST_AT_ONCE)
                named = [RunTag(key, value) for key, value in tags.items()] if start == 0 else []
                self.client.log_batch(run, metrics=numbers[part], params=given[part], tags=named)
            for file in FILES:
                if directory is not None and (directory / file).is_file():
                    self.client.log_artifact(run, str(directory / file))
            self.client.set_terminated(run, "FINISHED" if held else "FAILED")
        except self.failures as error:
            raise CompressError(f"everything was made, but MLflow did not take it: {explain(error)}") from None
        return run


def run_parameters(recipe: Recipe, manifest: Manifest) -> dict[str, Any]:
    """What was asked for; a method's options under its name, numbered where it is used again."""
    found = recipe.model_dump(exclude={"passes", "calibration", "evaluation", "output"})
    found["passes"] = " > ".join(step.label() for step in recipe.passes)
    found |= {f"calibration.{key}": value for key, value in recipe.calibration.model_dump().items()}
    if recipe.evaluation is not None:
        found |= evaluation_parameters(recipe.evaluation)
    used: dict[str, int] = {}
    for step in manifest.steps[-len(recipe.passes) :]:
        used[step.method] = used.get(step.method, 0) + 1
        name = step.method if used[step.method] == 1 else f"{step.method}.{used[step.method]}"
        found |= {f"{name}.{key}": value for key, value in step.settings.items()}
    return found


def evaluation_parameters(evaluation: Evaluation) -> dict[str, Any]:
    """How was measured."""
    return {f"evaluation.{key}": value for key, value in evaluation.model_dump(mode="json").items()}


def lineage(manifest: Manifest | None, checked: list[Checked], path: Path) -> dict[str, str]:
    """Where a model comes from, and whether it may go on."""
    tags = {"compress.artifact": str(path.resolve())}
    if manifest is not None:
        tags |= {
            "compress.base": manifest.base,
            "compress.base_digest": manifest.base_digest,
            "compress.parent": manifest.parent or manifest.base,
            "compress.parent_digest": manifest.parent_digest or manifest.base_digest,
            "compress.weights_digest": manifest.weights_digest or "",
            "compress.passes": " > ".join(step.label for step in manifest.steps),
            "compress.taxon": manifest.steps[-1].taxon if manifest.steps else "",
            "compress.tier": manifest.tier,
        } | {f"compress.version.{package}": number for package, number in manifest.versions.items()}  # fmt: skip
    return tags | {f"compress.gate.{each.option.removeprefix('--')}": each.told for each in checked}


def numbers(metrics: Metrics, base: Metrics | None) -> dict[str, float]:
    """Everything measured that is one finite number; the base's scores and bytes under ``base.``"""
    found = dict(_flat("", metrics.model_dump(exclude=_NOT_NUMBERS | dict.fromkeys(_NOT_CURVES, True))))  # type: ignore[arg-type]
    if base is not None:
        kept = {"tasks": {name: score.metrics for name, score in base.tasks.items()}, "bytes_on_disk": base.cost.bytes_on_disk}
        found |= dict(_flat("base", kept))
    return found


def _flat(prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for key, value in values.items():
        inner = key in ("metrics",) and prefix.startswith("tasks")  # a task's scores stand under the task itself
        name = prefix if inner else f"{prefix}.{key}".lstrip(".")
        if isinstance(value, Mapping):
            yield from _flat(name, value)
        elif isinstance(value, (int, float)) and math.isfinite(value):
            yield re.sub(r"[^\w./: -]", "_", name), float(value)
