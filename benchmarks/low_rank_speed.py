"""How much faster a factorised model runs, where its multiply-adds say so: prefill and decode, against dense.

A random Llama is factorised at several ratios, each artifact is opened as a user opens it, and all models take turns in one
process on the same tokens, as in ``pruned_speed.py``, whose functions these are. Time ratios are medians over the rounds of
processor time dense / factorised: above 1 is faster. Beside them stands the same ratio of multiply-adds, for prefill, and of the
bytes of the weights, for decoding: a step for one sequence reads each once. The chain of tensors of CompactifAI is there to show
that it is multiplied out: it computes as the dense model does. Bar: where the multiply-adds fall by more than a quarter, prefill
and decode are faster than dense; exit status 1 where not.

    python benchmarks/low_rank_speed.py
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from pruned_speed import NEW_TOKENS, SHAPE, decode, make_dense, multiply_adds, prefill

from compress.pipeline import Pipeline
from compress.recipe import Calibration

RESULTS = Path(__file__).parent / "results" / "low_rank_speed.json"
WIDER = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4, "num_attention_heads": 16}
PROMPT = 256
CHAINS = {f"{key} {ratio:.0%}": f"{key}:ratio={ratio}" for key, ratio in
          [("svd", 0.75), ("svd", 0.5), ("svd", 0.25), ("compactifai", 0.5)]}  # fmt: skip


def main() -> int:
    """Factorise, open, take turns, compare."""
    from transformers import AutoModelForCausalLM

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        paths = {"dense": make_dense(Path(scratch) / "dense", **WIDER)}
        for name, step in CHAINS.items():
            paths[name] = Path(scratch) / name.replace(" ", "-").replace("%", "")
            Pipeline([step], calibration=Calibration(samples=4, length=64), evaluate=False).run(paths["dense"], paths[name])
        models: dict[str, Any] = {
            name: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, trust_remote_code=True).eval()
            for name, path in paths.items()
        }
    tokens = torch.randint(0, models["dense"].config.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    before = os.getloadavg()[0]
    for number in range(options.rounds + 1):
        for name, model in models.items():
            taken = prefill(model, tokens), decode(model, tokens)
            if number:  # the first round warms up
                times[name].append(taken)
    rows, work = [], {name: multiply_adds(model, PROMPT) for name, model in models.items()}
    size = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    for name in CHAINS:
        faster = [
            statistics.median(dense[kind] / mine[kind] for mine, dense in zip(times[name], times["dense"], strict=True))
            for kind in (0, 1)
        ]
        opened = name.startswith("compactifai")  # computes as dense, whatever its parameters are
        fewer = 1.0 if opened else work["dense"] / work[name]
        rows.append({"chain": CHAINS[name], "prefill": faster[0], "decode": faster[1], "multiply_adds": fewer,
                     "bytes": size["dense"] / size[name]})  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
    protocol = (
        f"{SHAPE | WIDER}, {PROMPT} tokens of prompt, {NEW_TOKENS} decoded, {options.rounds} rounds, {options.threads} threads, "
        f"load of the machine {before:.1f} before and {os.getloadavg()[0]:.1f} after on {os.cpu_count()} cores"
    )
    RESULTS.write_text(json.dumps({"protocol": protocol, "torch": torch.__version__, "rows": rows}, indent=1) + "\n")
    return int(any(min(row["prefill"], row["decode"]) <= 1 for row in rows if row["multiply_adds"] > 4 / 3))


if __name__ == "__main__":
    sys.exit(main())
