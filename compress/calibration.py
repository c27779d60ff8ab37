"""Text into windows of tokens: seeded, hashed, and refused where there is too little of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compress.errors import BadInput, explain

DEFAULT_LENGTH = 512
_CHUNK_CHARACTERS = 1 << 20


class Windows(NamedTuple):
    """tokens: (n, length) int64. digest: SHA-256 of the tokens. source: where the text came from."""

    tokens: Tensor
    digest: str
    source: str


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
    return tokenizer


def window_length(requested: int | None, config: Any) -> int:
    """Tokens per window: as requested, or 512, and never more than the model's positions."""
    maximum = getattr(config, "max_position_embeddings", None) or DEFAULT_LENGTH
    if requested is not None and requested > maximum:
        raise BadInput(f"windows of {requested} tokens are longer than the model's {maximum} positions; use --length {maximum}")
    return requested or min(DEFAULT_LENGTH, maximum)


def read_text(
    data: str | None, column: str = "text", split: str = "train", *, bundled: str = "calibration"
) -> tuple[Iterable[str], str]:
    """Documents and their source. data: a file, a hub dataset id, or None for the bundled text of that split."""
    if data is None:
        from compress.demo.mixture import texts

        return texts(bundled), f"bundled/{bundled}"
    path = Path(data).expanduser()
    if path.suffix in (".txt", ".md") or (path.is_file() and path.suffix not in (".jsonl", ".json", ".parquet")):
        if not path.is_file():
            raise BadInput(f"{data}: no such file")
        return [_read_utf8(path)], path.name
    if path.suffix in (".jsonl", ".json", ".parquet"):
        if not path.is_file():
            raise BadInput(f"{data}: no such file")
        rows = _read_jsonl(path) if path.suffix != ".parquet" else _read_parquet(path)
        return _column(rows, column, data), path.name
    return _column(_read_hub(data, split), column, data), data


def _read_utf8(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not UTF-8 text: {error}") from None
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror}") from None


def _read_jsonl(path: Path) -> list[Any]:
    rows = []
    for number, line in enumerate(_read_utf8(path).split("\n"), 1):  # a string may hold what splitlines() splits at
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise BadInput(f"{path}, line {number}: not JSON: {error}") from None
    return rows


def _read_parquet(path: Path) -> list[Any]:
    from pyarrow import ArrowInvalid, parquet

    try:
        return parquet.read_table(path).to_pylist()
    except ArrowInvalid as error:
        raise BadInput(f"{path}: not a parquet file: {error}") from None


def _read_hub(name: str, split: str) -> Any:
    from datasets import load_dataset

    try:
        return load_dataset(name, split=split)
    except Exception as error:  # offline, missing, gated, no such split: all the user's to resolve
        raise BadInput(f"{name}: neither a local file nor a dataset that the hub gave: {str(error).splitlines()[0]}") from None


def _column(rows: Any, column: str, origin: str) -> list[str]:
    texts = []
    for row in rows:
        if not isinstance(row, dict) or not isinstance(row.get(column), str):
            found = ", ".join(f"{k}: {type(v).__name__}" for k, v in row.items()) if isinstance(row, dict) else type(row).__name__
            raise BadInput(f"{origin}: a row has no text in column {column!r} (it is {found}); name it with --column")
        texts.append(row[column])
    return texts


def windows(
    tokenizer: Any, texts: Iterable[str], source: str, *, n: int, length: int, seed: int, at_most: bool = False
) -> Windows:
    """``n`` windows of ``length`` tokens, drawn without overlap and in a seeded order from the joined documents.

    Documents are separated by the tokenizer's end-of-text token where it has one. Raises :class:`BadInput` where the text
    is too short; at_most: fewer windows than ``n`` will do.
    """
    separator = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    ids: list[int] = []
    wanted = 4 * n * length  # enough to draw from; the rest of a huge corpus is never tokenised
    for text in texts:
        for start in range(0, len(text), _CHUNK_CHARACTERS):
            ids += tokenizer(text[start : start + _CHUNK_CHARACTERS], add_special_tokens=False, verbose=False)["input_ids"]
            if len(ids) >= wanted:
                break
        ids += separator
        if len(ids) >= wanted:
            break
    available = len(ids) // length
    if available < (1 if at_most else n):
        fewer = f"at most {available} samples (--samples {available})" if available else "fewer samples (--samples)"
        raise BadInput(
            f"{source}: {len(ids)} tokens are too few for {n} windows of {length}; give more text, {fewer} or shorter windows "
            "(--length)"
        )
    order = torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:n]
    tokens = torch.tensor(ids[: available * length], dtype=torch.int64).reshape(available, length)[order].contiguous()
    return Windows(tokens, hashlib.sha256(tokens.numpy().tobytes()).hexdigest(), source)
