"""Calibration text: the same tokens from every kind of file, in seeded windows that do not overlap."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from pyarrow import Table, parquet

from compress.calibration import load_tokenizer, read_text, surroundings, window_length, windows
from compress.errors import BadInput

DOCUMENTS = ["ba de fi.\n\nko lu", "  ma\tne\u2028ru su\x0cte ", "fi ko " * 40, "ba"]


def write(directory: Path, kind: str, documents: list[str], column: str = "text") -> str:
    """A file of that kind with these documents; returns its path."""
    file = directory / f"data.{kind}"
    rows = [{"n": number, column: text} for number, text in enumerate(documents)]
    if kind == "txt":
        file.write_text("".join(documents), encoding="utf-8")
    elif kind == "parquet":
        parquet.write_table(Table.from_pylist(rows), file)
    else:
        file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n", encoding="utf-8")
    return str(file)


def take(tokenizer, data: str, n: int = 4, length: int = 8, seed: int = 0, column: str = "text"):
    texts, source = read_text(data, column)
    return windows(tokenizer, texts, source, n=n, length=length, seed=seed)


def test_one_document_is_the_same_in_every_kind_of_file(tokenizer, text_file: Path, tmp_path: Path):
    text = text_file.read_text()
    found = [take(tokenizer, write(tmp_path, kind, [text])) for kind in ("txt", "jsonl", "json", "parquet")]
    assert len({chosen.digest for chosen in found}) == 1
    assert all(torch.equal(chosen.tokens, found[0].tokens) for chosen in found)
    assert [chosen.source for chosen in found] == ["data.txt", "data.jsonl", "data.json", "data.parquet"]


def test_documents_are_read_alike_from_rows(tmp_path: Path):
    """Characters at which Python splits lines, but JSON does not end a row, belong to the text."""
    for column in ("text", "body"):
        rows = [list(read_text(write(tmp_path, kind, DOCUMENTS, column), column)[0]) for kind in ("jsonl", "parquet")]
        assert rows == [DOCUMENTS, DOCUMENTS]


def test_documents_are_separated(tokenizer, tmp_path: Path):
    data = write(tmp_path, "jsonl", DOCUMENTS)
    ids = take(tokenizer, data, n=1, length=20).tokens  # few enough to know them all in order
    expected = []
    for text in DOCUMENTS:
        expected += [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    cut = [expected[start : start + 20] for start in range(0, len(expected) - 19, 20)]
    assert ids.tolist()[0] in cut


@pytest.mark.parametrize(("n", "length"), [(1, 7), (20, 16), (5, 100)])
def test_windows_are_disjoint_pieces_of_the_text(tokenizer, text_file: Path, n: int, length: int):
    text = text_file.read_text()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = {tuple(ids[start : start + length]): start for start in range(0, len(ids) - length + 1, length)}
    chosen = take(tokenizer, str(text_file), n, length)
    assert chosen.tokens.shape == (n, length) and chosen.tokens.dtype == torch.int64
    starts = [pieces[tuple(row)] for row in chosen.tokens.tolist()]
    assert len(set(starts)) == n


def test_every_window_is_drawn_once_where_all_are_wanted(tokenizer, text_file: Path):
    n_tokens = len(tokenizer(text_file.read_text(), add_special_tokens=False)["input_ids"]) + 1
    everything = take(tokenizer, str(text_file), n_tokens // 50, 50)
    assert len(set(map(tuple, everything.tokens.tolist()))) == n_tokens // 50
    with pytest.raises(BadInput, match=f"{n_tokens} tokens are too few .* at most {n_tokens // 50} samples"):
        take(tokenizer, str(text_file), n_tokens // 50 + 1, 50)


@pytest.fixture(scope="module")
def beginning(tokenizer):
    """The same tokenizer, which begins every text with <s>, as Llama's and Gemma's do."""
    from tokenizers import processors

    begins = deepcopy(tokenizer)
    begins.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return begins


def test_every_window_begins_as_a_text_does(tokenizer, beginning, tmp_path: Path):
    """And nothing else does: the first token of a window is never predicted, one inside it would be."""
    assert surroundings(tokenizer) == ([], []) and surroundings(beginning) == ([0], [])
    texts, source = read_text(write(tmp_path, "jsonl", DOCUMENTS))
    rows = windows(beginning, texts, source, n=99, length=9, seed=0, at_most=True).tokens.tolist()
    joined = [id for text in DOCUMENTS for id in (*tokenizer(text)["input_ids"], 1)]
    assert sorted(rows) == sorted([0, *joined[start : start + 8]] for start in range(0, len(joined) - 7, 8))


def test_windows_that_begin_with_documents(tokenizer, beginning, tmp_path: Path):
    texts, source = read_text(write(tmp_path, "jsonl", ["", *DOCUMENTS]))
    ids = [[*tokenizer(text)["input_ids"], 1] for text in DOCUMENTS]
    length = len(ids[0]) + 3  # the first document is too short for a window
    rows = windows(beginning, texts, source, n=99, length=length, seed=0, at_most=True, begin="documents").tokens.tolist()
    assert sorted(rows) == sorted([[0, *ids[0], *ids[1]][:length], [0, *ids[2]][:length]])
    with pytest.raises(BadInput, match=r"documents begin only 2 of the 3 windows of .* give more, .*--begin anywhere"):
        windows(beginning, texts, source, n=3, length=length, seed=0, begin="documents")


def test_tokenizers_that_do_not_know_the_sample():
    class Odd:
        """Knows "0" alone; begins with 7, ends with 8."""

        def __init__(self, unknown: list[int]):
            self.unknown = unknown

        def __call__(self, text: str, add_special_tokens: bool = True, **_):
            inner = [3] if text == "0" else self.unknown if text else []
            return {"input_ids": [7, *inner, 8] if add_special_tokens else inner}

    assert surroundings(Odd([])) == surroundings(Odd([7])) == ([7], [8])


def test_records_begin_as_texts_do(beginning, tmp_path: Path):
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps({"prompt": "ba de", "completion": " fi"}))
    chosen = windows(beginning, *read_text(str(file)), n=1, length=16, seed=0)
    assert chosen.counted is not None
    assert chosen.tokens[0, 0] == 0 and not chosen.counted[0, 0] and chosen.counted.any()
    file.write_text(json.dumps({"prompt": "", "completion": "<s>ba de"}))  # a template that begins the answer itself
    chosen = windows(beginning, *read_text(str(file)), n=1, length=16, seed=0)
    assert chosen.tokens[0, 0] == 0 and chosen.tokens[0, 1] != 0


def test_seed(tokenizer, text_file: Path):
    first, again, other = (take(tokenizer, str(text_file), 8, 16, seed) for seed in (0, 0, 1))
    assert first.digest == again.digest and torch.equal(first.tokens, again.tokens)
    assert first.digest != other.digest and not torch.equal(first.tokens, other.tokens)


def test_drawing_leaves_the_global_generator_alone(tokenizer, text_file: Path):
    before = torch.get_rng_state()
    take(tokenizer, str(text_file))
    assert torch.equal(torch.get_rng_state(), before)


def test_fewer_windows_where_these_will_do(tokenizer, tmp_path: Path):
    texts, source = read_text(write(tmp_path, "txt", ["ba de fi ko " * 20]))
    chosen = windows(tokenizer, texts, source, n=1000, length=8, seed=0, at_most=True)
    assert 1 <= len(chosen.tokens) < 1000
    with pytest.raises(BadInput, match="too few"):
        windows(tokenizer, ["ba"], source, n=1000, length=8, seed=0, at_most=True)


def test_hub_dataset():
    """A name that is no file is asked of the hub, which the session's environment keeps offline."""
    with pytest.raises(BadInput, match=r"nobody/nothing: neither a local file nor a dataset that the hub gave: .*nobody"):
        read_text("nobody/nothing")


def test_bundled_text_needs_no_file(tokenizer):
    texts, source = read_text(None)
    assert source == "bundled/calibration"
    chosen = windows(tokenizer, texts, source, n=8, length=64, seed=0)
    assert chosen.tokens.shape == (8, 64)


def test_window_length(make_checkpoint):
    from compress.checkpoint import Checkpoint

    config = Checkpoint.open(make_checkpoint("llama")).config
    assert window_length(None, config) == 128  # the model's positions, fewer than the default
    assert window_length(100, config) == 100
    with pytest.raises(BadInput, match="129 tokens are longer than the model's 128 positions"):
        window_length(129, config)


def test_tokenizer_belongs_to_the_model(make_checkpoint):
    source = make_checkpoint("llama")
    n_tokens = len(load_tokenizer(source, 256))
    with pytest.raises(BadInput, match=f"the tokenizer has {n_tokens} tokens, the model embeds only {n_tokens - 1}"):
        load_tokenizer(source, n_tokens - 1)
