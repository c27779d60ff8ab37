"""Runs that are killed on the way, for ``test_resume.py``: a program that forks a process for each run, from one that
has imported everything, and kills it by SIGKILL at a chosen moment.

Argument: a JSON file with the recipe, the model and a list of jobs. Prints a JSON object for each job: was it killed,
what did it tell of its progress, and which files were there afterwards, with their times of change and digests.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from importlib import import_module
from pathlib import Path

import torch

from compress.calibration import load_tokenizer
from compress.checkpoint import Checkpoint
from compress.pipeline import run
from compress.recipe import Recipe
from compress.skeleton import Skeleton


def die_at(moment: dict) -> None:
    """Kill this process at the ``count``-th audit event of that name, one of whose arguments ends with ``path``."""
    left = moment.get("count", 1)

    def hook(event: str, arguments: tuple) -> None:
        nonlocal left
        if event == moment["event"] and any(str(argument).endswith(moment.get("path", "")) for argument in arguments):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def run_once(order: dict, job: dict, log: Path) -> None:
    """The child: run until the job's moment comes."""
    out = Path(job["out"])

    def progress(done: int, total: int, message: str) -> None:
        with log.open("a") as file:
            file.write(json.dumps([done, total, message, out.exists()]) + "\n")
        if job.get("message") and message.startswith(job["message"]) and done >= job.get("done", 0):
            os.kill(os.getpid(), signal.SIGKILL)

    if "event" in job:
        die_at(job)
    recipe = Recipe.parse(order["recipe"])
    run(recipe, model=order["model"], out=out, progress=progress, overwrite=job.get("overwrite", False))


def files_beside(out: Path) -> dict[str, list]:
    """Path -> [time of change, digest] of everything in OUT and its work directory."""
    found = {}
    for file in sorted(out.parent.rglob("*")):
        if file.is_file() and file.name not in ("lock", "log"):
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            found[str(file.relative_to(out.parent))] = [file.stat().st_mtime_ns, digest]
    return found


def warm_up(order: dict) -> None:
    """Import what a run imports late, so that the forked processes need not."""
    checkpoint = Checkpoint.open(order["model"])
    Skeleton(checkpoint)
    load_tokenizer(checkpoint.path, checkpoint.config.vocab_size)
    for module in ("compress.train", "compressed_tensors.compressors.pack_quantized.helpers"):
        import_module(module)


def main(order: dict) -> None:
    """Fork the jobs one after the other. A job that says ``every`` is repeated with a growing count, each time in a
    directory of its own and followed by the job ``then``, until it is no longer killed."""
    for job in order["jobs"]:
        if "every" in job:
            count, killed = 0, True
            while killed:
                count += 1
                directory = Path(job["every"]) / str(count)
                directory.mkdir(parents=True)
                killed = fork(order, {**job, "out": str(directory / "out"), "count": count})
                if killed:
                    fork(order, {**job["then"], "out": str(directory / "out")})
        else:
            fork(order, job)


def fork(order: dict, job: dict) -> bool:
    """Run a job in a child process and report; returns whether the job's own moment killed it."""
    log = Path(job["out"]).parent / "log"
    log.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        try:
            run_once(order, job, log)
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    reached_end = os.WIFEXITED(status)
    result = {
        "job": job,
        "killed": os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL,
        "code": os.WEXITSTATUS(status) if reached_end else None,
        "progress": [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else [],
        "files": files_beside(Path(job["out"])),
    }
    print(json.dumps(result), flush=True)
    return result["killed"] and not [entry for entry in result["progress"] if entry[2].startswith("reloading")]


if __name__ == "__main__":
    torch.set_num_threads(1)  # a forked process must not inherit a pool of threads
    content = json.loads(Path(sys.argv[1]).read_text())
    warm_up(content)
    main(content)
