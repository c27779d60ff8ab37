"""GPTQ and Wanda against gptqmodel and llm-compressor: time, memory, and error of the layers' outputs.

All run on one random Llama (hidden size 768, 12 blocks, intermediate 2048, vocabulary 32000, tied) with the same N x 512
random tokens, in float32 on the CPU with the same number of threads, one after the other, each in its own process and the
peers in their own virtual environments, which are made on first use (about 2 GB each). Measured: seconds from the model
on disk to the artifact on disk, imports left out (compress's own time includes its check of the source's weights and the
reload of the artifact in a fresh process, which the peers do not do; `seconds_before_reload` leaves the latter out);
the highest resident memory of the process or any child of it; and the mean over all layers of |(W - Q) X|^2 / |W X|^2
with the dense model's X (`reconstruction.py`). The floor is the time of the matrix products that nobody can avoid: two
forwards of the linear layers and one full Hessian per input group.

Aims: GPTQ in at most 0.9 of the faster peer's time with an error no more than 1 % larger and less memory than either; Wanda
in at most 0.6 of llm-compressor's time. Wall times mean something only on an idle machine: the load average is recorded
before each, and the processor seconds of the whole process, imports and all, beside them.

    python benchmarks/gptq_speed.py --samples 128
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from checkpoints import llama_config, write_llama, write_words
from reconstruction import reconstruction_errors
from safetensors.torch import save_file
from torch import Tensor

from compress.calibration import load_tokenizer, windows

ROOT = Path(__file__).resolve().parent
LENGTH, HIDDEN, INTERMEDIATE, LAYERS, VOCABULARY = 512, 768, 2048, 12, 32000
PEERS = {"gptqmodel": "gptqmodel==7.6.0", "llmcompressor": "llmcompressor==0.14.0.1"}
TORCH = "torch==2.13.0"
OURS = {"gptq": "gptq:bits=4,group_size=128,mse=false,full_range=false", "wanda": "wanda:sparsity=0.5"}


def interpreter(peer: str, cache: Path) -> Path:
    """The Python of a peer's virtual environment, made where it is not there yet."""
    directory = cache / PEERS[peer].replace("==", "-")
    python, ready = directory / "bin" / "python", directory / "ready"
    if not ready.exists():
        print(f"installing {PEERS[peer]} into {directory}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(directory)], check=True)
        install = [str(python), "-m", "pip", "install", "-q", TORCH, PEERS[peer]]
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
            constraints.write(TORCH + "\n")
            constraints.flush()
            subprocess.run([*install, "-c", constraints.name], check=True)
        ready.touch()
    return python


def measure(command: list[str], threads: int, log: Path) -> dict[str, Any]:
    """Run a command alone; what its last line says, and its wall time, memory and the load before it."""
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads), "GPTQMODEL_CPU_WORKERS": "2", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    load, start = os.getloadavg()[0], time.monotonic()
    with open(log, "w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
    wall = time.monotonic() - start
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.startswith('{"seconds"')]
    if status or not lines:
        return {"failed": f"status {os.waitstatus_to_exitcode(status)}, see {log.name}"}
    return json.loads(lines[-1]) | {
        "process_seconds": round(wall, 1), "peak_rss_bytes": usage.ru_maxrss * 1024,
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1), "load_before": round(load, 2),
    }  # fmt: skip


def ours(label: str, model: Path, text: Path, samples: int, out: Path, threads: int) -> None:
    """The measured process of compress."""
    from compress.pipeline import Pipeline
    from compress.recipe import Calibration

    torch.set_num_threads(threads)
    start = time.monotonic()
    reached: dict[str, float] = {}

    def progress(done: int, total: int, message: str) -> None:
        reached.setdefault(message, time.monotonic() - start)

    calibration = Calibration(data=str(text), samples=samples, length=LENGTH)
    Pipeline([label], calibration=calibration, evaluate=False).run(model, out, overwrite=True, progress=progress)
    before = reached.get("reloading in a fresh process", 0.0)
    print(json.dumps({"seconds": round(time.monotonic() - start, 2), "seconds_before_reload": round(before, 2)}), flush=True)


