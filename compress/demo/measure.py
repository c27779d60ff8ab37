"""What the demo model is worth: bits per byte beside gzip and xz on the same bytes, and recall of facts.

General-purpose compressors are the natural yardstick of a byte-level language model: same text, same unit, and no way
to cheat, since a byte-level tokenizer loses nothing.
"""

from __future__ import annotations

import gzip
import lzma
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from compress.demo import world

ROWS_AT_ONCE = 4


@torch.no_grad()
def negative_log_likelihood(model: Any, rows: Tensor, n_context: int) -> float:
    """Return the summed loss in nats of `rows` (rows, tokens) after their first `n_context` tokens."""
    total = 0.0
    for batch in rows.split(ROWS_AT_ONCE):
        logits = model(input_ids=batch, use_cache=False).logits[:, n_context - 1 : -1].float()
        total += cross_entropy(logits.flatten(0, 1), batch[:, n_context:].flatten(), reduction="sum").item()
    return total


def bits_per_byte(model: Any, tokenizer: Any, texts: Sequence[str], window: int = 1024) -> float:
    """Return the model's bits per UTF-8 byte of `texts`, each scored from a beginning-of-text token on.

    A text longer than `window` tokens is read in windows that advance by half their length, so that all but the first
    half window is predicted from at least half a window of context.
    """
    nats, stride = 0.0, window // 2
    for body in texts:
        tokens = torch.tensor([[tokenizer.bos_token_id, *tokenizer.encode(body, add_special_tokens=False, verbose=False)]])
        nats += negative_log_likelihood(model, tokens[:, :window], 1)
        for end in range(window, tokens.shape[1], stride):
            piece = tokens[:, end - window + stride : end + stride]
            nats += negative_log_likelihood(model, piece, window - stride)
    return nats / math.log(2) / sum(len(body.encode()) for body in texts)


def compressor_bits_per_byte(text: str) -> dict[str, float]:
    """Return the bits per byte of `gzip -9` and `xz -9e` on the UTF-8 bytes of `text`."""
    raw = text.encode()
    packed = {"gzip": gzip.compress(raw, 9), "xz": lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME)}
    return {name: 8 * len(data) / len(raw) for name, data in packed.items()}


@torch.no_grad()
def answers(model: Any, tokenizer: Any, questions: Sequence[dict[str, Any]]) -> list[bool]:
    """Return, for each question of `world.questions`, whether its true choice is the likeliest continuation."""
    results = []
    for question in questions:
        context = tokenizer.encode(question["context"], add_special_tokens=False)
        choices = [tokenizer.encode(choice, add_special_tokens=False) for choice in question["choices"]]
        longest = max(map(len, choices))
        # Causal attention makes padding on the right harmless: it is never scored.
        rows = torch.tensor([context + choice + [0] * (longest - len(choice)) for choice in choices])
        scores = model(input_ids=rows, use_cache=False).logits.float().log_softmax(-1)
        sums = [
            sum(float(scores[row, len(context) + i - 1, token]) for i, token in enumerate(choice))
            for row, choice in enumerate(choices)
        ]
        results.append(sums.index(max(sums)) == question["gold"])
    return results


def fact_accuracy(model: Any, tokenizer: Any, questions: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the share of right answers: `all`, and one entry for each attribute."""
    outcomes: dict[str, list[bool]] = {}
    for question, right in zip(questions, answers(model, tokenizer, questions), strict=True):
        for key in ("all", question["attribute"]):
            outcomes.setdefault(key, []).append(right)
    return {key: sum(found) / len(found) for key, found in outcomes.items()}


def knowledge_bits(lm: Any, n_questions: int | None = None) -> float:
    """Return how many bits about the invented people the model knows, through lm-eval's view of it.

    As in "Knowledge Capacity Scaling Laws" (2404.05405): an attribute of N people whose value is one of S is worth N log2(S)
    bits, of which the model's mean loss on the true values, in bits, is missing; nothing is known where that is more.
    `n_questions`: facts that are asked, evenly over attributes (None: all); the mean of those stands for the others.
    """
    from lm_eval.api.instance import Instance

    n_facts = world.N_PEOPLE * len(world.POOLS)
    asked: list[dict[str, Any]] = list(world.questions(min(max(n_questions or n_facts, len(world.POOLS)), n_facts)))
    requests = [
        Instance("loglikelihood", {}, (question["context"], question["choices"][question["gold"]]), 0) for question in asked
    ]
    losses: dict[str, list[float]] = {}
    for question, (likelihood, _) in zip(asked, lm.loglikelihood(requests, disable_tqdm=True), strict=True):
        losses.setdefault(question["attribute"], []).append(-likelihood / math.log(2))
    known = {attribute: math.log2(len(world.POOLS[attribute])) - sum(own) / len(own) for attribute, own in losses.items()}
    return world.N_PEOPLE * sum(max(bits, 0.0) for bits in known.values())
