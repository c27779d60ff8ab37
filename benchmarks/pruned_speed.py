"""How much faster a model runs that has lost neurons, heads, hidden channels or blocks: prefill and decode, against dense.

A random Llama is pruned by the real passes, each artifact is opened as a user opens it, and all models take turns in one process
on the same tokens, so that what else the machine does falls on all alike; times are the processor's, for what does not. Time
ratios are medians over the rounds of time pruned / time dense; beside them stands the ratio of their multiply-adds, and
decoding's of their bytes: a step for one sequence reads every weight once and is bound by that. Bar: prefill's time follows the
multiply-adds within 25 %; exit status 1 where not.

    python benchmarks/pruned_speed.py
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.demo import MODEL
from compress.pipeline import Pipeline
from compress.recipe import Calibration

RESULTS = Path(__file__).parent / "results" / "pruned_speed.json"
CHAINS = {
    "neurons, heads 25 %": ["minitron:sparsity=0.25,units=neurons+heads"],
    "neurons, heads 50 %": ["minitron:sparsity=0.5,units=neurons+heads"],
    "hidden 25 %": ["minitron:sparsity=0.25,units=hidden"],
    "blocks 25 %": ["shortgpt:sparsity=0.25"],
    "blocks 50 %": ["shortgpt:sparsity=0.5"],
}
SHAPE: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 12,
    "num_key_value_heads": 4, "max_position_embeddings": 1024, "tie_word_embeddings": True,
}  # fmt: skip
PROMPT, NEW_TOKENS = 512, 24


def make_dense(directory: Path, **changes: int) -> Path:
    """A random checkpoint of that shape, but for ``changes``, with the bundled model's tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    torch.manual_seed(0)
    config = AutoConfig.for_model(**SHAPE | changes, vocab_size=len(tokenizer))
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def multiply_adds(model: nn.Module, length: int) -> float:
    """Of one forward pass over ``length`` tokens: linear layers, and every token's attention to all before it."""
    linear = sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, nn.Linear))
    config: Any = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = config.num_hidden_layers * config.num_attention_heads * head_dim * length  # half of two products
    return float(length * (linear + attention))


@torch.no_grad()
def prefill(model: Any, tokens: Tensor) -> float:
    """Processor seconds for the prompt."""
    start = time.process_time()
    model(input_ids=tokens, use_cache=False, logits_to_keep=1)
    return time.process_time() - start


@torch.no_grad()
def decode(model: Any, tokens: Tensor) -> float:
    """Processor seconds per new token, after a short prompt."""
    cache = model(input_ids=tokens[:, :32], use_cache=True).past_key_values
    start = time.process_time()
    for position in range(32, 32 + NEW_TOKENS):
        cache = model(input_ids=tokens[:, position : position + 1], past_key_values=cache, use_cache=True).past_key_values
    return (time.process_time() - start) / NEW_TOKENS


def main() -> int:
    """Prune, open, take turns, compare."""
    from transformers import AutoModelForCausalLM

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        paths = {"dense": make_dense(Path(scratch) / "dense")}
        for name, chain in CHAINS.items():
            paths[name] = Path(scratch) / name.replace(" ", "-")
            calibration = Calibration(samples=4, length=64)
            Pipeline(chain, calibration=calibration, evaluate=False).run(paths["dense"], paths[name])
        models: dict[str, Any] = {
            name: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, trust_remote_code=True).eval()
            for name, path in paths.items()
        }
        tokens = torch.randint(0, models["dense"].config.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(0))
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
        for number in range(options.rounds + 1):
            for name, model in models.items():
                taken = prefill(model, tokens), decode(model, tokens)
                if number:  # the first round warms up
                    times[name].append(taken)
    rows = []
    for name in CHAINS:
        ratios = [
            statistics.median(mine[kind] / dense[kind] for mine, dense in zip(times[name], times["dense"], strict=True))
            for kind in (0, 1)
        ]
        work = multiply_adds(models[name], PROMPT) / multiply_adds(models["dense"], PROMPT)
        size = sum(p.numel() for p in models[name].parameters()) / sum(p.numel() for p in models["dense"].parameters())
        rows.append({"pruned": name, "prefill": ratios[0], "decode": ratios[1], "multiply_adds": work, "bytes": size})
        print(json.dumps(rows[-1]))
    protocol = f"{SHAPE}, {PROMPT} tokens of prompt, {NEW_TOKENS} decoded, {options.rounds} rounds, {options.threads} threads"
    RESULTS.write_text(json.dumps({"protocol": protocol, "torch": torch.__version__, "rows": rows}, indent=1) + "\n")
    return int(any(abs(row["prefill"] / row["multiply_adds"] - 1) > 0.25 for row in rows))


if __name__ == "__main__":
    sys.exit(main())
