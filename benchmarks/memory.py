"""How much memory does compressing a model take that is many times larger than that?

A random Llama of about 4 GB in float32 (hidden size 2048, 18 blocks, 19 shards) goes through `wanda gptq` in a process of
its own, reload in a further fresh process included. Every 50 ms the **anonymous** memory (RssAnon of /proc/PID/status) of
that process and of its children is read; what the process had right after its imports is subtracted. Pages of mapped
weight files do not count: the kernel drops them whenever it needs the room. A thread inside the process notes which lines
ran when its memory was at its highest.

Bar: less than 1.2 GB beyond the imports, for the process and for the reloading one alike. The exit status is 1 where it is
missed. Needs Linux, and 15 GB of disk under --directory.

    python benchmarks/memory.py --samples 8
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent
BAR_BYTES = 1.2e9
INTERVAL = 0.05
_READY = "imports done"


def anonymous_bytes(process: int | str) -> int:
    """RssAnon of a process; 0 where it has ended."""
    try:
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except (FileNotFoundError, ProcessLookupError):
        pass
    return 0


def children(process: int) -> list[int]:
    """All processes below one, at any depth."""
    found: list[int] = []
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        try:
            own = [int(word) for word in task.read_text().split()]
        except (FileNotFoundError, ProcessLookupError):
            continue
        for child in own:
            found += [child, *children(child)]
    return found


class Highest(threading.Thread):
    """Notes the lines that the main thread ran when this process's anonymous memory was at its highest."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.main = threading.main_thread().ident
        self.peak, self.lines = 0, []

    def run(self) -> None:
        while True:
            used = anonymous_bytes("self")
            if used > self.peak + (1 << 20):
                self.peak, self.lines = used, self._stack()
            time.sleep(INTERVAL)

    def _stack(self) -> list[str]:
        frame, lines = sys._current_frames().get(self.main), []
        while frame is not None and len(lines) < 6:
            lines.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}")
            frame = frame.f_back
        return lines


def compress_it(options: argparse.Namespace) -> None:
    """The measured process: import everything, say how much that took, run."""
    import torch
    import transformers  # noqa: F401
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401

    from compress import methods
    from compress.pipeline import Pipeline
    from compress.recipe import Calibration

    methods.available()
    torch.set_num_threads(options.threads)
    torch.mm(torch.ones(64, 64), torch.ones(64, 64))
    print(json.dumps({_READY: anonymous_bytes("self")}), flush=True)
    highest = Highest()
    highest.start()
    start = time.monotonic()
    calibration = Calibration(samples=options.samples, length=options.length)
    result = Pipeline(options.passes, calibration=calibration, evaluate=False).run(
        options.directory / "model", options.directory / "out", overwrite=True
    )
    found = {
        "seconds": round(time.monotonic() - start, 1), "bytes": result.bytes, "at": highest.lines,
        "reload": f"{result.verification.how}, difference {result.verification.max_difference:.2g}",
    }  # fmt: skip
    print(json.dumps(found), flush=True)


def watch(command: list[str]) -> dict[str, Any]:
    """Run a command of :func:`compress_it`, sampling its memory; what it prints, and its peaks in bytes."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    printed: dict[str, Any] = {}

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                printed.update(json.loads(line))

    reader = threading.Thread(target=read)
    reader.start()
    own = below = together = n_samples = 0
    while process.poll() is None:
        mine, theirs = anonymous_bytes(process.pid), sum(map(anonymous_bytes, children(process.pid)))
        if _READY in printed:
            own, below, together, n_samples = max(own, mine), max(below, theirs), max(together, mine + theirs), n_samples + 1
        time.sleep(INTERVAL)
    reader.join()
    if process.returncode:
        raise SystemExit(f"the measured run failed with status {process.returncode}")
    imports = printed.pop(_READY)
    return printed | {
        "imports_bytes": imports, "peak_beyond_imports": own - imports, "reload_beyond_imports": max(0, below - imports),
        "peak_with_children_beyond_imports": together - imports, "memory_samples": n_samples,
    }  # fmt: skip


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("passes", nargs="*", default=["wanda", "gptq"])
    parser.add_argument("--samples", type=int, default=8, help="calibration windows")
    parser.add_argument("--length", type=int, default=512, help="tokens per window")
    parser.add_argument("--layers", type=int, default=18)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()) / "compress-bench-memory")
    parser.add_argument("--keep", action="store_true", help="keep the model for the next time")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "memory.json")
    parser.add_argument("--measured", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Make the model, compress it under observation, judge; returns the exit status."""
    options = arguments()
    if options.measured:
        compress_it(options)
        return 0
    if platform.system() != "Linux":
        print("skipped: the anonymous memory of a process is read from /proc, which only Linux has")
        return 0
    from checkpoints import llama_config, write_llama

    options.directory.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(options.directory).free < 15e9:
        print(f"skipped: {options.directory} has less than 15 GB free")
        return 0
    shape = {"hidden": 2048, "layers": options.layers, "intermediate": 5632, "vocabulary": 16384, "tied": False}
    model = write_llama(options.directory / "model", llama_config(**shape))
    found = watch([sys.executable, __file__, "--measured", *sys.argv[1:]])
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    shards = len(list(model.glob("*.safetensors")))
    worst = max(found["peak_beyond_imports"], found["reload_beyond_imports"])
    report = {
        "passes": options.passes, "samples": options.samples, "length": options.length, "model": shape,
        "model_bytes": size, "shards": shards, **found, "bar_bytes": BAR_BYTES, "held": worst < BAR_BYTES,
    }  # fmt: skip
    if not options.keep:
        shutil.rmtree(options.directory)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))
    return 0 if report["held"] else 1


if __name__ == "__main__":
    sys.exit(main())
