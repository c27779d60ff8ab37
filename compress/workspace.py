"""The work directory of a run, ``OUT.partial``: what makes it resumable, exclusive, and never half-written."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from compress.errors import BadInput
from compress.writer import write_text

_HEADROOM_BYTES = 1 << 24


class Workspace:
    """Claims OUT: refuses an existing one without ``overwrite``, continues an interrupted run of the same identity, and
    finally renames the finished artifact into place."""

    def __init__(self, out: Path, identity: str, overwrite: bool):
        check_output(out, overwrite)
        self.out, self.identity, self.overwrite = out, identity, overwrite
        self.directory = out.resolve().with_name(out.resolve().name + ".partial")
        self._new_parents = [parent for parent in self.directory.parents if not parent.exists()]
        self._lock: int | None = None

    def __enter__(self) -> Workspace:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            if any(self.directory.iterdir()) and not (self.directory / "lock").exists():
                raise BadInput(f"{self.directory}: needed as a work directory, but holds something else; choose another -o")
            self._lock = os.open(self.directory / "lock", os.O_CREAT | os.O_RDWR)
        except OSError as error:
            self._remove_new_parents()
            raise BadInput(f"{self.out}: cannot be written: {error.strerror}") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._release()
            raise BadInput(f"{self.out}: another process is writing it right now") from None
        record = self.directory / "run.json"
        found = json.loads(record.read_text())["identity"] if record.exists() else None
        if found not in (None, self.identity) and not self.overwrite:
            self._release()
            raise BadInput(
                f"{self.directory} holds an interrupted run with other settings or another model; repeat that command to "
                "finish it, or pass --overwrite to discard it"
            )
        if found != self.identity:  # without a record, too: a run that was killed while it cleaned up
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
        target = target.resolve()
        if target.exists():
            shutil.rmtree(self.directory / "replaced", ignore_errors=True)
            os.replace(target, self.directory / "replaced")
        os.replace(artifact, target)
        self.discard()

    def discard(self) -> None:
        """Remove the work directory; the lock, which tells that it is one, goes last."""
        with suppress(OSError):
            self.clear()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _remove_new_parents(self) -> None:
        for parent in self._new_parents:
            with suppress(OSError):  # never made, or another process uses it too
                parent.rmdir()

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        begun = self.directory.exists() and any(entry.is_dir() for entry in self.directory.iterdir())
        if self._lock is not None and isinstance(error, BadInput) and not begun:
            self.discard()
            self._remove_new_parents()
        self._release()


def check_not_source(out: Path, source: Path) -> None:
    """Raise :class:`BadInput` where writing ``out`` would replace ``source`` or a directory that it lies in."""
    if out.resolve() in (source.resolve(), *source.resolve().parents):
        raise BadInput(f"{out}: the output would replace its own source; choose another directory")


def check_output(out: Path, overwrite: bool) -> None:
    """Raise :class:`BadInput` where ``out`` exists, or is not a model that ``overwrite`` may replace."""
    if not out.exists():
        return
    if not overwrite:
        raise BadInput(f"{out} exists already; choose another -o, or pass --overwrite to replace it")
    if not (out / "config.json").is_file() and not (out.is_dir() and not any(out.iterdir())):
        raise BadInput(f"{out} is not a model directory and will not be replaced; choose another -o")
