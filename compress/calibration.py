"""Text into windows of tokens: seeded, hashed, and refused where there is too little of it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from compress.errors import BadInput, explain
from compress.texts import Document, Record, read_text

__all__ = ["DEFAULT_LENGTH", "Begin", "Windows", "load_tokenizer", "read_text", "surroundings", "window_length", "windows"]

Begin = Literal["anywhere", "documents"]
DEFAULT_LENGTH = 512
_CHUNK_CHARACTERS = 1 << 20


class Windows(NamedTuple):
    """tokens: (n, length) int64. digest: SHA-256 of the tokens, and of what is counted. source: where the text came from.
    counted: (n, length) bool, the tokens that are to be predicted, not those of prompts and of what fills windows up; None: all.
    tasks: (n, length) int8, of records the task that a token belongs to; None: all have the same.
    """

    tokens: Tensor
    digest: str
    source: str
    counted: Tensor | None = None
    tasks: Tensor | None = None

    def only(self, chosen: Tensor) -> Windows:
        """The windows of those numbers, (n,) int64."""
        counted, tasks = (None if values is None else values[chosen] for values in (self.counted, self.tasks))
        return self._replace(tokens=self.tokens[chosen], counted=counted, tasks=tasks)


def load_tokenizer(path: Path, vocabulary: int, trust_remote_code: bool = False) -> Any:
    """The checkpoint's tokenizer. Raises :class:`BadInput` where there is none or it has more tokens than the model."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizers raise every kind of exception for a missing or damaged file
        raise BadInput(f"{path}: its tokenizer cannot be loaded: {explain(error)}") from None
    if len(tokenizer) > vocabulary:
        raise BadInput(
            f"{path}: the tokenizer has {len(tokenizer)} tokens, the model embeds only {vocabulary}: they do not belong together"
        )
    # It warns once of texts that are longer than the model's positions, which lm-eval and this module cut into windows.
    getattr(tokenizer, "deprecation_warnings", {})["sequence-length-is-longer-than-the-specified-maximum"] = True
    return tokenizer


def window_length(requested: int | None, config: Any) -> int:
    """Tokens per window: as requested, or 512, and never more than the model's positions."""
    maximum = getattr(config, "max_position_embeddings", None) or DEFAULT_LENGTH
    if requested is not None and requested > maximum:
        raise BadInput(f"windows of {requested} tokens are longer than the model's {maximum} positions; use --length {maximum}")
    return requested or min(DEFAULT_LENGTH, maximum)


