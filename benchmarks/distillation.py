"""Which loss gives back most of what pruning took: every distillation method on the same tokens, against plain fine-tuning.

The bundled checkpoint is compressed once, and each method trains what is left of it on as many tokens of the same text (those
that models write take the places of the text's). Measured are bits per byte and the divergence from the original on held-out
text. The learning rate is chosen for every family of methods by one of its members, with a seed that is not among those of the
table: the best held-out bits per byte of RATES. Runs that are in the results file already are not run again.

    python benchmarks/distillation.py                       # hours
    python benchmarks/distillation.py --steps 30 --length 64 --results benchmarks/results/distillation_short.json
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress import methods
from compress.calibration import load_tokenizer, read_text, window_length, windows
from compress.checkpoint import Checkpoint
from compress.demo import MODEL
from compress.eval.fidelity import base_logprobs, compare
from compress.judge import load_model
from compress.pipeline import Pipeline
from compress.recipe import Calibration
from compress.skeleton import Skeleton
from compress.train import train
from compress.train_pass import TrainPass

RESULTS = Path(__file__).parent / "results" / "distillation.json"
FAMILIES = {
    "fine_tune": ["fine_tune"],
    "logit_kd": [
        "logit_kd", "logit_kd:divergence=reverse_kl", "logit_kd:divergence=jsd", "logit_kd:divergence=skew_kl",
        "logit_kd:divergence=skew_reverse_kl", "logit_kd:divergence=adaptive_kl", "logit_kd:temperature=2",
        "logit_kd:cross_entropy=0.5", "bd_kd", "tsld", "feature_kd", "ted",
    ],
    "gkd": ["gkd", "distillm", "minillm"],
}  # fmt: skip
"""Methods by the one that their learning rate is chosen with."""
RATES = (3e-4, 1e-3, 3e-3)
TUNING_SEED = 100


class Subject:
    """The compressed checkpoint, as often as it is asked for, and what it is judged by."""

    def __init__(self, chain: str, options: argparse.Namespace, scratch: Path):
        self.options, self.scratch, self.artifact = options, scratch, scratch / "artifact"
        tokenizer = load_tokenizer(MODEL, Checkpoint.open(MODEL).config.vocab_size)
        full = window_length(None, Checkpoint.open(MODEL).config)
        Pipeline(chain.split(), calibration=Calibration(samples=64, length=full), evaluate=False).run(MODEL, self.artifact)
        texts, source = read_text(None, bundled="held_out")
        self.held_out = windows(tokenizer, texts, source, n=options.windows, length=full, seed=0, at_most=True).tokens
        self.n_bytes = sum(len(tokenizer.decode(window[1:]).encode()) for window in self.held_out.tolist())
        self.stored = base_logprobs(load_model(MODEL, torch.float32, "cpu"), self.held_out, scratch / "base.npy")
        texts, source = read_text(None, bundled="train")
        wanted = options.steps * options.batch_size
        self.text = lambda seed: (
            windows(tokenizer, texts, source, n=wanted, length=options.length, seed=seed, at_most=True).tokens
        )

    def judged(self, model: torch.nn.Module) -> dict[str, float]:
        """Bits per byte and divergence on held-out text."""
        found = compare(model, self.held_out, self.stored, n_bytes=self.n_bytes)
        assert found.bits_per_byte is not None and found.base_bits_per_byte is not None
        return {"bits_per_byte": found.bits_per_byte, "base": found.base_bits_per_byte, "kl": found.kl_mean}

    def trained(self, method: str, rate: float, seed: int) -> dict[str, float]:
        """The same after training."""
        options, built = self.options, methods.parse(method)
        assert isinstance(built, TrainPass)
        settings = {"steps": options.steps, "batch_size": options.batch_size, "learning_rate": rate, "hold_out": 0.0}
        step = built.model_copy(update=settings)
        student, teacher = (Skeleton(Checkpoint.open(path), "cpu") for path in (self.artifact, MODEL))
        before = student.materialise()
        teacher.materialise()
        tokens: Tensor = self.text(seed)
        with tempfile.TemporaryDirectory(dir=self.scratch) as directory:
            train(
                student.model, before, teacher.model if step.needs.teacher else None, tokens, step,  # type: ignore[arg-type]
                seed=seed, device="cpu", directory=Path(directory), progress=lambda *_: None, save_every=10**9,
            )  # fmt: skip
        return self.judged(student.model)


def markdown(content: dict[str, Any]) -> str:
    """The table: mean and spread over the seeds, and the share of the lost bits per byte that came back."""
    before, rows = content["before"], content["rows"]
    lost = before["bits_per_byte"] - before["base"]
    lines = ["| method | learning rate | bits per byte | given back | KL, nats per token | seeds |", "|---|---|---|---|---|---|"]
    lines.append(f"| none | - | {before['bits_per_byte']:.4f} | 0 % | {before['kl']:.4f} | - |")
    table: list[tuple[float, str]] = []
    for method in dict.fromkeys(row["method"] for row in rows if row["seed"] != TUNING_SEED):
        own = [row for row in rows if row["method"] == method and row["seed"] != TUNING_SEED]
        bits, kl = ([row[key] for row in own] for key in ("bits_per_byte", "kl"))
        spread = [f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else "" for values in (bits, kl)]
        mean = statistics.mean(bits)
        back = (before["bits_per_byte"] - mean) / lost
        line = f"| `{method}` | {own[0]['rate']:g} | {mean:.4f}{spread[0]} | {back:.0%} | {statistics.mean(kl):.4f}{spread[1]} |"
        table.append((mean, f"{line} {len(own)} |"))
    return "\n".join([*lines, *(line for _, line in sorted(table)), "", content["protocol"]])


def main() -> int:
    """Run what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chain", default="wanda:sparsity=0.7", help="how the checkpoint is compressed")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=128, help="tokens per sequence")
    parser.add_argument("--windows", type=int, default=32, help="held-out windows")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", help="comma-separated methods")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    protocol = (
        f"Bundled checkpoint after `{options.chain}`, {options.steps} steps of {options.batch_size} x {options.length} tokens of "
        f"bundled text, other defaults; {options.windows} held-out windows; float32; mean and standard deviation over "
        "seeds (order and choice of the text, and what is drawn); learning rate chosen on another seed."
    )
    content: dict[str, Any] = json.loads(options.results.read_text()) if options.results.exists() else {}
    if content.get("protocol") != protocol:
        content = {"protocol": protocol, "rows": []}
    done = {(row["method"], row["rate"], row["seed"]): row for row in content["rows"]}
    with tempfile.TemporaryDirectory() as scratch:
        subject = Subject(options.chain, options, Path(scratch))
        content["before"] = subject.judged(load_model(subject.artifact, torch.float32, "cpu"))

        def run(method: str, rate: float, seed: int) -> float:
            if (method, rate, seed) not in done:
                done[method, rate, seed] = {"method": method, "rate": rate, "seed": seed, **subject.trained(method, rate, seed)}
                print(done[method, rate, seed], file=sys.stderr, flush=True)
                content["rows"] = list(done.values())
                options.results.write_text(json.dumps(content, indent=1) + "\n")
                options.results.with_suffix(".md").write_text(markdown(content) + "\n")
            value = done[method, rate, seed]["bits_per_byte"]
            return value if math.isfinite(value) else math.inf

        wanted = options.only.split(",") if options.only else [one for family in FAMILIES.values() for one in family]
        rates = {
            member: min(RATES, key=lambda rate, chooser=chooser: run(chooser, rate, TUNING_SEED))
            for chooser, members in FAMILIES.items() for member in members if member in wanted
        }  # fmt: skip
        for seed in range(options.seeds):
            for method in wanted:
                run(method, rates[method], seed)
    print(markdown(content))
    return 0


if __name__ == "__main__":
    sys.exit(main())
