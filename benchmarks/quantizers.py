"""Every quantizer at its defaults on the bundled checkpoint: true bits, tier, what loads it, time, and what it cost.

Each chain is run through the library as a user runs it, the reload in a fresh process included; the time is that of the
passes alone, of the processor. True bits are those of the compressed layers' tensors in the file, scales, indices and shapes
counted. A method that needs another one beside it (a correction, a rotation before rounding) is shown with it, and what it is to
be compared with stands in the table too. `--write README.md` puts the table between the marks that are there for it.

    python benchmarks/quantizers.py --write README.md
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from compress import methods
from compress.calibration import load_tokenizer, read_text, window_length, windows
from compress.checkpoint import Checkpoint
from compress.demo import MODEL
from compress.errors import CompressError
from compress.eval.fidelity import base_logprobs, compare
from compress.judge import load_model
from compress.pipeline import Pipeline, Result
from compress.recipe import Calibration

RESULTS = Path(__file__).parent / "results" / "quantizers.json"
MARKS = ("<!-- quantizers -->", "<!-- /quantizers -->")
COMPANIONS = {
    "e2e_qp": ["block_ap:bits=2,group_size=64", "e2e_qp"],
    "embeddings": ["embeddings:bits=8"],
    "kv_cache": ["kv_cache"],
    "lorc": ["gptq:bits=3", "lorc"],
    "quarot": ["quarot", "gptq:bits=3"],
    "smoothquant": ["smoothquant", "rtn:bits=8,group_size=-1,activations=int8"],
}
BASELINES = [
    ["gptq:bits=3"], ["rtn:bits=3"], ["gptq:bits=3,group_size=64"], ["gptq:bits=2,group_size=64"], ["rtn:bits=2,group_size=64"],
    ["rtn:bits=8,group_size=-1,activations=int8"],
]  # fmt: skip
TRAINED = [
    ["autoround:bits=2,group_size=64"], ["block_ap:bits=2,group_size=64"], ["omniquant:bits=2,group_size=64"], ["awq:bits=3"],
    ["quip:bits=2"],
]  # fmt: skip
LOADS = {
    "native": "any transformers",
    "native-quantized": "transformers + compressed-tensors, vLLM",
    "shim": "`trust_remote_code=True` or `import compress`",
}


Chains = Callable[[list[str] | None], list[list[str]]]
Draw = Callable[[list[dict[str, Any]], str], str]


def chains(only: list[str] | None) -> list[list[str]]:
    """What is run: every quantizer at its defaults, and what it is compared with."""
    keys = [key for key, method in methods.available().items() if method.__module__.startswith("compress.quant.")]
    found = (
        [COMPANIONS.get(key, [key]) for key in keys] + BASELINES + [chain for chain in TRAINED if chain[0].split(":")[0] in keys]
    )
    return [chain for chain in found if not only or any(part in " ".join(chain) for part in only)]


class Clock:
    """A progress callable that notes when the passes are done: when the reload begins. Processor time, so that other work on
    the machine does not count."""

    def __init__(self) -> None:
        self.start, self.seconds = time.process_time(), 0.0

    def __call__(self, done: int, total: int, message: str) -> None:
        if message.startswith("checking the source"):
            self.start = time.process_time()
        if message.startswith("reloading"):
            self.seconds = time.process_time() - self.start


def true_bits(result: Result) -> float | None:
    """Bits per weight of the layers and tables that were compressed, all of their tensors counted; None: there are none."""
    everything = [*result.manifest.modules.values(), *result.manifest.tables.values()]
    records = [record for record in everything if record.passes and record.nbytes < record.dense_nbytes]
    n_weights = sum(record.shape[0] * record.shape[1] for record in records)
    return round(8 * sum(record.nbytes for record in records) / n_weights, 3) if records else None


def measure(chain: list[str], calibration: Calibration, tokens: torch.Tensor, stored: Path, out: Path) -> dict[str, Any]:
    """One row."""
    clock = Clock()
    result = Pipeline(chain, calibration=calibration, evaluate=False, dtype="float32").run(
        MODEL, out, overwrite=True, progress=clock
    )
    fidelity = compare(load_model(out, torch.float32, "cpu"), tokens, stored)
    millions = Checkpoint.open(MODEL).nbytes / 2e6  # of a 16-bit file
    config = json.loads((out / "config.json").read_text())
    library = config.get("quantization_config", {}).get("quant_method")
    loads = "transformers + bitsandbytes" if library == "bitsandbytes" else LOADS[result.manifest.tier]
    return {
        "chain": " ".join(chain), "bits": true_bits(result), "bytes": result.bytes, "tier": result.manifest.tier,
        "parameters": result.manifest.parameters, "ideal_bytes": round(result.manifest.ideal_nbytes),
        "loads": loads, "seconds_per_million": round(clock.seconds / millions, 2), "perplexity": round(fidelity.perplexity, 4),
        "kl": round(fidelity.kl_mean, 5), "difference": result.verification.max_difference,
    }  # fmt: skip


def markdown(rows: list[dict[str, Any]], protocol: str) -> str:
    """The table of the README."""
    lines = [
        "| passes | true bits per weight | file, MB | tier | loads with | s per M parameters | perplexity |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| `{row['chain']}` | {row['bits'] or '-'} | {row['bytes'] / 1e6:.2f} | {row['tier']} | {row['loads']} | "
            f"{row['seconds_per_million']:.1f} | {row['perplexity']:.2f} |"
        )
    return "\n".join([*lines, "", protocol])


def main() -> int:
    """The quantizers."""
    return tabulate(__doc__, chains, RESULTS, MARKS, markdown)


def tabulate(description: str | None, select: Chains, results: Path, marks: tuple[str, str], draw: Draw) -> int:
    """Run, print, write. select: from parts of chains (None: all) to the chains to run; draw: from rows and a protocol to a
    table in markdown."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=64, help="calibration windows")
    parser.add_argument("--windows", type=int, default=64, help="held-out windows")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", help="comma-separated parts of chains")
    parser.add_argument("--write", type=Path, help="a file with marks, to put the table into")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    checkpoint = Checkpoint.open(MODEL)
    length = window_length(None, checkpoint.config)
    texts, source = read_text(None, bundled="held_out")
    tokenizer = load_tokenizer(MODEL, checkpoint.config.vocab_size)
    chosen = windows(tokenizer, texts, source, n=options.windows, length=length, seed=0, at_most=True)
    known = {row["chain"]: row for row in json.loads(results.read_text())["rows"]} if options.only and results.exists() else {}
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        stored = base_logprobs(load_model(MODEL, torch.float32, "cpu"), chosen.tokens, Path(scratch) / "base.npy")
        base = compare(load_model(MODEL, torch.float32, "cpu"), chosen.tokens, stored).perplexity
        calibration = Calibration(samples=options.samples, length=length)
        for chain in select(options.only.split(",") if options.only else None):
            try:
                rows.append(measure(chain, calibration, chosen.tokens, stored, Path(scratch) / "out"))
                print(rows[-1], file=sys.stderr, flush=True)
            except CompressError as error:
                print(f"{' '.join(chain)}: {error}", file=sys.stderr, flush=True)
    rows = list((known | {row["chain"]: row for row in rows}).values())
    protocol = (
        f"Bundled checkpoint, perplexity {base:.2f} per token before; {len(chosen.tokens)} held-out windows and "
        f"{options.samples} calibration windows of {length} tokens of bundled text, float32, seed 0, "
        f"{options.threads} thread{'s' * (options.threads > 1)} of a CPU."
    )
    results.write_text(json.dumps({"protocol": protocol, "rows": rows}, indent=1) + "\n")
    table = draw(rows, protocol)
    if options.write:
        text = options.write.read_text()
        pattern = re.compile(f"{marks[0]}.*?{marks[1]}", re.DOTALL)
        options.write.write_text(pattern.sub(lambda _: f"{marks[0]}\n{table}\n{marks[1]}", text))
    print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
