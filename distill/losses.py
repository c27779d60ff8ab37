"""Divergences between next-token distributions, as pure functions of logits, and their evaluation piece by piece.

p is the teacher, q the student. All take ``student_logits`` and ``teacher_logits`` (..., vocabulary), finite, in any floating
dtype, and a ``temperature`` that divides both; they return (...), nats per token. Every log-softmax is taken in float32
(float64 where the logits are): bfloat16 has 8 bits of mantissa, less than the differences that distillation learns from. Two
vocabularies may differ by padding: the logits beyond the smaller size belong to no token and are cut off.

Equal logits give 0, not merely something small: differences of logarithms are taken first, and multiplied then. The factor
temperature**2 with which Hinton et al. (1503.02531, section 2) keep gradients of one size is *not* included: these are the
divergences themselves, and the method that wants the factor multiplies by it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from compress.train_pass import Signal

Divergence = Callable[[Tensor, Tensor], Tensor]
"""(student logits, teacher logits), both (tokens, vocabulary) -> (tokens,)."""

_LOGITS = 10_000_000  # of both models together that exist at one time, in four bytes each


def forward_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(p || q) = sum_v p_v ln(p_v / q_v). Its gradient in the student's logits is (q - p) / temperature."""
    log_q, log_p = _log_pair(student_logits, teacher_logits, temperature)
    return _kl(log_p, log_q)


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(q || p): large where the student says what the teacher would not, and blind to what it leaves out."""
    log_q, log_p = _log_pair(student_logits, teacher_logits, temperature)
    return _kl(log_q, log_p)


def jsd(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, beta: float = 0.5) -> Tensor:
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q (GKD, 2306.13649).

    It tends to 0 with beta and with 1 - beta, but JSD / beta to KL(p || q) and JSD / (1 - beta) to KL(q || p). ``beta`` 0 and 1
    stand for these limits, forward and reverse KL: there the value jumps.
    """
    if beta in (0, 1):
        return (reverse_kl if beta else forward_kl)(student_logits, teacher_logits, temperature)
    log_q, log_p = _log_pair(student_logits, teacher_logits, temperature)
    log_m = _log_mixture(log_p, log_q, beta)
    return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)


def skew_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, alpha: float = 0.1) -> Tensor:
    """KL(p || alpha p + (1 - alpha) q) (DistiLLM, 2402.03898): at most -ln(alpha), however small q becomes."""
    log_q, log_p = _log_pair(student_logits, teacher_logits, temperature)
    return _kl(log_p, _log_mixture(log_p, log_q, alpha))


def skew_reverse_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, alpha: float = 0.1) -> Tensor:
    """KL(q || (1 - alpha) p + alpha q)."""
    log_q, log_p = _log_pair(student_logits, teacher_logits, temperature)
    return _kl(log_q, _log_mixture(log_q, log_p, alpha))


def adaptive_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, head: float = 0.5) -> Tensor:
    """Forward and reverse KL, each with the share of the gap sum_v |p_v - q_v| that it sees to (AKL, 2404.02657): forward KL
    with that among the likeliest tokens, which have a mass of ``head`` under p, reverse KL with that of the tail. The shares take
    no gradient."""
    log_q, log_p = _log_pair(student_logits, teacher_logits, temperature)
    with torch.no_grad():
        p, order = log_p.exp().sort(-1, descending=True)
        gap = (p - log_q.exp().gather(-1, order)).abs()
        in_head = p.cumsum(-1) - p < head  # the token that reaches it included
        share = (gap * in_head).sum(-1) / gap.sum(-1).clamp_min(torch.finfo(gap.dtype).tiny)
    return share * _kl(log_p, log_q) + (1 - share) * _kl(log_q, log_p)


def cross_entropy(student_logits: Tensor, targets: Tensor) -> Tensor:
    """-ln q of the targets (...,) int64, at temperature 1."""
    return -_log_softmax(student_logits, 1.0).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """-sum_v q_v ln q_v."""
    log_q = _log_softmax(logits, temperature)
    return -(log_q.exp() * log_q).sum(-1)


def per_token(
    loss: Callable[..., Tensor], student: Signal, teacher: Signal | None, *rows: Tensor, chunk: int | None = None
) -> Tensor:
    """``loss`` at every token, without ever holding the logits of more than ``chunk`` tokens.

    loss: (student logits (n, vocabulary), teacher logits (n, vocabulary'), parts of the rows...) -> (n, ...), token by token;
    where there is no teacher its logits are left out. student: takes gradients, also in parameters of its head that ask for
    them. teacher: takes none. rows: (tokens, ...) each, what else the loss is to see of every token.

    What is chunked is the *tokens*: both heads are applied to ``chunk`` hidden states at a time, over the whole
    vocabulary, under activation checkpointing. Nothing of size vocabulary is kept for the backward pass, which
    recomputes the two heads chunk by chunk, so that forward and backward need O(chunk * vocabulary) numbers however
    many tokens there are (a step of 16k tokens over 128k words has 2.1e9 logits a model: 8.6 GB in float32, several
    times over). Chunking the vocabulary would bound the memory too, but only for a plain matrix: a head may be any
    function, and some models cap their logits.

    chunk: tokens at a time; changes memory and speed, and the values by rounding at the most. None: as many as have logits of 40
    MB, those of both models counted, so that a teacher makes chunks shorter and not the memory larger; where these are all
    there is nothing to recompute.
    Returns (tokens, ...). Raises ValueError when the numbers of tokens differ.
    """
    counts = [len(student.hidden), *([] if teacher is None else [len(teacher.hidden)]), *map(len, rows)]
    if len(set(counts)) > 1:
        raise ValueError(f"{counts[0]} student tokens, but {', '.join(map(str, counts[1:]))} beside")

    if chunk is None:
        with torch.no_grad():
            chunk = max(1, _LOGITS // sum(one.head(one.hidden[:1]).numel() for one in (student, teacher) if one is not None))

    def of_chunk(hidden: Tensor, *others: Tensor) -> Tensor:
        if teacher is None:
            return loss(student.head(hidden), *others)
        with torch.no_grad():
            teacher_logits = teacher.head(others[0])
        return loss(student.head(hidden), teacher_logits, *others[1:])

    tensors = (student.hidden, *(() if teacher is None else (teacher.hidden,)), *rows)
    if counts[0] <= chunk:
        return of_chunk(*tensors)
    parts = zip(*(tensor.split(chunk) for tensor in tensors), strict=True)
    # A head draws no random numbers, so there is no generator state to keep for the recomputation.
    return torch.cat([checkpoint(of_chunk, *part, use_reentrant=False, preserve_rng_state=False) for part in parts])


def _log_pair(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(ln q, ln p) over what both vocabularies have."""
    vocabulary = min(student_logits.shape[-1], teacher_logits.shape[-1])
    log_q = _log_softmax(student_logits[..., :vocabulary], temperature)
    return log_q, _log_softmax(teacher_logits[..., :vocabulary], temperature)


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return torch.log_softmax(wide / temperature, dim=-1)


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def _log_mixture(log_a: Tensor, log_b: Tensor, share: float) -> Tensor:
    """ln(share a + (1 - share) b), 0 < share < 1; exactly ln a where a = b, with the right gradients."""
    difference = log_a - log_b
    near = log_b + torch.log1p(share * torch.expm1(difference.clamp(-1, 1)))
    apart = torch.logaddexp(log_a + math.log(share), log_b + math.log1p(-share))
    return torch.where(difference.abs() < 1, near, apart)
