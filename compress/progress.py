"""How a run tells where it is: a callable (done, total, message). Silent in Python, bars on stderr on the command line."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from types import TracebackType

Progress = Callable[[int, int, str], None]
RESUMED = "resumed"
"""The message of something that goes on from where an earlier run of it was interrupted."""


def silent(done: int, total: int, message: str) -> None:
    """Report nothing."""


@contextmanager
def no_foreign_bars() -> Iterator[None]:
    """Keep the progress bars that other libraries draw on stderr out of ours. Logging still arrives."""
    with redirect_stderr(io.StringIO()):
        yield


class Bar:
    """A rich progress bar on stderr; falls back to nothing where stderr is no terminal and rich shows none."""

    def __init__(self, title: str = "", enabled: bool = True):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self._bar = RichProgress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
            console=Console(file=sys.stderr), transient=True, disable=not enabled, speed_estimate_period=600,
        )  # fmt: skip
        self._title, self._total, self._done = title, 1, 0

    def __enter__(self) -> Bar:
        self._bar.start()
        self._task = self._bar.add_task(self._title, total=1)
        return self

    def __call__(self, done: int, total: int, message: str) -> None:
        """Show ``done`` of ``total`` and what is happening."""
        label = f"{self._title}  {message}" if self._title else message
        if total != self._total or done < self._done or message == RESUMED:  # something else begins: its speed is not known yet
            self._bar.reset(self._task, completed=done, total=total, description=label)
        else:
            self._bar.update(self._task, completed=done, description=label)
        self._total, self._done = total, done

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()
