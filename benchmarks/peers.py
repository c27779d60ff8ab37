"""Other libraries doing what compress does, to be run by their own interpreter: imports nothing of compress.

Arguments: job, model directory, safetensors file with "tokens" (n, length) int64, output directory, threads. Loads the
model in float32 on the CPU, calibrates with those tokens in batches of 8, writes the artifact, and prints one JSON object
as its last line: the seconds from the model on disk to the artifact on disk, without the imports.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

BATCH = 8


def gptqmodel_gptq(model: str, tokens: Path, out: str) -> Callable[[], None]:
    """GPTQ of gptqmodel: 4 bits, groups of 128, its own defaults otherwise."""
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig
    from safetensors.torch import load_file

    def run() -> None:
        rows = load_file(tokens)["tokens"]
        examples = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in rows]
        loaded = GPTQModel.load(model, QuantizeConfig(bits=4, group_size=128), device="cpu", dtype=torch.float32)
        loaded.quantize(examples, batch_size=BATCH)
        loaded.save(out)

    return run


def llmcompressor_gptq(model: str, tokens: Path, out: str) -> Callable[[], None]:
    """GPTQ of llm-compressor: W4A16 with groups of 128, its own defaults otherwise."""
    from llmcompressor.modifiers.quantization import GPTQModifier

    return _oneshot(GPTQModifier(targets="Linear", scheme="W4A16", ignore=["lm_head"]), model, tokens, out)


def llmcompressor_wanda(model: str, tokens: Path, out: str) -> Callable[[], None]:
    """Wanda of llm-compressor at 50 %."""
    from llmcompressor.modifiers.pruning import WandaPruningModifier

    return _oneshot(WandaPruningModifier(sparsity=0.5, ignore=["lm_head"]), model, tokens, out)


def _oneshot(modifier: object, model: str, tokens: Path, out: str) -> Callable[[], None]:
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    def run() -> None:
        rows = load_file(tokens)["tokens"]
        examples = {"input_ids": rows.tolist(), "attention_mask": torch.ones_like(rows).tolist()}
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        oneshot(
            model=loaded, dataset=Dataset.from_dict(examples), recipe=modifier, batch_size=BATCH, pipeline="sequential",
            max_seq_length=rows.shape[1], num_calibration_samples=len(rows), shuffle_calibration_samples=False,
        )  # fmt: skip
        loaded.save_pretrained(out, save_compressed=True)

    return run


JOBS = {
    "gptqmodel-gptq": gptqmodel_gptq,
    "llmcompressor-gptq": llmcompressor_gptq,
    "llmcompressor-wanda": llmcompressor_wanda,
}


def main(job: str, model: str, tokens: str, out: str, threads: str) -> None:
    """Prepare, time, print."""
    import torch

    torch.set_num_threads(int(threads))
    run = JOBS[job](model, Path(tokens), out)
    start = time.monotonic()
    run()
    print(json.dumps({"seconds": round(time.monotonic() - start, 2)}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:6])
