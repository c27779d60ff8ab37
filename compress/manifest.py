"""The artifact's account of itself: lineage, digests, seeds, versions, and what each module has become.

Written by the engine, never by a pass, and free of times and paths, so that a resumed run writes the same bytes as an
undisturbed one.
"""

from __future__ import annotations

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from compress.errors import BadInput, explain

FILE = "compress_manifest.json"


class Step(BaseModel):
    """One pass that was applied. label: as on the command line. stage: passes of one stage shared one stream. training: of a
    pass that trained: steps that are behind the weights, loss of the last step, held_out_loss of the weights and, as
    (steps done, loss) each, held_out, all in nats per token. contents: a digest of the files that the settings name, of an
    adapter for one."""

    method: str
    label: str
    taxon: str
    paper: str
    settings: dict[str, Any]
    stage: int
    training: dict[str, Any] | None = None
    contents: str = ""


class ModuleRecord(BaseModel):
    """What one linear layer has become. Errors are relative to its weight at the start of the stage that last changed it:
    ``weight_error`` = |dW|^2 / |W|^2, ``output_error`` the same in the norm of the calibration inputs (None: not measured).
    ``activations``: how readers round the layer's inputs."""

    kind: str
    shape: tuple[int, int]
    passes: list[str] = []
    bits: int | None = None
    group_size: int | None = None
    activations: str | None = None
    rank: int | None = None
    sparsity: float | None = None
    masked: list[str] = []
    weight_error: float | None = None
    output_error: float | None = None
    nbytes: int
    ideal_nbytes: float
    dense_nbytes: int
    numel: int


class Manifest(BaseModel):
    """See the module's docstring. masked lists below are names of matrices (layers or factors) with removed weights;
    tables: the embedding and the head, where they are on grids."""

    model_config = ConfigDict(extra="ignore")

    format: int = 1
    base: str
    base_digest: str
    parent: str | None = None
    parent_digest: str | None = None
    steps: list[Step] = []
    calibration: dict[str, Any] = {}
    seed: int = 0
    compute_dtype: str = "float32"
    versions: dict[str, str] = {}
    tier: str = "native"
    modules: dict[str, ModuleRecord] = {}
    tables: dict[str, ModuleRecord] = {}
    parameters: int = 0
    dense_parameters: int = 0
    nbytes: int = 0
    ideal_nbytes: float = 0
    weights_digest: str | None = None

    @classmethod
    def read(cls, directory: Path) -> Manifest | None:
        """The manifest of an artifact, or None for a checkpoint that is not one."""
        file = directory / FILE
        if not file.exists():
            return None
        try:
            return cls.model_validate_json(file.read_text())
        except ValueError as error:
            raise BadInput(f"{file}: damaged manifest: {explain(error)}") from None

    def write(self, directory: Path) -> None:
        """Write the manifest into ``directory``."""
        (directory / FILE).write_text(json.dumps(self.model_dump(mode="json", exclude_none=True), indent=1) + "\n")

    def is_masked(self, matrix: str) -> bool:
        """Whether weights of that matrix were removed for good; its zeros are the mask."""
        owner = matrix
        while owner not in self.modules and "." in owner:
            owner = owner.rpartition(".")[0]
        return owner in self.modules and matrix in self.modules[owner].masked


def installed_versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    found = {"python": platform.python_version()}
    for package in (
        "compress-lm",
        "torch",
        "transformers",
        "accelerate",
        "safetensors",
        "compressed-tensors",
        "lm_eval",
    ):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
