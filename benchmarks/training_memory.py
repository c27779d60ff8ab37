"""How much more memory does distillation take than plain fine-tuning, where the vocabulary is large?

A random Llama with next to no body and 151,936 tokens is trained on windows of 512 tokens, embedding and head included, one
window a step, in a process of its own for each way of training: the library's own loss (`plain`: what any fine-tuning script
does), the passes `fine_tune` and `logit_kd`, the latter with its teacher in memory and with its predictions on disk. The
highest resident memory since just before the models are made is reported: absolute, and less what the teacher's weights take,
which no loss can do without. The logits of one window are 311 MB in float32.

Bar: `logit_kd` with everything it needs, the teacher's weights included, takes at most 1.3 times what `plain` takes, and at most
1.3 times what `fine_tune` does, which computes the next-token loss piece by piece too. The exit status is 1 where it is missed.

    python benchmarks/training_memory.py --out training_memory.json
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

VOCABULARY, LENGTH, STEPS = 151_936, 512, 3
BAR = 1.3
WAYS = ("plain", "fine_tune", "logit_kd", "logit_kd cached")


def resident(field: str = "VmRSS") -> int:
    """Bytes of this process's memory; VmHWM: at its highest since :func:`forget_highest`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def forget_highest() -> None:
    """From here on VmHWM is measured anew."""
    Path("/proc/self/clear_refs").write_text("5")


def make_model(hidden: int, n_layers: int) -> Any:
    """A random model whose logits are by far the largest thing about it."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=n_layers,
        num_attention_heads=4, max_position_embeddings=LENGTH, tie_word_embeddings=True,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def plain(model: Any, tokens: torch.Tensor) -> None:
    """Fine-tuning as a script would do it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for _ in range(STEPS):
        model(input_ids=tokens[:1], labels=tokens[:1], use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def by_pass(way: str, model: Any, tokens: torch.Tensor, teacher: Any, directory: Path) -> None:
    """The same by the toolkit's loop."""
    from compress.distill.fine_tune import FineTune
    from compress.distill.logit_kd import LogitKD
    from compress.progress import silent
    from compress.train import train
    from compress.weights import Dense

    step = {"fine_tune": FineTune, "logit_kd": LogitKD}[way](steps=STEPS, batch_size=1, trains="everything", hold_out=0)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    weights = {name: Dense(module.weight.data) for name, module in linears.items()}
    train(model, weights, teacher, tokens, step, seed=0, device="cpu", directory=directory, progress=silent)


def measure(way: str, hidden: int, n_layers: int) -> dict[str, int]:
    """In a fresh process: the peak in bytes beyond what was there before the models, and the teacher's weights."""
    from compress.progress import silent
    from compress.teacher import CachedTeacher, keep_predictions

    torch.set_num_threads(2)
    tokens = torch.randint(0, VOCABULARY, (4, LENGTH), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as work:
        file = Path(work) / "teacher.safetensors"
        if way.endswith("cached"):
            keep_predictions(make_model(hidden, n_layers), tokens, 64, file, silent)
        by_pass("fine_tune", make_model(4, 1), tokens[:1, :8], None, Path(work) / "first")  # late imports
        forget_highest()
        before = resident()
        model = make_model(hidden, n_layers)
        teacher: Any = CachedTeacher(file) if way.endswith("cached") else copy.deepcopy(model) if way == "logit_kd" else None
        size = sum(value.nbytes for value in teacher.parameters()) if way == "logit_kd" else 0
        if way == "plain":
            plain(model, tokens)
        else:
            by_pass(way.split()[0], model, tokens, teacher, Path(work) / "training")
        return {"peak": resident("VmHWM") - before, "teacher": size}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--way", choices=WAYS)
    parser.add_argument("--hidden", type=int, default=16)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(measure(options.way, options.hidden, options.layers)))
        return 0
    found = {}
    for way in WAYS:
        command = [sys.executable, __file__, "--way", way, "--hidden", str(options.hidden), "--layers", str(options.layers)]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found[way] = json.loads(output.splitlines()[-1])
        own = found[way]["peak"] - found[way]["teacher"]
        listed = ", ".join(f"{own / found[other]['peak']:.2f} x {other}" for other in ("plain", "fine_tune") if other in found)
        print(f"{way:16} {found[way]['peak'] / 1e6:7.0f} MB, {own / 1e6:7.0f} MB without the teacher's weights: {listed}")
    ratios = {f"ratio_to_{way}": found["logit_kd"]["peak"] / found[way]["peak"] for way in ("plain", "fine_tune")}
    result = {
        "vocabulary": VOCABULARY, "length": LENGTH, "hidden": options.hidden, "layers": options.layers, "bytes": found,
        **ratios, "bar": BAR, "torch": torch.__version__, "python": platform.python_version(),
    }  # fmt: skip
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    listed = ", ".join(f"{ratio:.2f} ({name})" for name, ratio in ratios.items())
    print(f"distillation with everything: {listed}; the bar is {BAR}")
    return max(ratios.values()) > BAR


if __name__ == "__main__":
    sys.exit(main())
