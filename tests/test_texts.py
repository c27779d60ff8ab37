"""Training text: records of which only the answer counts, and a part of every source that training never sees."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress.calibration import windows
from compress.errors import BadInput
from compress.texts import Record, Turn, read_text

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }};{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)
CHAT = [{"role": "user", "content": "ba de"}, {"role": "assistant", "content": "fi ko"}]


def rows_in(tmp_path, rows, name="rows.jsonl") -> str:
    file = tmp_path / name
    file.write_text("\n".join(map(json.dumps, rows)))
    return str(file)


@pytest.fixture
def chatty(tokenizer):
    before, tokenizer.chat_template = tokenizer.chat_template, TEMPLATE
    yield tokenizer
    tokenizer.chat_template = before


def counted_text(tokenizer, chosen) -> list[str]:
    return [tokenizer.decode(row[mask]) for row, mask in zip(chosen.tokens, chosen.counted, strict=True)]


def test_a_prompt_is_not_to_be_predicted_and_the_end_of_its_completion_is(tokenizer, tmp_path):
    data = rows_in(tmp_path, [{"prompt": "ba de ", "completion": "fi ko"}, {"prompt": "lu ", "completion": "ma"}])
    texts, source = read_text(data)
    chosen = windows(tokenizer, texts, source, n=1, length=24, seed=0)
    assert counted_text(tokenizer, chosen) == ["fi ko</s>ma</s>"]
    assert tokenizer.decode(chosen.tokens[0]).startswith("ba de fi ko</s>lu ma</s></s>")  # and is filled up
    assert chosen.tokens.shape == chosen.counted.shape == (1, 24) and chosen.counted.dtype == torch.bool


def test_conversations_are_written_as_the_template_does(chatty, tmp_path):
    again = [{"role": "user", "content": "lu"}, {"role": "assistant", "content": "ma"}]
    data = rows_in(tmp_path, [{"messages": CHAT + again}, {"prompt": CHAT + again[:1], "completion": again[1:]}])
    records, _ = read_text(data)
    whole = chatty.apply_chat_template(CHAT + again, tokenize=False)
    for record, answers in zip(records, (["fi ko;", "ma;"], ["ma;"]), strict=True):
        assert isinstance(record, Record)
        spans = record.spans(chatty)
        assert "".join(text for text, _ in spans) == whole
        assert [text for text, counted in spans if counted] == answers


def test_templates_that_cannot_say_which_turn_is_which_are_refused(chatty, tokenizer):
    record = Record((Turn("user", "ba", False), Turn("assistant", "de", True)))
    chatty.chat_template = "{{ messages | length }}"
    with pytest.raises(BadInput, match="rewrites earlier turns"):
        record.spans(chatty)
    chatty.chat_template = None
    with pytest.raises(BadInput, match="no chat template"):
        record.spans(chatty)


def test_a_plain_column_comes_first_and_all_of_it_counts(tokenizer, tmp_path):
    data = rows_in(tmp_path, [{"text": "ba de fi ko " * 9, "prompt": "x", "completion": "y"}])
    chosen = windows(tokenizer, *read_text(data), n=1, length=8, seed=0)
    assert chosen.counted is None
    mixed = rows_in(tmp_path, [{"text": "ba de fi ko " * 9}, {"prompt": "lu ", "completion": "ma"}])
    both = windows(tokenizer, *read_text(mixed), n=99, length=8, seed=0, at_most=True)
    assert both.counted is not None and both.counted.sum(1).lt(8).sum() == 1


def test_records_that_are_not_understood(tmp_path):
    for row, message in (
        ({"prompt": "x"}, "prompt: str.*`completion`"), ({"messages": [{"role": "user"}]}, "no text as its role"),
        ({"prompt": {"role": 1}, "completion": "y"}, "no text as its role"), (3, "it is int"),
    ):  # fmt: skip
        with pytest.raises(BadInput, match=message):
            read_text(rows_in(tmp_path, [row]))


@given(lengths=st.lists(st.tuples(st.integers(0, 12), st.integers(1, 12)), min_size=1, max_size=12), length=st.integers(2, 16))
def test_packing_keeps_records_whole_or_cuts_their_ends(lengths, length):
    """Every record that can be predicted from is there once, in order, beginning in one window."""

    class Words:
        eos_token_id, chat_template = 1, None

        def __call__(self, text, **_):
            return {"input_ids": [int(word) for word in text.split() if word.isdecimal()]}

    def text_of(number, n):
        return " ".join([str(number)] * n)

    records = [
        Record((Turn(None, text_of(2 * i + 2, n), False), Turn(None, text_of(2 * i + 3, m), True)))
        for i, (n, m) in enumerate(lengths)
    ]
    expected = [([2 * i + 2] * n + [2 * i + 3] * m + [1])[:length] for i, (n, m) in enumerate(lengths)]
    expected = [tokens for tokens, (n, _) in zip(expected, lengths, strict=True) if len(tokens) > max(n, 1)]
    if not expected:
        with pytest.raises(BadInput):
            windows(Words(), records, "records", n=1, length=length, seed=0, at_most=True)
        return
    chosen = windows(Words(), records, "records", n=10**4, length=length, seed=0, at_most=True)
    assert chosen.counted is not None
    rows = sorted(chosen.tokens.tolist(), key=lambda row: row[0])
    found = [token for row in rows for token in row if token != 1]
    assert found == [token for tokens in expected for token in tokens if token != 1]
    for tokens, mask in zip(chosen.tokens, chosen.counted, strict=True):
        assert not mask[(tokens % 2 == 0)].any() and mask[(tokens % 2 == 1) & (tokens > 1)].all()


# What is held out.


def test_parts_divide_the_rows_of_a_file(tmp_path):
    rows = [{"text": f"row {i}"} for i in range(400)] + [{"prompt": f"p {i}", "completion": "c"} for i in range(400)]
    data = rows_in(tmp_path, rows + rows[:50] + rows[-50:])
    everything, training, held_out = (list(read_text(data, part=part)[0]) for part in ("all", "training", "held_out"))
    assert not set(training) & set(held_out)  # equal rows are on one side
    assert set(training) | set(held_out) == set(everything) and len(training) + len(held_out) == len(everything)
    assert 20 < len(held_out) < 90
    backwards = rows_in(tmp_path, rows[::-1], "backwards.jsonl")
    assert set(read_text(backwards, part="held_out")[0]) == set(held_out)  # whatever else is in the file


def test_parts_divide_one_long_document(tokenizer, text_file, tmp_path):
    """Whatever the windows' length and number: no piece of text is in both, and calibration takes the training part."""
    file = tmp_path / "long.txt"
    text = text_file.read_text()
    file.write_text("".join(f"{number} {text[number * 997 % 20000 :][:3000]}" for number in range(100)))
    training, held_out = ("".join(read_text(str(file), part=part)[0]) for part in ("training", "held_out"))
    assert len(training) + len(held_out) == len(file.read_text()) and 0 < len(held_out) < len(training) / 4
    pieces = [file.read_text()[start : start + 4096] for start in range(0, len(file.read_text()), 4096)]
    assert all((piece in training) != (piece in held_out) for piece in pieces)


def test_a_dataset_by_the_hubs_own_reader(tmp_path):
    """A folder goes the way of a hub id, through `datasets`, and needs no network."""
    rows_in(tmp_path, [{"body": "ba de"}, {"body": "fi"}], "train.jsonl")
    texts, source = read_text(str(tmp_path), column="body")
    assert list(texts) == ["ba de", "fi"] and source == str(tmp_path)
