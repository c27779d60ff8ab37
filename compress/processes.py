"""Several processes that were started together (``accelerate launch``): the first carries out a run, the others help to train.

Whatever is not training the first one does as if it were alone: it reads, streams, writes, reloads, measures and prints. The
others wait for its orders; an order is a function that all of them then call at the same time. They need to see the same files.
"""

from __future__ import annotations

import logging
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed
from torch.distributed.rendezvous import rendezvous

from compress.errors import BadInput, CompressError
from compress.progress import Progress, silent
from compress.train_pass import TrainPass

log = logging.getLogger(__name__)
T = TypeVar("T")

_LAUNCHED_BY = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")  # what tells libraries that a process is one of several
_PATIENCE = timedelta(days=365)  # compression takes its time before there is something to train


class _Crew:
    """A process's way to the others: a store for orders; the process group exists only while they train.

    Other libraries that find a process group wait for all of it, also where one process alone uses them.
    """

    def __init__(self, device: str):
        self.is_cuda = device.startswith("cuda")
        self.launched = {name: os.environ[name] for name in _LAUNCHED_BY if name in os.environ}
        self.rank, self.n_processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        if distributed.is_initialized():
            self.store = distributed.distributed_c10d._get_default_store()
        else:
            self.store = next(iter(rendezvous("env://", self.rank, self.n_processes, timeout=_PATIENCE)))[0]
        self.store.set_timeout(_PATIENCE)
        self.n_orders = 0

    def tell(self, *order: Any) -> None:
        """Give an order to the other processes."""
        self.store.set(f"compress/{self.n_orders}", pickle.dumps(order))  # type: ignore[arg-type] (bytes are fine)
        self.n_orders += 1

    def hear(self) -> tuple[Any, ...]:
        """Wait for the next order."""
        order = pickle.loads(self.store.get(f"compress/{self.n_orders}"))
        self.n_orders += 1
        return order

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """All processes in one group, as a launcher's processes are."""
        with environment(self.launched):
            own = not distributed.is_initialized()
            if own:
                distributed.init_process_group(
                    "cpu:gloo,cuda:nccl" if self.is_cuda else "gloo", rank=self.rank, world_size=self.n_processes,
                    store=distributed.PrefixStore(f"compress/group/{self.n_orders}", self.store),
                )  # fmt: skip
            try:
                yield
            finally:
                if own:
                    distributed.destroy_process_group()


_crew: _Crew | None = None  # while a run is going on


def is_helper() -> bool:
    """Whether this process was started beside others and is not the first of them."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and os.environ.get("RANK", "0") != "0"


def asks_for_shares(step: TrainPass) -> bool:
    """Whether the launcher asks for parameters to be split among processes while they train. Raises :class:`BadInput` where a
    pass cannot be trained so."""
    asks = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if asks and step.writes:
        raise BadInput(
            f"{step.label()}: FSDP splits parameters among processes that compute in step, and here each has a model write texts "
            "of its own; launch with `accelerate launch --multi_gpu`, where every process has the whole model"
        )
    return asks


def carry_out(run: Callable[[], T], device: str) -> T:
    """``run()`` on the first of all processes, while the others help it; its result on all of them.

    device: as in a recipe. Where the run fails, the first process raises and the others end without a word.
    """
    global _crew
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or _crew is not None:
        return run()
    if device.startswith("cuda"):
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    _crew = _Crew(device)
    try:
        return _serve(_crew) if is_helper() else _lead(_crew, run)
    finally:
        _crew = None


def together(function: Callable[..., T], *arguments: Any, progress: Progress) -> T:
    """``function(*arguments, progress)`` on all processes of a run, of which the first alone tells of its progress."""
    if _crew is None:
        return function(*arguments, progress)
    _crew.tell(function, *arguments)
    with _crew.gathered():
        return function(*arguments, progress)


def _lead(crew: _Crew, run: Callable[[], T]) -> T:
    try:
        with environment(dict.fromkeys(_LAUNCHED_BY)):
            result = run()
    except BaseException:
        crew.tell(None)
        raise
    crew.tell(None, result)
    return result


def _serve(crew: _Crew) -> Any:
    while True:
        function, *arguments = crew.hear()
        if function is None:
            return arguments[0] if arguments else sys.exit(0)
        try:
            with crew.gathered():
                function(*arguments, silent)
        except CompressError as error:  # found by all processes alike: the first one says it
            log.info("gave up: %s", error)


@contextmanager
def environment(values: dict[str, Any]) -> Iterator[None]:
    """With other environment variables for a while; None: without."""
    before = {name: os.environ.get(name) for name in values}
    try:
        _set(values)
        yield
    finally:
        _set(before)


def _set(values: dict[str, Any]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
