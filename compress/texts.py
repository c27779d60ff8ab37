"""Where text comes from: files, the hub and the bundled corpus; plain documents, or records whose prompts are given."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from compress.errors import BadInput

Part = Literal["all", "training", "held_out"]
_HELD_OUT = 1 / 16
"""Share of the text, in expectation, that is held out."""
_UNIT = 4096
"""Characters of a plain document that are held out together."""


class Turn(NamedTuple):
    """A piece of a record. role: who says it, in a conversation; None: plain text. counted: a model is to learn to say it."""

    role: str | None
    text: str
    counted: bool


class Record(NamedTuple):
    """Text of which only some is to be predicted: a prompt and its completion, or a conversation. task: a number, where a method
    tells several apart."""

    turns: tuple[Turn, ...]
    task: int = 0

    def spans(self, tokenizer: Any) -> list[tuple[str, bool]]:
        """The pieces as text, and whether each is to be predicted; a conversation as the tokenizer's chat template writes it.

        Raises :class:`BadInput` where there is no template, or one by which a turn cannot be told from those before it.
        """
        if all(turn.role is None for turn in self.turns):
            return [(turn.text, turn.counted) for turn in self.turns]
        if not getattr(tokenizer, "chat_template", None):
            raise BadInput("the tokenizer has no chat template to write messages with: give columns `prompt` and `completion`")
        spans, written = [], ""
        for number, turn in enumerate(self.turns):
            if turn.counted:  # what invites the answer belongs to the prompt
                written = self._grown(spans, written, self._written(tokenizer, number, invite=True), False)
            written = self._grown(spans, written, self._written(tokenizer, number + 1), turn.counted)
        return spans

    def _written(self, tokenizer: Any, n_turns: int, *, invite: bool = False) -> str:
        messages = [{"role": turn.role, "content": turn.text} for turn in self.turns[:n_turns]]
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=invite) if messages else ""

    def _grown(self, spans: list[tuple[str, bool]], before: str, after: str, counted: bool) -> str:
        if not after.startswith(before):
            raise BadInput("the chat template rewrites earlier turns: give columns `prompt` and `completion`")
        spans.append((after[len(before) :], counted))
        return after


Document = str | Record


def read_text(
    data: str | None, column: str = "text", split: str = "train", *, bundled: str = "calibration", part: Part = "all"
) -> tuple[Iterable[Document], str]:
    """Documents and their source.

    data: a file, a hub dataset id, or None for the bundled text of that split. A row of a .jsonl, a .parquet or a dataset is a
    document where ``column`` holds text, and a record where it has ``messages``, or ``prompt`` and ``completion``: each text
    or a list of messages (role and content). With ``prompt``, ``rationale`` and ``label`` it is two: one that asks for the label,
    and one, of task 1, that asks for the rationale. A row whose ``answer`` is not its ``expected`` answer is left out.
    part: "training" and "held_out" divide the text of one source by its hash, whatever is drawn of either: what one holds the
    other never does. Not that of bundled splits, which have no text in common.
    """
    if data is None:
        from compress.demo.mixture import texts

        return texts(bundled), f"bundled/{bundled}"
    documents, source = _read(data, column, split)
    return (documents if part == "all" else _divided(documents, part)), source


def _read(data: str, column: str, split: str) -> tuple[list[Document], str]:
    path = Path(data).expanduser()
    tabular = path.suffix in (".jsonl", ".json", ".parquet")
    if path.suffix in (".txt", ".md") or path.is_file() or tabular:
        if not path.is_file():
            raise BadInput(f"{data}: no such file")
        if not tabular:
            return [_read_utf8(path)], path.name
        rows = _read_jsonl(path) if path.suffix != ".parquet" else _read_parquet(path)
        return _documents(rows, column, data), path.name
    return _documents(_read_hub(data, split), column, data), data


def _documents(rows: Iterable[Any], column: str, origin: str) -> list[Document]:
    found = [document for row in rows if not _is_wrong(row) for document in _document(row, column, origin)]
    if not found and rows:
        raise BadInput(f"{origin}: no row has the answer that it is expected to have (columns `answer` and `expected`)")
    return found


def _is_wrong(row: Any) -> bool:
    """Whether a teacher's answer is known to be another than the right one; case and spaces around it do not matter."""
    if not isinstance(row, dict) or row.get("answer") is None or row.get("expected") is None:
        return False
    return str(row["answer"]).strip().casefold() != str(row["expected"]).strip().casefold()


def _divided(documents: Iterable[Document], part: Part) -> Iterator[Document]:
    """The documents of one part; plain ones in pieces, of which neighbours of one part stay together."""
    for document in documents:
        if isinstance(document, Record):
            if _is_held_out("".join(turn.text for turn in document.turns)) == (part == "held_out"):
                yield document
            continue
        kept = ""
        for start in range(0, len(document), _UNIT):
            piece = document[start : start + _UNIT]
            if _is_held_out(piece) == (part == "held_out"):
                kept += piece
            elif kept:
                yield kept
                kept = ""
        if kept:
            yield kept


def _is_held_out(text: str) -> bool:
    digest = hashlib.sha256(text.strip().encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < _HELD_OUT * 2**64


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


def _document(row: Any, column: str, origin: str) -> list[Document]:
    """What one row holds."""
    fields = row if isinstance(row, dict) else {}
    if isinstance(text := fields.get(column), str):
        return [text]
    if isinstance(fields.get("messages"), list):
        return [Record(tuple(_turns(fields["messages"], origin)))]
    if fields.get("prompt") is not None and fields.get("completion") is not None:
        prompt = [turn._replace(counted=False) for turn in _turns(fields["prompt"], origin)]
        return [Record((*prompt, *_turns(fields["completion"], origin)))]
    if all(isinstance(fields.get(name), str) for name in ("prompt", "rationale", "label")):
        return [
            Record((Turn(None, f"[{name}] {fields['prompt']}", False), Turn(None, f" {fields[name]}", True)), task)
            for task, name in enumerate(("label", "rationale"))
        ]
    found = ", ".join(f"{k}: {type(v).__name__}" for k, v in fields.items()) if fields else type(row).__name__
    raise BadInput(
        f"{origin}: a row has no text in column {column!r} (it is {found}); name it with --column, or give `messages`, or "
        "`prompt` and `completion`, or `prompt`, `rationale` and `label`"
    )


def _turns(content: Any, origin: str) -> Iterator[Turn]:
    """Text is one turn, to be predicted; of messages, those of the assistant are."""
    if isinstance(content, str):
        yield Turn(None, content, True)
        return
    for message in content if isinstance(content, list) else [content]:
        role, text = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if not (isinstance(role, str) and isinstance(text, str)):
            raise BadInput(f"{origin}: a message has no text as its role and its content: {message!r}"[:300])
        yield Turn(role, text, role == "assistant")
