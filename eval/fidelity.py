"""How far a compressed model's predictions are from the base model's, token by token.

Accuracy and perplexity hide errors that cancel; the divergence between the two predicted distributions cannot, and is
sensitive long before a benchmark moves. The base model's log-probabilities go to a memory-mapped file, so that the two
models need never be in memory together and the base is run once for any number of compressed models.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from compress.eval.streamed import StreamedModel


class Fidelity(BaseModel):
    """Divergence of a model from its base over held-out tokens, in nats.

    kl_*: per-token KL(base || compressed) over the full vocabulary. kl_stderr: standard error of the mean, tokens taken
    as independent. top1_agreement: share (0..1) of tokens at which both models rank the same token first.
    mean_delta_nll: mean of ln p_base(y) - ln p(y) for the token y that follows; positive is worse; delta_nll_stderr: its
    standard error, likewise (None: measured before it was kept). perplexity, base_perplexity: per token. bits_per_byte,
    base_bits_per_byte: where the bytes of the predicted tokens' text are known.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    kl_mean: float
    kl_stderr: float
    kl_median: float
    kl_p99: float
    kl_max: float
    top1_agreement: float
    mean_delta_nll: float
    perplexity: float
    base_perplexity: float
    n_tokens: int
    bits_per_byte: float | None = None
    base_bits_per_byte: float | None = None
    delta_nll_stderr: float | None = None


class Perplexity(BaseModel):
    """exp of the mean negative log-likelihood per predicted token; bits_per_byte where the text's bytes are known."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    token_perplexity: float
    bits_per_byte: float | None
    n_tokens: int


class TokenDivergence(NamedTuple):
    """One value per token: float64, float64, float64 and bool."""

    kl: Tensor
    base_nll: Tensor
    nll: Tensor
    agrees: Tensor


def divergence(base_logits: Tensor, logits: Tensor, labels: Tensor) -> Fidelity:
    """Compare two models' predictions of the same tokens.

    base_logits, logits: (..., vocabulary), any floating dtype; log-softmax is taken in float32. labels: (...) int64,
    the tokens that follow. Raises ValueError where the shapes differ.
    """
    return _summary([_compare_tokens(_log_softmax(base_logits), _log_softmax(logits), labels)])


@torch.no_grad()
def base_logprobs(model: nn.Module | StreamedModel, windows: Tensor, path: Path) -> Path:
    """Write the model's log-probabilities over token windows to ``path`` (.npy, float32).

    windows: (n_windows, context) int64; the first token of a window is never predicted. The file holds
    (n_windows, context - 1, vocabulary) values, 4 bytes each; it is written aside and renamed when complete.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    stored: np.memmap | None = None
    try:
        for index, logprobs in enumerate(_logprobs(model, windows)):
            if stored is None:
                shape = (len(windows), *logprobs.shape)
                stored = np.lib.format.open_memmap(aside, mode="w+", dtype=np.float32, shape=shape)
            stored[index] = logprobs.cpu().numpy()
        if stored is None:
            raise ValueError("no token windows to predict")
        stored.flush()
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    return path


@torch.no_grad()
def compare(model: nn.Module | StreamedModel, windows: Tensor, path: Path, *, n_bytes: int | None = None) -> Fidelity:
    """Compare a model with the base whose log-probabilities :func:`base_logprobs` wrote for the same windows.

    n_bytes: UTF-8 bytes of the text that is predicted, for bits per byte. Raises ValueError if the file is of other windows
    or of another vocabulary.
    """
    stored = np.load(path, mmap_mode="r")
    if stored.shape[:2] != (len(windows), windows.shape[1] - 1):
        expected = (len(windows), windows.shape[1] - 1)
        raise ValueError(f"{path} holds predictions of windows {stored.shape[:2]}, expected {expected}")
    parts: list[TokenDivergence] = []
    for index, logprobs in enumerate(_logprobs(model, windows)):
        base = torch.from_numpy(np.array(stored[index])).to(logprobs.device)
        parts.append(_compare_tokens(base, logprobs, windows[index, 1:].to(logprobs.device)))
    return _summary(parts, n_bytes)