def surroundings(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer puts before and after every text, such as Llama's and Gemma's first token."""
    for sample in ("a", "0", "."):  # one whose token is not a special one itself
        inner, whole = _ids(tokenizer, sample), tokenizer(sample)["input_ids"]
        if inner and not {*inner} & {*tokenizer("")["input_ids"]}:
            at = next(i for i in range(len(whole)) if whole[i : i + len(inner)] == inner)
            return whole[:at], whole[at + len(inner) :]
    return [], []


def windows(
    tokenizer: Any, texts: Iterable[Document], source: str, *, n: int, length: int, seed: int, at_most: bool = False,
    begin: Begin = "anywhere",
) -> Windows:  # fmt: skip
    """``n`` windows of ``length`` tokens, drawn without overlap and in a seeded order.

    Every window begins as the tokenizer begins a text: some models predict nothing right without their first token. Plain
    documents are joined, separated by the tokenizer's end-of-text token where it has one, and cut; with ``begin="documents"`` a
    window holds the beginning of a document, and those that follow where that one is too short. Records are packed: several in a
    window, each begun likewise and followed by that token, which is to be predicted too; a record begins a new window where it
    would not fit, and what is longer than a window loses its end. Raises :class:`BadInput` where the text is too short; at_most:
    fewer windows than ``n`` will do.
    """
    before, after = surroundings(tokenizer)
    separator = after or ([tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else [])
    plain = _Cut(length, before, begin)
    packed = _Packed(length, filler=next(iter(separator), 0))
    for text in texts:
        if isinstance(text, Record):
            pieces = [(_ids(tokenizer, piece), counted) for piece, counted in text.spans(tokenizer)]
            packed.add(_begun(pieces, before), separator, text.task)
        elif text:
            plain.begin()
            for start in range(0, len(text), _CHUNK_CHARACTERS):
                plain.add(_ids(tokenizer, text[start : start + _CHUNK_CHARACTERS]))
                if plain.full or len(plain.rows) >= 4 * n:  # enough to draw from; the rest of a huge corpus is never tokenised
                    break
            plain.add(separator)
        if len(plain.rows) + len(packed.rows) >= 4 * n:
            break
    available = len(plain.rows) + len(packed.rows)
    if available < (1 if at_most else n):
        raise _too_few(source, plain, packed, n, begin)
    order = torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:n]
    tokens = torch.tensor(plain.rows, dtype=torch.int64).reshape(-1, length)
    counted = tasks = None
    if packed.rows:
        known = torch.ones(len(plain.rows), length, dtype=torch.bool)
        counted = torch.cat([known, torch.tensor(packed.counted, dtype=torch.bool)])[order].contiguous()
        tokens = torch.cat([tokens, torch.tensor(packed.rows, dtype=torch.int64)])
        tasks = torch.cat([known.new_zeros(known.shape, dtype=torch.int8), torch.tensor(packed.tasks, dtype=torch.int8)])[order]
    tokens = tokens[order].contiguous()
    digest = hashlib.sha256(tokens.numpy().tobytes() + (b"" if counted is None else counted.numpy().tobytes()))
    return Windows(tokens, digest.hexdigest(), source, counted, tasks if tasks is not None and bool(tasks.any()) else None)


def _too_few(source: str, plain: _Cut, packed: _Packed, n: int, begin: Begin) -> BadInput:
    available, length = len(plain.rows) + len(packed.rows), plain.length
    fewer = f"at most {available} samples (--samples {available})" if available else "fewer samples (--samples)"
    if begin == "documents" and plain.n_tokens // length > available:
        return BadInput(
            f"{source}: documents begin only {available} of the {n} windows of {length} tokens that are wanted; give more, "
            f"{fewer}, or let windows begin anywhere (--begin anywhere)"
        )
    return BadInput(
        f"{source}: {plain.n_tokens + packed.n_tokens} tokens are too few for {n} windows of {length}; give more text, {fewer} "
        "or shorter windows (--length)"
    )


def _begun(pieces: list[tuple[list[int], bool]], before: list[int]) -> list[tuple[list[int], bool]]:
    """A record's pieces, the first of which begins as every text does; chat templates write that themselves."""
    first = next((piece for piece, _ in pieces if piece), [])
    return pieces if first[: len(before)] == before else [(before, False), *pieces]


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


class _Cut:
    """Windows of plain documents. rows: their tokens; n_tokens: of all documents; full: nothing more is wanted of this one."""

    def __init__(self, length: int, before: list[int], begin: Begin):
        self.length, self.only_beginnings = length, begin == "documents"
        self.before = before if len(before) < length else []
        self.rows: list[list[int]] = []
        self.rest: list[int] = []
        self.n_tokens = 0
        self.full = False

    def begin(self) -> None:
        """A document begins."""
        self.full = False

    def add(self, ids: list[int]) -> None:
        """It goes on."""
        self.n_tokens += len(ids)
        if self.full:
            return
        self.rest += ids
        position, room = 0, self.length - len(self.before)
        while not self.full and position + room <= len(self.rest):
            self.rows.append(self.before + self.rest[position : position + room])
            position += room
            self.full = self.only_beginnings
        self.rest = [] if self.full else self.rest[position:]


class _Packed:
    """Records in windows. rows: their tokens, counted: which are to be predicted, tasks: of which task they are; n_tokens:
    without what fills windows up."""

    def __init__(self, length: int, filler: int):
        self.length, self.filler = length, filler
        self.rows: list[list[int]] = []
        self.counted: list[list[bool]] = []
        self.tasks: list[list[int]] = []
        self.n_tokens = self.room = 0

    def add(self, pieces: list[tuple[list[int], bool]], separator: list[int], task: int = 0) -> None:
        """One record, in the last window or in a new one; left out where nothing in it is to be predicted."""
        tokens = [token for piece, _ in pieces for token in piece] + separator
        counted = [flag for piece, flag in pieces for _ in piece] + [pieces[-1][1]] * len(separator)
        tokens, counted = tokens[: self.length], counted[: self.length]
        if not any(counted[1:]):
            return
        if len(tokens) > self.room:
            self.rows.append([self.filler] * self.length)
            self.counted.append([False] * self.length)
            self.tasks.append([0] * self.length)
            self.room = self.length
        start = self.length - self.room
        self.rows[-1][start : start + len(tokens)] = tokens
        self.counted[-1][start : start + len(tokens)] = counted
        self.tasks[-1][start : start + len(tokens)] = [task] * len(tokens)
        self.room -= len(tokens)
        self.n_tokens += len(tokens)
