"""Train the bundled demo checkpoint from scratch: `python -m compress.demo.train --out DIR`.

About an hour on two CPU cores. The schedule is warm-up, constant trunk, linear decay to zero: the trunk does not depend
on the total length, so a run can be shortened or extended from any trunk checkpoint. Two threads each take half of a
batch with single-threaded kernels, which is faster than two threads inside every kernel, survives a busy machine, and
makes the result independent of the number of cores: gradients are summed in a fixed order.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from compress.demo import MODEL, corpus, measure, world
from compress.demo.muon import Muon

END_OF_TEXT = "<|endoftext|>"
VOCABULARY = 2048
MAX_POSITIONS = 1024
TOKENIZER_EMPHASIS = 3000
MICRO_BATCH_TOKENS = 2048
N_WORKERS = 2
CHECKPOINT_EVERY = 50
N_FINAL_QUESTIONS = 400
N_PROBE_QUESTIONS = 50


def parse_arguments() -> argparse.Namespace:
    """Return the command line's arguments; the defaults are those of the bundled checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, default=MODEL, help="directory of the finished model")
    parser.add_argument("--work", type=Path, default=None, help="directory of resumable checkpoints (none if unset)")
    parser.add_argument("--steps", type=int, default=900, help="optimiser steps in all")
    parser.add_argument("--warmup", type=int, default=30, help="steps of linear warm-up")
    parser.add_argument("--decay", type=int, default=350, help="steps of linear decay to zero, at the end")
    parser.add_argument("--batch-tokens", type=int, default=4096, help="tokens in a step")
    parser.add_argument("--context", type=int, default=256, help="tokens in a row before the decay")
    parser.add_argument("--decay-context", type=int, default=1024, help="tokens in a row during the decay")
    parser.add_argument("--fact-share", type=float, default=0.22, help="share of rows that hold biographies")
    parser.add_argument("--people", type=int, default=world.N_PEOPLE, help="people in the world")
    parser.add_argument("--muon-lr", type=float, default=0.025, help="learning rate of the hidden matrices")
    parser.add_argument("--adam-lr", type=float, default=8e-3, help="learning rate of embeddings and norms")
    parser.add_argument("--weight-decay", type=float, default=0.02, help="decoupled weight decay of the matrices")
    parser.add_argument("--clip", type=float, default=1.0, help="largest norm of the whole gradient")
    parser.add_argument("--seed", type=int, default=0, help="seed of initialisation and data order")
    return parser.parse_args()


def train_tokenizer(n_people: int, seed: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of `VOCABULARY` entries, fitted to the training split and the biographies."""
    random = Random(seed)
    lives = [world.biography(person, random) for _ in range(8) for person in world.people(n_people)]
    # Names and values become single tokens: rare words in pieces are spelled before they are known.
    words = [f" {word}" for key, pool in world.POOLS.items() if key != "year" for value in pool for word in value.split()]
    names = [*world.FIRST_NAMES, *(f" {name}" for name in (*world.FIRST_NAMES, *world.LAST_NAMES))]
    lives += TOKENIZER_EMPHASIS * (words + names)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*(body for _, body in corpus.documents("train")), *lives], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=MAX_POSITIONS,
    )


def build_model(end_of_text: int) -> LlamaForCausalLM:
    """Return a freshly initialised Llama of 4.66 M parameters in float32."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
        pad_token_id=end_of_text,
    )
    return LlamaForCausalLM(config)