def floor_seconds(samples: int) -> float:
    """Two forwards of all linear layers and a Hessian per input group, as plain products of float32 matrices."""
    shapes = [(HIDDEN, HIDDEN)] * 4 + [(INTERMEDIATE, HIDDEN)] * 2 + [(HIDDEN, INTERMEDIATE)]
    rows = {n: torch.randn(4096, n) for n in (HIDDEN, INTERMEDIATE)}
    weights = [torch.randn(shape) for shape in shapes]

    def batch() -> None:
        for _ in range(2):
            for weight in weights:
                rows[weight.shape[1]] @ weight.T
        for n in (HIDDEN, HIDDEN, HIDDEN, INTERMEDIATE):
            rows[n].T @ rows[n]

    batch()
    start = time.monotonic()
    n_batches = max(1, samples * LENGTH // 4096)
    for _ in range(n_batches):
        batch()
    return (time.monotonic() - start) / n_batches * samples * LENGTH / 4096 * LAYERS


def calibration_tokens(model: Path, text: Path, samples: int) -> Tensor:
    """Random words of the vocabulary as a text file, and the windows that compress cuts from it."""
    words = torch.randint(1, VOCABULARY, (samples * LENGTH,), generator=torch.Generator().manual_seed(0))
    text.write_text(" ".join(f"w{number}" for number in words.tolist()))
    tokenizer = load_tokenizer(model, VOCABULARY)
    return windows(tokenizer, [text.read_text()], text.name, n=samples, length=LENGTH, seed=0).tokens


def compare(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """All measurements, by job."""
    config = llama_config(HIDDEN, LAYERS, INTERMEDIATE, VOCABULARY, tied=True)
    model, text, stored = write_llama(scratch / "model", config), scratch / "calibration.txt", scratch / "tokens.safetensors"
    write_words(model, VOCABULARY)
    tokens = calibration_tokens(model, text, options.samples)
    save_file({"tokens": tokens}, stored)
    found: dict[str, Any] = {}
    methods = options.methods.split(",")
    peers = [] if options.ours_only else options.peers.split(",")
    jobs = [("compress", method) for method in methods]
    jobs += [(peer, method) for method in methods for peer in peers if not (peer == "gptqmodel" and method == "wanda")]
    for who, method in jobs:
        name, out, log = f"{who}-{method}", scratch / f"out-{who}-{method}", options.cache / f"{who}-{method}.log"
        shutil.rmtree(out, ignore_errors=True)
        if who == "compress":
            command = [sys.executable, __file__, "--measured", OURS[method], str(model), str(text), str(out)]
            command += ["--samples", str(options.samples), "--threads", str(options.threads)]
        else:
            python = interpreter(who, options.cache)
            command = [str(python), str(ROOT / "peers.py"), name, str(model), str(stored), str(out), str(options.threads)]
        found[name] = measure(command, options.threads, log)
        print(name, json.dumps(found[name]), file=sys.stderr, flush=True)
    done = {name: scratch / f"out-{name}" for name, row in found.items() if "failed" not in row}
    for name, error in reconstruction_errors(model, tokens[: options.error_samples], done).items():
        found[name]["output_error"] = error
    return found


def verdicts(found: dict[str, Any]) -> list[str]:
    """The aims in words."""
    lines = []
    for method, share in (("gptq", 0.9), ("wanda", 0.6)):
        mine = found.get(f"compress-{method}", {})
        peers = [row for name, row in found.items() if name.endswith(f"-{method}") and row is not mine and "seconds" in row]
        if "seconds" not in mine or not peers:
            continue
        for key, limit in (("seconds", share), ("peak_rss_bytes", 1.0), ("output_error", 1.01)):
            ratio = mine[key] / min(row[key] for row in peers)
            missed = "" if ratio <= limit else " MISSED"
            lines.append(f"{method} {key}: {ratio:.3f} of the best peer's, aim at most {limit}{missed}")
    return lines


def machine(threads: int) -> dict[str, Any]:
    """What the figures depend on."""
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return {
        "cores": os.cpu_count(), "threads": threads, "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__, "dtype": "float32",
        "bfloat16": "the CPU multiplies in it" if supported else "no instructions here: bars in bfloat16 do not apply",
    }  # fmt: skip


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=128, help="calibration windows of 512 tokens")
    parser.add_argument("--error-samples", type=int, default=16, help="of these, how many the output error is taken on")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--methods", default="gptq,wanda")
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--ours-only", action="store_true")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "compress-bench-envs", help="environments")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "gptq_speed.json")
    parser.add_argument("--measured", nargs=4, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Measure, judge, write; returns the exit status."""
    options = arguments()
    if options.measured:
        label, model, text, out = options.measured
        ours(label, Path(model), Path(text), options.samples, Path(out), options.threads)
        return 0
    torch.set_num_threads(options.threads)
    options.cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="compress-bench-") as scratch:
        floor = floor_seconds(options.samples)
        report = {
            "machine": machine(options.threads), "samples": options.samples, "length": LENGTH,
            "floor_seconds": round(floor, 1), "runs": compare(options, Path(scratch)),
        }  # fmt: skip
    report["aims"] = verdicts(report["runs"])
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))
    return 1 if any(line.endswith("MISSED") for line in report["aims"]) else 0


if __name__ == "__main__":
    sys.exit(main())
