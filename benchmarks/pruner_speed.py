"""How long pruning passes take beside what they cannot do without: two forwards of every block, or GPTQ's solve.

One random Llama, one set of calibration windows, one process; the jobs take turns, and the ratios are medians over the rounds of
processor time. A job is one stage from the checkpoint on disk to finished blocks on disk, without the check of the source and
without the reload. The floor is a stage's bare minimum: every block read and run twice on the same windows. Bars: magnitude and
Wanda in at most 1.2 times the floor, SparseGPT in at most 1.3 times our GPTQ's time on plain grids (`mse=false,
full_range=false`, which leave it nothing but the solve); exit status 1 where one is missed.

    python benchmarks/pruner_speed.py
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from pruned_speed import SHAPE, make_dense

from compress import methods
from compress.calibration import Windows
from compress.checkpoint import Checkpoint
from compress.progress import silent
from compress.skeleton import Skeleton
from compress.stages import run_stage
from compress.writer import BlockStore

RESULTS = Path(__file__).parent / "results" / "pruner_speed.json"
GPTQ = "gptq:mse=false,full_range=false"
JOBS = ("magnitude", "wanda", "sparsegpt", "sparsegpt:pattern=2:4", GPTQ)
N_BLOCKS = 2
BARS = {"magnitude": ("floor", 1.2), "wanda": ("floor", 1.2), "sparsegpt": (GPTQ, 1.3), "sparsegpt:pattern=2:4": (GPTQ, 1.3)}


@torch.no_grad()
def floor(checkpoint: Checkpoint, tokens: torch.Tensor) -> None:
    """Read every block and run it twice on all windows."""
    skeleton = Skeleton(checkpoint)
    batches = list(tokens.split(8))
    hidden = list(skeleton.embed(batches))
    for index in range(len(skeleton.blocks)):
        skeleton.load_block(index, skeleton.read_weights(index))
        for rows in hidden:
            skeleton.run_block(index, rows)
        hidden = [skeleton.run_block(index, rows) for rows in hidden]
        skeleton.free_block(index)


def stage(label: str, checkpoint: Checkpoint, chosen: Windows, scratch: Path) -> None:
    """Run one pass as a stage of its own."""
    shutil.rmtree(scratch, ignore_errors=True)
    run_stage(
        checkpoint, checkpoint, [methods.parse(label)], chosen, None, BlockStore(scratch / "blocks"), scratch,
        seed=0, device="cpu", dtype=torch.float32, progress=silent,
    )  # fmt: skip


def main() -> int:
    """Take turns, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=32, help="calibration windows of 512 tokens")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(options.threads)
    times: dict[str, list[float]] = {name: [] for name in ("floor", *JOBS)}
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = Checkpoint(make_dense(Path(scratch) / "dense", num_hidden_layers=N_BLOCKS))
        vocabulary = checkpoint.config.vocab_size
        tokens = torch.randint(0, vocabulary, (options.samples, 512), generator=torch.Generator().manual_seed(0))
        chosen = Windows(tokens, "random tokens", "")
        for number in range(options.rounds + 1):
            for name, taken in times.items():
                start = time.process_time()
                if name == "floor":
                    floor(checkpoint, tokens)
                else:
                    stage(name, checkpoint, chosen, Path(scratch) / "stage")
                if number:  # the first round warms up
                    taken.append(time.process_time() - start)
    seconds = {name: statistics.median(taken) for name, taken in times.items()}
    ratios = {
        name: (against, statistics.median(a / b for a, b in zip(times[name], times[against], strict=True)), bar)
        for name, (against, bar) in BARS.items()
    }
    for name, value in seconds.items():
        print(f"{name}: {value:.2f} s")
    for name, (against, ratio, bar) in ratios.items():
        print(f"{name}: {ratio:.3f} of {against}, bar {bar}")
    shape = SHAPE | {"num_hidden_layers": N_BLOCKS}
    protocol = f"{shape}, float32, {options.samples} x 512 tokens, {options.rounds} rounds, {options.threads} threads"
    found = {"protocol": protocol, "torch": torch.__version__, "processor_seconds": seconds, "ratios": ratios}
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    return int(any(ratio > bar for _, ratio, bar in ratios.values()))


if __name__ == "__main__":
    sys.exit(main())