@torch.no_grad()
def perplexity(model: nn.Module | StreamedModel, windows: Tensor, *, n_bytes: int | None = None) -> Perplexity:
    """Perplexity over disjoint token windows, the first token of each left unpredicted.

    windows: (n_windows, context) int64. n_bytes: UTF-8 bytes of the predicted tokens' text, for bits per byte, the only
    one of the two that can be compared across tokenizers.
    """
    total, n_tokens = 0.0, 0
    for window, logprobs in zip(windows, _logprobs(model, windows), strict=True):
        labels = window[1:].to(logprobs.device)
        total -= logprobs.gather(-1, labels.unsqueeze(-1)).sum(dtype=torch.float64).item()
        n_tokens += labels.numel()
    bits_per_byte = None if n_bytes is None else total / (n_bytes * math.log(2))
    return Perplexity(token_perplexity=_exponential(total / n_tokens), bits_per_byte=bits_per_byte, n_tokens=n_tokens)


def _logprobs(model: nn.Module | StreamedModel, windows: Tensor) -> Iterator[Tensor]:
    """(context - 1, vocabulary) float32 for each window; one at a time, since the vocabulary makes even one large."""
    if isinstance(model, StreamedModel):
        for logits in model.logits(windows.split(1)):
            yield _log_softmax(logits[0, :-1])
        return
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    try:
        for window in windows:
            logits = model(input_ids=window.unsqueeze(0).to(device), use_cache=False).logits
            yield _log_softmax(logits[0, :-1])
    finally:
        model.train(training)


def _log_softmax(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits.float(), dim=-1)


def _compare_tokens(base: Tensor, logprobs: Tensor, labels: Tensor) -> TokenDivergence:
    if base.shape != logprobs.shape or labels.shape != base.shape[:-1]:
        shapes = f"{tuple(base.shape)}, {tuple(logprobs.shape)} and labels {tuple(labels.shape)}"
        raise ValueError(f"predictions cannot be compared: {shapes}")
    probabilities = base.exp()
    kl = (probabilities * (base - logprobs)).sum(-1, dtype=torch.float64)
    # Float32 probabilities add up to 1 only to 1e-7; without the difference of the sums small divergences drown in
    # that.
    kl += logprobs.exp().sum(-1, dtype=torch.float64) - probabilities.sum(-1, dtype=torch.float64)
    index = labels.unsqueeze(-1)
    return TokenDivergence(
        kl=kl.flatten(),
        base_nll=-base.gather(-1, index).double().flatten(),
        nll=-logprobs.gather(-1, index).double().flatten(),
        agrees=(base.argmax(-1) == logprobs.argmax(-1)).flatten(),
    )


def _summary(parts: list[TokenDivergence], n_bytes: int | None = None) -> Fidelity:
    kl, base_nll, nll, agrees = (torch.cat(values).cpu() for values in zip(*parts, strict=True))
    n_tokens = kl.numel()

    def error(values: Tensor) -> float:
        return values.std().item() / math.sqrt(n_tokens) if n_tokens > 1 else 0.0

    return Fidelity(
        kl_mean=kl.mean().item(),
        kl_stderr=error(kl),
        kl_median=kl.median().item(),
        kl_p99=float(np.quantile(kl.numpy(), 0.99)),
        kl_max=kl.max().item(),
        top1_agreement=agrees.double().mean().item(),
        mean_delta_nll=(nll - base_nll).mean().item(),
        perplexity=_exponential(nll.mean().item()),
        base_perplexity=_exponential(base_nll.mean().item()),
        n_tokens=n_tokens,
        bits_per_byte=None if n_bytes is None else nll.sum().item() / (n_bytes * math.log(2)),
        base_bits_per_byte=None if n_bytes is None else base_nll.sum().item() / (n_bytes * math.log(2)),
        delta_nll_stderr=error(nll - base_nll),
    )


def _exponential(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
