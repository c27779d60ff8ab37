"""What low rank does in chains: before quantization, before distillation, after pruning, and of the quantization error.

Each chain is run on the bundled checkpoint through the library as a user runs it, the reload in a fresh process included. In one
stage, GPTQ rounds the second factor with statistics that were carried through the first one by algebra; with ``fuse: false`` they
are captured again from the factorised model. Bar: carrying them costs no more than 1 % of perplexity; exit status 1 where not.
Every artifact is also exported to a dense checkpoint, which computes the same but for the rounding of products to 16 bits.
Rows that are in the results already are kept, so an interrupted run goes on.

    python benchmarks/low_rank_chains.py
"""

from __future__ import annotations

import argparse
import json
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
CARRIED = ["svd_llm:ratio=0.6 gptq", "svd_llm:ratio=0.8 gptq", "svd_llm:ratio=0.6 gptq:bits=3"]
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
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    checkpoint = Checkpoint.open(MODEL)
    length = window_length(None, checkpoint.config)
    tokenizer, (texts, source) = load_tokenizer(MODEL, checkpoint.config.vocab_size), read_text(None, bundled="held_out")
    tokens = windows(tokenizer, texts, source, n=options.windows, length=length, seed=0, at_most=True).tokens
    calibration = Calibration(samples=options.samples, length=length)
    runs = [(chain, fuse) for chain in CARRIED for fuse in (True, False)] + [(chain, True) for chain in CHAINS]
    protocol = (
        f"Bundled checkpoint; {len(tokens)} held-out and {options.samples} calibration windows of {length} tokens of "
        "bundled text, float32, seed 0."
    )
    rows: list[dict[str, Any]] = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    done = {(row["chain"], row["statistics"]) for row in rows}
    with tempfile.TemporaryDirectory() as scratch:
        stored = base_logprobs(load_model(MODEL, torch.float32, "cpu"), tokens, Path(scratch) / "base.npy")
        for number, (chain, fuse) in enumerate(runs):
            if (chain, WAYS[fuse]) in done:
                continue
            out = Path(scratch) / str(number)
            result = Pipeline(chain.split(), calibration=calibration, evaluate=False, fuse=fuse).run(MODEL, out)
            fidelity = compare(load_model(out, torch.float32, "cpu"), tokens, stored)
            dense = export_to("dense", out, Path(scratch) / f"{number}-dense")
            exported = compare(load_model(dense, torch.float32, "cpu"), tokens, stored)
            rows.append({
                "chain": chain, "statistics": WAYS[fuse], "bits": true_bits(result),
                "bytes": result.bytes, "perplexity": round(fidelity.perplexity, 4), "kl": round(fidelity.kl_mean, 5),
                "dense_export_perplexity": round(exported.perplexity, 4),
            })  # fmt: skip
            print(json.dumps(rows[-1]), flush=True)
            RESULTS.write_text(json.dumps({"protocol": protocol, "carrying_costs": costs(rows), "rows": rows}, indent=1) + "\n")
    print(json.dumps(costs(rows)))
    return int(max(costs(rows).values()) > LARGEST_LOSS)


def costs(rows: list[dict[str, Any]]) -> dict[str, float]:
    """By how much of the perplexity carried statistics are worse than captured ones, for the chains that have been run with
    both."""
    found = {(row["chain"], row["statistics"]): row["perplexity"] for row in rows}
    pairs = {chain: [found.get((chain, way)) for way in (WAYS[True], WAYS[False])] for chain in CARRIED}
    return {chain: round(ours / theirs - 1, 5) for chain, (ours, theirs) in pairs.items() if ours and theirs}


if __name__ == "__main__":
    sys.exit(main())
