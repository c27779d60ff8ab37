"""A teacher that need not be in memory: what it predicts, computed once, kept on disk, read by every student of the same text.

Of each prediction are kept the log-probabilities of the k likeliest tokens, as float16, and the mass tau of all others, which is
spread over them evenly. With p the teacher's distribution, p' what is read back and q the student's:

- KL(p' || q) is KL(p || q) less a constant between 0 and tau ln(V - k), which no gradient sees, up to tau times the range of
  ln q over these other tokens;
- the gradient in the student's logits, q - p', is off by |p - p'|_1 <= 2 tau;
- rounding moves a kept log-probability by 2**-11 of it, 0.5 % of the probability at ln p = -10.

Where k is the vocabulary's size, or more, the logits themselves are kept, in float32: nothing is lost.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from compress.calibration import load_tokenizer
from compress.checkpoint import Checkpoint
from compress.errors import BadInput
from compress.eval.baselines import baseline_directory
from compress.progress import Progress
from compress.signals import signal_of
from compress.train_pass import Batch, Signal, TrainPass

log = logging.getLogger(__name__)

_TOKENS_PER_FORWARD, _ROWS_PER_HEAD = 4096, 256
_FORMAT = 1
_SAMPLE = """The fox isn't 1,234.5 km away (it's "there").\n\n\tdef f(x):\n        return x**2  # Größe, 東京, привет 🙂"""
_NAMES = {torch.float32: "F32", torch.int32: "I32", torch.float16: "F16"}


class CachedTeacher:
    """The predictions that a file keeps. vocabulary: V. length: of the windows, each of which has length - 1 rows there."""

    def __init__(self, file: Path):
        with safe_open(file, framework="pt") as opened:  # mapped: only what is read comes into memory
            self._tensors: dict[str, Tensor] = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            facts = opened.metadata()
        self.vocabulary, self.length = int(facts["vocabulary"]), int(facts["length"])

    def signal(self, batch: Batch) -> Signal:
        """The teacher's signal: in the place of hidden states stand the numbers of rows, (tokens, 1) int64."""
        assert batch.rows is not None, "only what the teacher was shown is kept"
        columns = torch.arange(self.length, device=batch.rows.device)
        rows = batch.rows.unsqueeze(1) * (self.length - 1) + columns
        return Signal(batch.before_predicted(rows.unsqueeze(-1)), self._logits)

    def _logits(self, rows: Tensor) -> Tensor:
        """(n, 1) -> (n, V) float32, from which a softmax makes what is kept."""
        where, device = rows[:, 0].cpu(), rows.device
        values = self._tensors["values"][where].to(device, torch.float32)
        if "indices" not in self._tensors:
            return values
        rest = self._tensors["rest"][where].to(device).unsqueeze(1)
        return rest.repeat(1, self.vocabulary).scatter_(1, self._tensors["indices"][where].to(device, torch.int64), values)


def cached_teacher(
    digest: str, tokens: Tensor, n_kept: int, load: Callable[[], PreTrainedModel], progress: Progress
) -> CachedTeacher:
    """What a teacher predicts on ``tokens`` (n, length): from the cache, or computed and kept there first.

    digest: of the teacher's files. n_kept: k, tokens that are kept of each prediction. load: gives the model, on the device to
    compute on; called only where it is needed. Raises BadInput where the cache cannot hold it.
    """
    file = cache_file(digest, tokens, n_kept)
    if not file.exists():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            keep_predictions(load(), tokens, n_kept, file, progress)
        except OSError as error:
            raise BadInput(f"{file}: the teacher's predictions cannot be kept: {error.strerror or error}") from None
    return CachedTeacher(file)


def cache_file(digest: str, tokens: Tensor, n_kept: int) -> Path:
    """Where :func:`cached_teacher` keeps them."""
    key = hashlib.sha256(json.dumps([_FORMAT, digest, list(tokens.shape), n_kept]).encode())
    key.update(tokens.cpu().numpy().tobytes())
    return baseline_directory().parent / "teachers" / f"{key.hexdigest()[:32]}.safetensors"


