"""What to do to which model: one object, the same as a YAML file, a command line and a Python call.

The hash of a recipe is stable: two runs with the same hash on the same source write the same artifact, and a run that was
interrupted is resumed only by the same recipe.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_serializer,
    field_validator,
)

from compress import methods
from compress.amounts import parse_tokens
from compress.calibration import Begin
from compress.errors import BadInput, explain
from compress.passes import Pass


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def _tokens(value: Any) -> Any:
    return parse_tokens(value) if isinstance(value, str) else value


class Calibration(_Settings):
    """Text whose activations the passes see. data: a .txt, .jsonl or .parquet file or a hub dataset id; None: bundled text."""

    data: str | None = Field(
        default=None, description="local .txt, .jsonl or .parquet file, or a hub dataset id; default: bundled text"
    )
    samples: int = Field(default=128, ge=1, description="number of windows")
    length: int | None = Field(
        default=None, ge=1, description="tokens per window; default: 512, or the model's maximum where smaller"
    )
    column: str = Field(default="text", description="the text's column in a .jsonl, .parquet or hub dataset")
    split: str = Field(default="train", description="split of a hub dataset")
    begin: Begin = Field(
        default="anywhere", description="where windows begin: anywhere in joined documents, or only where documents do"
    )


class Evaluation(_Settings):
    """What is measured before and after. tasks: lm-eval task names; include: directories or files of local YAML tasks."""

    tasks: tuple[str, ...] = Field(default=(), description="names of lm-eval's tasks, groups and tags, or patterns")
    limit: int | None = Field(default=None, ge=1, description="questions per task")
    include: tuple[str, ...] = Field(default=(), description="directories or files of local YAML tasks")
    batch_size: int | Literal["auto"] = Field(
        default=8, description="of the tasks; auto: the largest that fits into the accelerator's memory"
    )
    n_shot: int | None = Field(default=None, ge=0, description="examples in the prompt; default: what each task says")
    task_seed: int | None = Field(default=None, ge=0, description="seed of the tasks; default: lm-eval's own seeds")
    task_data: str | None = Field(default=None, description="directory of data sets for lm-eval's own tasks, offline")
    log_samples: bool = Field(default=False, description="write all that lm-eval logs of each question")
    streamed: bool | None = Field(
        default=None, description="read the model block by block; default: where it does not fit into memory"
    )
    references: tuple[str, ...] = Field(
        default=(), description="metrics.json of dense models of one family, for effective parameters and density"
    )
    training_tokens: Annotated[int | None, BeforeValidator(_tokens)] = Field(
        default=None, ge=1, description="that the base model was trained on, such as 15T; default: unknown"
    )
    windows: int = Field(default=16, ge=1, description="held-out windows for perplexity and divergence")
    length: int | None = Field(default=None, ge=2, description="tokens per held-out window; default: as for calibration")
    data: str | None = Field(default=None, description="held-out text; default: the bundled held-out text")
    begin: Begin = Field(default="anywhere", description="where held-out windows begin: anywhere, or only where documents do")
    seed: int = 0

    @field_validator("batch_size", mode="before")
    @classmethod
    def _batch_size(cls, value: Any) -> Any:
        size = int(value) if isinstance(value, str) and value.isdecimal() else value
        if size != "auto" and not (type(size) is int and size >= 1):
            raise ValueError(f"is a number of at least 1, or auto (got {value!r})")
        return size


class Recipe(_Settings):
    """A model, the passes in order, and how to calibrate and judge.

    dtype: of the forward passes; "auto" is the checkpoint's own where the device computes in it fast, else float32.
    evaluation: None to skip. fuse: consecutive linear passes share one capture of statistics per block. effort: how hard
    methods try where their own options do not say it; what it sets is written out in the passes.
    """

    model: str | None = None
    output: str | None = None
    effort: Literal["fast", "default", "best"] = "default"
    passes: tuple[Pass, ...] = ()
    calibration: Calibration = Calibration()
    evaluation: Evaluation | None = Evaluation()
    seed: int = Field(default=0, ge=0)
    device: str = "cpu"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    fuse: bool = True
    trust_remote_code: bool = False
    allow_pickle: bool = False

    @field_validator("passes", mode="before")
    @classmethod
    def _build_passes(cls, value: Any, info: ValidationInfo) -> tuple[Pass, ...]:
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise ValueError("passes must be a list")
        effort = info.data.get("effort", "default")
        return tuple(methods.with_effort(_as_pass(item), effort) for item in value)

    @field_serializer("passes")
    def _write_passes(self, passes: tuple[Pass, ...]) -> list[Any]:
        return [{step.method(): step.settings()} if step.settings() else step.method() for step in passes]

    @classmethod
    def load(cls, source: str | Path) -> Recipe:
        """Read a YAML file, or a preset by name. Raises :class:`BadInput` for unknown keys, methods or values."""
        file = Path(source)
        if not file.suffix and not file.exists():
            file = preset(str(source))
        try:
            content = yaml.safe_load(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise BadInput(f"{source}: no such recipe file") from None
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise BadInput(f"{source}: cannot be read as YAML: {explain(error)}") from None
        if not isinstance(content, dict):
            raise BadInput(f"{source}: a recipe is a mapping with the keys {', '.join(cls.model_fields)}")
        return cls.parse(content, str(source))

    @classmethod
    def parse(cls, content: dict[str, Any], origin: str = "recipe") -> Recipe:
        """Build from plain data. Raises :class:`BadInput`."""
        for group, part in (("", cls), ("calibration", Calibration), ("evaluation", Evaluation)):
            own = content.get(group) if group else content
            for key in own if isinstance(own, dict) else ():
                if key not in part.model_fields:
                    where, known = f"{origin}: {group}".removesuffix(": "), ", ".join(part.model_fields)
                    raise BadInput(f"{where}: unknown key {key!r}{methods.did_you_mean(key, part.model_fields)}; keys: {known}")
        try:
            return cls(**content)
        except ValidationError as error:
            raise BadInput(f"{origin}: {explain(error)}") from None

    def dump(self) -> str:
        """The recipe as YAML; :meth:`load` reads it back to an equal one."""
        return yaml.safe_dump(self.model_dump(mode="json", exclude_defaults=True), sort_keys=False)

    def fingerprint(self) -> str:
        """SHA-256 of what decides the artifact's bytes: everything but the evaluation and the model's location."""
        content = self.model_dump(mode="json", exclude={"evaluation", "model", "output"})
        content["passes"] = [{step.method(): step.model_dump(mode="json")} for step in self.passes]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _as_pass(item: Any) -> Pass:
    if isinstance(item, Pass):
        return item
    if isinstance(item, str):
        return methods.parse(item)
    if isinstance(item, dict) and len(item) == 1:
        ((key, settings),) = item.items()
        if settings is None or isinstance(settings, dict):
            return methods.build(str(key), settings or {})
    raise BadInput(f"a pass is 'name', 'name:key=value' or {{name: {{key: value}}}}, got {item!r}")


def presets() -> dict[str, Path]:
    """The bundled recipes by name."""
    return {file.stem: file for file in sorted((Path(__file__).parent / "recipes").glob("*.yaml"))}


def preset(name: str) -> Path:
    """The file of a bundled recipe. Raises :class:`BadInput`, with the nearest name, where there is none."""
    known = presets()
    if name not in known:
        raise BadInput(f"no recipe file or preset {name!r}{methods.did_you_mean(name, known)}; presets: {', '.join(known)}")
    return known[name]
