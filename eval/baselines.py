"""Base models are measured once: every recipe on a model compares with the same numbers, the slowest of all."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from compress.eval.files import write_whole
from compress.eval.metrics import Metrics, versions

logger = logging.getLogger(__name__)


def baseline_directory() -> Path:
    """Where baselines are kept: ``$COMPRESS_CACHE/baselines``, or ``compress/baselines`` in the user's cache."""
    own = os.environ.get("COMPRESS_CACHE")
    shared = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return (Path(own) if own else Path(shared) / "compress") / "baselines"


def baseline_key(digest: str, settings: Mapping[str, Any], include: Iterable[str | Path] = ()) -> str:
    """A name for a base model's numbers that changes with anything they depend on.

    digest: of the model's weights. settings: everything that the caller measures by, as JSON values. include: files and
    directories of local tasks; an entry's files count by name, size and time of change. Versions of packages count too.
    """
    files = []
    for entry in map(Path, include):
        directory = entry if entry.is_dir() else entry.parent
        for file in sorted(path for path in directory.rglob("*") if path.is_file()):
            status = file.stat()
            files.append([str(file.relative_to(directory)), status.st_size, status.st_mtime_ns])
    content = {"digest": digest, "settings": settings, "files": files, "versions": versions()}
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:32]


def cached_baseline(key: str, measure: Callable[[], Metrics], *, fresh: bool = False) -> Metrics:
    """The stored numbers of that key, or those that ``measure`` returns, stored for the next time.

    fresh: measure whatever is stored. A damaged or outdated entry is measured again. A cache that cannot be written costs a
    warning, not the run.
    """
    path = baseline_directory() / f"{key}.json"
    try:
        if not fresh:
            return Metrics.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        logger.debug("no baseline %s", path)
    except (OSError, ValidationError) as error:
        logger.warning("ignoring the unreadable baseline %s: %s", path, error)
    metrics = measure()
    try:
        write_whole(path, metrics.model_dump_json(indent=2) + "\n")
    except OSError as error:
        logger.warning("the baseline could not be kept: %s", error)
    return metrics
