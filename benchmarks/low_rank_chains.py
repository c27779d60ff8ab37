"""What low rank does in chains: before quantization, before distillation, after pruning, and of the quantization error.

Each chain is run on the bundled checkpoint through the library as a user runs it, the reload in a fresh process included. In one
stage, GPTQ rounds the second factor with statistics that were carried through the first one by algebra; with ``fuse: false`` they
are captured again from the factorised model. SVD-LLM is fitted to the inputs that the compressed blocks leave in both ways, since
with those of the dense model the two would differ in that too. Which way is better is much of it chance, so several draws of
calibration windows are compared. Bar: on their geometric mean, carrying costs no more than 1 % of perplexity; exit status 1
where not.

Every artifact is also exported to a dense checkpoint, which computes the same but for the rounding of products to 16 bits.
Rows that are in the results already are kept, so an interrupted run goes on.

    python benchmarks/low_rank_chains.py
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from quantizers import true_bits

from compress.calibration import load_tokenizer, read_text, window_length, windows
from compress.checkpoint import Checkpoint
from compress.demo import MODEL
from compress.eval.fidelity import base_logprobs, compare
from compress.export import to as export_to
from compress.judge import load_model
from compress.pipeline import Pipeline
from compress.recipe import Calibration

RESULTS = Path(__file__).parent / "results" / "low_rank_chains.json"
LARGEST_LOSS = 0.01
WAYS = {True: "carried", False: "captured again"}
CARRIED = [f"svd_llm:ratio={ratio},inputs=compressed gptq:bits={bits}" for ratio, bits in [(0.6, 4), (0.8, 4), (0.6, 3)]]
"""Run with statistics carried and captured again."""
CHAINS = [
    "svd_llm:ratio=0.6", "svd_llm:ratio=0.6 logit_kd:steps=30,length=64,learning_rate=1e-3",
    "wanda:sparsity=0.5 svd_llm:ratio=0.6", "gptq:bits=3", "gptq:bits=3 lorc", "compactifai:ratio=0.6",
    "compactifai:ratio=0.6 gptq:bits=8,group_size=64",
]  # fmt: skip


def main() -> int:
    """Run the chains, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=32, help="calibration windows")
    parser.add_argument("--windows", type=int, default=32, help="held-out windows")
    parser.add_argument("--length", type=int, help="tokens of a window; default: the model's context")
    parser.add_argument("--seeds", type=int, default=3, help="draws of calibration windows for carried statistics")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    checkpoint = Checkpoint.open(MODEL)
    length = window_length(options.length, checkpoint.config)
    tokenizer, (texts, source) = load_tokenizer(MODEL, checkpoint.config.vocab_size), read_text(None, bundled="held_out")
    tokens = windows(tokenizer, texts, source, n=options.windows, length=length, seed=0, at_most=True).tokens
    calibration = Calibration(samples=options.samples, length=length)
    runs = [(chain, fuse, seed) for chain in CARRIED for seed in range(options.seeds) for fuse in (True, False)]
    runs += [(chain, True, 0) for chain in CHAINS]
    protocol = (
        f"Bundled checkpoint; {len(tokens)} held-out and {options.samples} calibration windows of {length} tokens of "
        "bundled text, float32."
    )
    rows: list[dict[str, Any]] = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    done = {(row["chain"], row["statistics"], row["seed"]) for row in rows}
    with tempfile.TemporaryDirectory() as scratch:
        stored = base_logprobs(load_model(MODEL, torch.float32, "cpu"), tokens, Path(scratch) / "base.npy")
        for number, (chain, fuse, seed) in enumerate(runs):
            if (chain, WAYS[fuse], seed) in done:
                continue
            out = Path(scratch) / str(number)
            result = Pipeline(chain.split(), calibration=calibration, evaluate=False, fuse=fuse, seed=seed).run(MODEL, out)
            fidelity = compare(load_model(out, torch.float32, "cpu"), tokens, stored)
            dense = export_to("dense", out, Path(scratch) / f"{number}-dense")
            exported = compare(load_model(dense, torch.float32, "cpu"), tokens, stored)
            rows.append({
                "chain": chain, "statistics": WAYS[fuse], "seed": seed, "bits": true_bits(result),
                "bytes": result.bytes, "perplexity": round(fidelity.perplexity, 4), "kl": round(fidelity.kl_mean, 5),
                "dense_export_perplexity": round(exported.perplexity, 4),
            })  # fmt: skip
            print(json.dumps(rows[-1]), flush=True)
            RESULTS.write_text(json.dumps({"protocol": protocol, "carrying_costs": costs(rows), "rows": rows}, indent=1) + "\n")
    print(json.dumps(costs(rows)))
    return int(max(cost["mean"] for cost in costs(rows).values()) > LARGEST_LOSS)


def costs(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By how much of the perplexity carried statistics are worse than captured ones, for the chains that have been run with
    both: in every draw, and on their mean."""
    found = {(row["chain"], row["statistics"], row["seed"]): row["perplexity"] for row in rows}
    told: dict[str, dict[str, Any]] = {}
    for chain in CARRIED:
        draws = sorted({seed for name, _, seed in found if name == chain})
        pairs = [[found.get((chain, way, seed)) for way in (WAYS[True], WAYS[False])] for seed in draws]
        logarithms = [math.log(ours / theirs) for ours, theirs in pairs if ours and theirs]
        if logarithms:
            each = [round(math.expm1(value), 5) for value in logarithms]
            told[chain] = {"mean": round(math.expm1(sum(logarithms) / len(logarithms)), 5), "draws": each}
    return told


if __name__ == "__main__":
    sys.exit(main())