@torch.no_grad()
def keep_predictions(model: PreTrainedModel, tokens: Tensor, n_kept: int, file: Path, progress: Progress) -> None:
    """Write what a model predicts on ``tokens`` (n, length) int64: aside, and in place when it is complete."""
    n_rows, width = len(tokens) * (tokens.shape[1] - 1), tokens.shape[1] - 1
    device, batch = next(model.parameters()).device, max(1, _TOKENS_PER_FORWARD // tokens.shape[1])
    aside, kept = file.with_suffix(f".{os.getpid()}"), {}
    try:
        for start in range(0, len(tokens), batch):
            progress(start, len(tokens), "the teacher's predictions")
            signal = signal_of(model, Batch(tokens[start : start + batch].to(device)))
            for number, hidden in enumerate(signal.hidden.split(_ROWS_PER_HEAD)):
                logits = signal.head(hidden).float()
                found = _likeliest(logits, n_kept)
                if not kept:
                    kept = _allocate(aside, found, n_rows, {"vocabulary": logits.shape[1], "length": tokens.shape[1]})
                begin = start * width + number * _ROWS_PER_HEAD
                for name, value in found.items():
                    kept[name][begin : begin + len(value)] = value.cpu()
        with aside.open("rb+") as written:
            os.fsync(written.fileno())
        aside.replace(file)
    finally:
        aside.unlink(missing_ok=True)


def _likeliest(logits: Tensor, n_kept: int) -> dict[str, Tensor]:
    """What is kept of logits (n, V) float32. rest: (n,) float32, log-probability that each of the others is given."""
    vocabulary = logits.shape[1]
    if n_kept >= vocabulary:
        return {"values": logits}
    values, indices = logits.log_softmax(-1).topk(n_kept)
    others = logits.scatter(1, indices, -math.inf).logsumexp(-1) - logits.logsumexp(-1)
    rest = others - math.log(vocabulary - n_kept)
    return {"rest": rest, "indices": indices.to(torch.int32), "values": values.half()}  # the widest first: all lie aligned


def _allocate(file: Path, like: dict[str, Tensor], n_rows: int, facts: dict[str, int]) -> dict[str, Tensor]:
    """The tensors of a new safetensors file, mapped: writing to them writes the file. like: their first rows."""
    header: dict[str, Any] = {"__metadata__": {name: str(value) for name, value in facts.items()}}
    end = 0
    for name, first in like.items():
        begin, end = end, end + n_rows * first[0].numel() * first.itemsize
        header[name] = {"dtype": _NAMES[first.dtype], "shape": [n_rows, *first.shape[1:]], "data_offsets": [begin, end]}
    content = json.dumps(header).encode()
    content += b" " * (-len(content) % 8)
    total, free = 8 + len(content) + end, shutil.disk_usage(file.parent).free
    if total > free:
        raise BadInput(f"{file.parent}: {free / 1e9:.2f} GB are free, the teacher's predictions take {total / 1e9:.2f} GB")
    with file.open("wb") as opened:
        opened.write(struct.pack("<Q", len(content)) + content)
        opened.truncate(total)
    data = torch.from_file(str(file), shared=True, size=total, dtype=torch.uint8)[8 + len(content) :]
    found = {}
    for name, first in like.items():
        begin, end = header[name]["data_offsets"]
        found[name] = data[begin:end].view(first.dtype).view(header[name]["shape"])
    return found


def open_teacher(step: TrainPass, run: Checkpoint, tokenizer: Any, length: int) -> Checkpoint:
    """The checkpoint that teaches in ``step``: the run's own, unless the pass names another one.

    tokenizer: of the run's model. length: of the windows. Raises BadInput where the other one's tokens mean something else, or
    its windows are shorter. Sizes of vocabularies may differ by padding: losses look at the smaller one's tokens.
    """
    if step.teacher is None:
        return run
    other = Checkpoint.open(step.teacher, trust_remote_code=run.trust_remote_code)
    theirs = load_tokenizer(other.path, other.config.vocab_size, run.trust_remote_code)
    if (reason := _difference(tokenizer, theirs)) is not None:
        raise BadInput(f"{step.label()}: {step.teacher} cannot teach this model: {reason}")
    longest = getattr(other.config, "max_position_embeddings", None) or length
    if length > longest:
        raise BadInput(f"{step.label()}: windows of {length} tokens are longer than the {longest} positions of {step.teacher}")
    if other.config.vocab_size != run.config.vocab_size:
        sizes = f"{other.config.vocab_size} and {run.config.vocab_size}"
        log.info("vocabularies of %s tokens differ by padding alone: compared are the %d tokens there are", sizes, len(tokenizer))
    return other


def _difference(ours: Any, theirs: Any) -> str | None:
    """How two tokenizers differ, in words; None where they do not."""
    mine, other = ours.get_vocab(), theirs.get_vocab()
    if mine != other:
        n_differing = len(mine.items() ^ other.items())
        return f"its tokenizer has other tokens ({len(other)} against {len(mine)}, {n_differing} entries differ)"
    if ours(_SAMPLE)["input_ids"] != theirs(_SAMPLE)["input_ids"]:
        return "its tokenizer has the same tokens but splits text otherwise"
    return None
