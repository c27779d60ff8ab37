"""The work directory of a run, ``OUT.partial``: what makes it resumable, exclusive, and never half-written."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path
from types import TracebackType

from compress.errors import BadInput
from compress.writer import write_text

_HEADROOM_BYTES = 1 << 24


class Workspace:
    """Claims OUT: refuses an existing one without ``overwrite``, continues an interrupted run of the same identity, and
    finally renames the finished artifact into place."""

    def __init__(self, out: Path, identity: str, overwrite: bool):
        self.out, self.identity, self.overwrite = out, identity, overwrite
        self.directory = out.with_name(out.name + ".partial")
        self._lock: int | None = None

    def __enter__(self) -> Workspace:
        if self.out.exists() and not self.overwrite:
            raise BadInput(f"{self.out} exists already; choose another -o, or pass --overwrite to replace it")
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.directory / "lock", os.O_CREAT | os.O_RDWR)
        except OSError as error:
            raise BadInput(f"{self.out}: cannot be written: {error.strerror}") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BadInput(f"{self.out}: another process is writing it right now") from None
        record = self.directory / "run.json"
        if record.exists() and json.loads(record.read_text())["identity"] != self.identity:
            if not self.overwrite:
                self._release()
                raise BadInput(
                    f"{self.directory} holds an interrupted run with other settings or another model; repeat that command to "
                    "finish it, or pass --overwrite to discard it"
                )
            self.clear()
        write_text(record, json.dumps({"identity": self.identity}))
        return self

    def clear(self) -> None:
        """Drop everything but the lock."""
        for entry in self.directory.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name != "lock":
                entry.unlink()

    def check_space(self, wanted_bytes: int) -> None:
        """Raise :class:`BadInput` where the disk has less room than the run will need."""
        free = shutil.disk_usage(self.directory).free
        if free < wanted_bytes + _HEADROOM_BYTES:
            needed = (wanted_bytes + _HEADROOM_BYTES) / 1e9
            raise BadInput(f"{self.out.parent}: {free / 1e9:.2f} GB are free, this run needs about {needed:.2f} GB")

    def publish(self, artifact: Path, target: Path) -> None:
        """Rename the finished artifact to ``target`` and drop the work directory. What it replaces is dropped only then."""
        if target.exists():
            os.replace(target, self.directory / "replaced")
        os.replace(artifact, target)
        self.discard()

    def discard(self) -> None:
        """Remove the work directory."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        begun = self.directory.exists() and any(entry.is_dir() for entry in self.directory.iterdir())
        if self._lock is not None and isinstance(error, BadInput) and not begun:
            self.discard()
        self._release()
