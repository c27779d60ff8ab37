"""Divergences between next-token distributions, as pure functions of logits.

p is the teacher, q the student. Every log-softmax is taken in float32 (float64 where the logits are): bfloat16 has 8
bits of mantissa, less than the differences that distillation learns from. Two vocabularies may differ by padding: the
logits beyond the smaller size belong to no token and are cut off.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Head = Callable[[Tensor], Tensor]
"""Final hidden states (tokens, d) -> logits (tokens, vocabulary)."""


def forward_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(p || q) = sum_v p_v ln(p_v / q_v) of each token, in nats.

    student_logits, teacher_logits: (..., vocabulary), finite, any floating dtype. temperature: both logits are divided
    by it. Returns (...), float32 or float64; >= 0, and 0 where p = q. Its gradient in the student's logits is (q - p) /
    temperature.

    The factor temperature**2 with which Hinton et al. (1503.02531, section 2) keep gradients of one size is *not*
    included: this is the divergence itself, and the method that wants the factor multiplies by it.
    """
    vocabulary = min(student_logits.shape[-1], teacher_logits.shape[-1])
    log_q = _log_softmax(student_logits[..., :vocabulary], temperature)
    log_p = _log_softmax(teacher_logits[..., :vocabulary], temperature)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def chunked_forward_kl(
    student_hidden: Tensor,
    student_head: Head,
    teacher_hidden: Tensor,
    teacher_head: Head,
    temperature: float = 1.0,
    chunk: int = 256,
) -> Tensor:
    """Sum over tokens of :func:`forward_kl`, without ever holding the logits of more than ``chunk`` tokens.

    What is chunked is the *tokens*: both heads are applied to ``chunk`` hidden states at a time, over the whole
    vocabulary, under activation checkpointing. Nothing of size vocabulary is kept for the backward pass, which
    recomputes the two heads chunk by chunk, so that forward and backward need O(chunk * vocabulary) numbers however
    many tokens there are (a step of 16k tokens over 128k words has 2.1e9 logits a model: 8.6 GB in float32, several
    times over). Chunking the vocabulary would bound the memory too, but only for a plain matrix: a head may be any
    function, and some models cap their logits.

    student_hidden: (tokens, d), differentiable. teacher_hidden: (tokens, d'), never differentiated.
    student_head, teacher_head: hidden states to logits; parameters of the student's head receive gradients if they ask.
    chunk: tokens at a time; changes memory and speed, and the value only by the order of a sum.
    On a CPU let chunk * vocabulary * 4 bytes exceed 32 MiB: glibc's heap fragments under smaller blocks, and keeps what
    chunking has freed.
    Returns a scalar, float32 or float64. Raises ValueError when the numbers of tokens differ.
    """
    if student_hidden.shape[0] != teacher_hidden.shape[0]:
        raise ValueError(f"{student_hidden.shape[0]} student tokens but {teacher_hidden.shape[0]} teacher tokens")

    def chunk_sum(student_rows: Tensor, teacher_rows: Tensor) -> Tensor:
        with torch.no_grad():
            teacher_logits = teacher_head(teacher_rows)
        return forward_kl(student_head(student_rows), teacher_logits, temperature).sum()

    rows = zip(student_hidden.split(chunk), teacher_hidden.split(chunk), strict=True)
    # A head draws no random numbers, so there is no generator state to keep for the recomputation.
    sums = [checkpoint(chunk_sum, *pair, use_reentrant=False, preserve_rng_state=False) for pair in rows]
    return torch.stack(sums).sum()


def chunked_cross_entropy(hidden: Tensor, head: Head, targets: Tensor, chunk: int = 256) -> Tensor:
    """Sum over tokens of -ln q(target), in nats: like :func:`chunked_forward_kl`, never the logits of more than ``chunk`` tokens.

    hidden: (tokens, d), differentiable. targets: (tokens,) int64. Returns a scalar, float32 or float64.
    """

    def chunk_sum(rows: Tensor, wanted: Tensor) -> Tensor:
        return -_log_softmax(head(rows), 1.0).gather(1, wanted.unsqueeze(1)).sum()

    rows = zip(hidden.split(chunk), targets.split(chunk), strict=True)
    return torch.stack([checkpoint(chunk_sum, *pair, use_reentrant=False, preserve_rng_state=False) for pair in rows]).sum()


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return torch.log_softmax(wide / temperature, dim=-1)