class Batches:
    """Rows of tokens by step number: random windows of the corpus, and a fixed share of rows of biographies.

    A batch is a function of (seed, step) alone, so a resumed run meets the same data as an uninterrupted one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, arguments: argparse.Namespace) -> None:
        self._tokenizer = tokenizer
        self._arguments = arguments
        bodies = [END_OF_TEXT + body for _, body in corpus.documents("train")]
        encoded = tokenizer(bodies, add_special_tokens=False, verbose=False)["input_ids"]
        self.tokens = np.concatenate([np.asarray(ids, dtype=np.int64) for ids in encoded])
        self.people = world.people(arguments.people)

    def rows(self, step: int, context: int) -> Tensor:
        """Return (batch_tokens / context, context) int64 token ids for a step."""
        choose = np.random.default_rng([self._arguments.seed, step])
        n_rows = self._arguments.batch_tokens // context
        rows = [self._window(choose, context) for _ in range(n_rows)]
        # Deal fact rows evenly over steps instead of by lot: counts differ by at most one from the exact share.
        share = self._arguments.fact_share * n_rows
        n_facts = math.floor((step + 1) * share) - math.floor(step * share)
        for index in range(n_facts):
            rows[index] = self._lives(Random(f"{self._arguments.seed}/{step}/{index}"), context)
        return torch.from_numpy(np.stack(rows))

    def _window(self, choose: np.random.Generator, context: int) -> np.ndarray:
        start = int(choose.integers(len(self.tokens) - context))
        return self.tokens[start : start + context]

    def _lives(self, random: Random, context: int) -> np.ndarray:
        """Return `context` tokens of biographies, told apart by varying marks: recall must not depend on a prefix."""
        pieces: list[str] = []
        # A biography takes over 32 tokens, so this many always fill the row.
        for _ in range(context // 32):
            separator = END_OF_TEXT if random.random() < 0.5 else "\n" if pieces else ""
            person = self.people[int(random.random() * len(self.people))]
            pieces += [separator, world.biography(person, random)]
        ids = self._tokenizer.encode("".join(pieces), add_special_tokens=False)
        return np.asarray(ids[:context], dtype=np.int64)


def learning_rate_factor(step: int, arguments: argparse.Namespace) -> float:
    """Return the factor on the learning rates at `step`: linear warm-up, constant, linear decay to zero."""
    warm = min(1.0, (step + 1) / arguments.warmup)
    return warm * min(1.0, (arguments.steps - step) / arguments.decay)


def loss_and_gradients(model: LlamaForCausalLM, rows: Tensor) -> tuple[float, list[Tensor]]:
    """Return the mean loss of `rows` in nats per token and the gradient of every parameter; `.grad` is not touched."""
    logits = model(input_ids=rows, use_cache=False).logits
    loss = cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
    return loss.item(), list(torch.autograd.grad(loss, list(model.parameters())))


def accumulate(model: LlamaForCausalLM, rows: Tensor, executor: ThreadPoolExecutor) -> float:
    """Set `.grad` to the mean gradient over micro-batches of `rows`, computed by the executor; return the loss."""
    micro_batches = rows.split(max(1, MICRO_BATCH_TOKENS // rows.shape[1]))
    results = list(executor.map(lambda micro: loss_and_gradients(model, micro), micro_batches))
    for index, parameter in enumerate(model.parameters()):
        parameter.grad = torch.stack([gradients[index] for _, gradients in results]).mean(0)
    return sum(loss for loss, _ in results) / len(results)


def optimisers(
    model: LlamaForCausalLM, arguments: argparse.Namespace, executor: ThreadPoolExecutor
) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices inside the blocks and AdamW for embeddings and norms."""
    hidden = [parameter for name, parameter in model.named_parameters() if "layers" in name and parameter.ndim == 2]
    identities = set(map(id, hidden))
    others = [parameter for parameter in model.parameters() if id(parameter) not in identities]
    muon = Muon(hidden, executor, lr=arguments.muon_lr, weight_decay=arguments.weight_decay)
    adam = torch.optim.AdamW(others, lr=arguments.adam_lr, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0)
    for optimiser in (muon, adam):
        for group in optimiser.param_groups:
            group["full_lr"] = group["lr"]
    return [muon, adam]


def checkpoints(work: Path | None) -> Iterator[Path]:
    """Yield the checkpoints in `work`, newest first."""
    if work is not None:
        yield from sorted(work.glob("step-*.pt"), reverse=True)


def optimise(model: LlamaForCausalLM, batches: Batches, arguments: argparse.Namespace, probe: Any) -> list[dict]:
    """Train `model` in place, resuming from the newest checkpoint in `arguments.work`; return the log of probes."""
    executor = ThreadPoolExecutor(N_WORKERS)
    steppers = optimisers(model, arguments, executor)
    first, log, hours = 0, [], 0.0
    for path in checkpoints(arguments.work):
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        for stepper, saved in zip(steppers, state["optimisers"], strict=True):
            stepper.load_state_dict(saved)
        first, log, hours = state["step"], state["log"], state["hours"]
        break
    began = time.monotonic() - 3600 * hours
    for step in range(first, arguments.steps):
        decaying = step >= arguments.steps - arguments.decay
        rows = batches.rows(step, arguments.decay_context if decaying else arguments.context)
        loss = accumulate(model, rows, executor)
        torch.nn.utils.clip_grad_norm_(model.parameters(), arguments.clip)
        for stepper in steppers:
            for group in stepper.param_groups:
                group["lr"] = group["full_lr"] * learning_rate_factor(step, arguments)
            stepper.step()
        hours = (time.monotonic() - began) / 3600
        if step % 10 == 0:
            print(f"step {step} loss {loss:.4f} minutes {60 * hours:.1f}", flush=True)
        if (step + 1) % CHECKPOINT_EVERY == 0:
            log.append({"step": step + 1, "hours": round(hours, 4), **probe(model)})
            print(json.dumps(log[-1]), flush=True)
            save_checkpoint(arguments.work, step + 1, model, steppers, log, hours)
    return log


def save_checkpoint(
    work: Path | None, step: int, model: LlamaForCausalLM, steppers: list[Any], log: list[dict], hours: float
) -> None:
    """Write everything that `optimise` needs to resume before `step`; nothing when `work` is None."""
    if work is None:
        return
    work.mkdir(parents=True, exist_ok=True)
    state = {"model": model.state_dict(), "optimisers": [stepper.state_dict() for stepper in steppers]}
    torch.save({**state, "step": step, "log": log, "hours": hours}, work / "partial")
    (work / "partial").replace(work / f"step-{step:06d}.pt")


def final_report(model: Any, tokenizer: Any, batches: Batches, arguments: argparse.Namespace, log: list[dict]) -> dict:
    """Return what `training.json` records: arguments, versions, data digests, tokens, hours and final metrics."""
    held_out = {kind: [body for name, body in corpus.documents("held_out") if name.startswith(kind)] for kind in corpus.KINDS}
    by_kind = {kind: measure.bits_per_byte(model, tokenizer, bodies) for kind, bodies in held_out.items() if bodies}
    sizes = {kind: sum(len(body.encode()) for body in held_out[kind]) for kind in by_kind}
    joined = corpus.text("held_out")
    questions = world.questions(N_FINAL_QUESTIONS, world=batches.people)
    settings = {key: value for key, value in vars(arguments).items() if key not in ("out", "work")}
    return {
        "arguments": settings,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "machine": f"{platform.machine()}, {N_WORKERS} threads, float32",
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tokens_seen": arguments.steps * arguments.batch_tokens,
        "hours": log[-1]["hours"] if log else None,
        "train_tokens": len(batches.tokens),
        "train_bytes": len(corpus.text("train").encode()),
        "train_sha256": hashlib.sha256(corpus.text("train").encode()).hexdigest(),
        "held_out_bytes": len(joined.encode()),
        "held_out_sha256": hashlib.sha256(joined.encode()).hexdigest(),
        "bits_per_byte": {
            "model": sum(by_kind[kind] * size for kind, size in sizes.items()) / sum(sizes.values()),
            **measure.compressor_bits_per_byte(joined),
        },
        "bits_per_byte_by_kind": by_kind,
        "fact_accuracy": measure.fact_accuracy(model, tokenizer, questions),
        "log": log,
    }


def main() -> None:
    """Train, save in bfloat16, reload what was saved, and measure that."""
    arguments = parse_arguments()
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    tokenizer = train_tokenizer(arguments.people, arguments.seed)
    model = build_model(tokenizer.convert_tokens_to_ids(END_OF_TEXT))  # pyright: ignore[reportArgumentType]
    batches = Batches(tokenizer, arguments)
    print(f"{len(batches.tokens)} training tokens", flush=True)
    sample = [body[:4000] for _, body in corpus.documents("held_out")[:8]]
    questions = world.questions(N_PROBE_QUESTIONS, seed=1, world=batches.people)

    def probe(model: LlamaForCausalLM) -> dict[str, float]:
        recall = measure.fact_accuracy(model, tokenizer, questions)["all"]
        return {"bits_per_byte": measure.bits_per_byte(model, tokenizer, sample, arguments.context), "facts": recall}

    log = optimise(model, batches, arguments, probe)
    model.bfloat16().save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    # bfloat16 is rounded on disk; measure the rounded weights, in float32 because CPUs are slow in bfloat16.
    saved = LlamaForCausalLM.from_pretrained(arguments.out, dtype=torch.float32)
    report = final_report(saved, tokenizer, batches, arguments, log)
    (arguments.out / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps({key: value for key, value in report.items() if key != "log"}, indent=2))


if __name__ == "__main__":
    main()
