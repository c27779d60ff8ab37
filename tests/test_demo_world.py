"""The demo's world, corpus, tasks and bundled checkpoint: reproducible, consistent, without leaks, and good enough."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

import pytest

from compress.demo import MODEL, corpus, world

# The world must be the same for every Python version, or the bundled checkpoint would know the wrong facts.
WORLD_DIGEST = "42b0ea8ce3924188ccfa4b66e5d63b8d28465db4c46287138bb0f6dfb8539f7c"


def test_world_is_the_pinned_one() -> None:
    everyone = world.people()
    random = Random(7)
    told: list[Any] = [[person.name, person.pronoun, person.facts] for person in everyone]
    told += [world.biography(person, random) for person in everyone]
    told += world.questions(400)
    assert hashlib.sha256(json.dumps(told).encode()).hexdigest() == WORLD_DIGEST


def test_people_are_distinct_and_extend() -> None:
    everyone = world.people(100)
    assert len({person.name for person in everyone}) == 100
    assert everyone[:40] == world.people(40)
    assert everyone != world.people(100, seed=1)
    with pytest.raises(ValueError, match="distinct names"):
        world.people(10_000)


def test_pools_hold_no_value_twice() -> None:
    for pool in (*world.POOLS.values(), world.FIRST_NAMES, world.LAST_NAMES):
        assert len(pool) == len(set(pool))


def test_biography_tells_every_fact_and_names_the_person_first() -> None:
    for index, person in enumerate(world.people(50)):
        told = world.biography(person, Random(index))
        assert told.startswith(person.name)
        assert told.count(".") == len(world.POOLS)
        assert all(value in told for _, value in person.facts)


def test_questions_agree_with_the_people() -> None:
    facts = {person.name: dict(person.facts) for person in world.people()}
    asked: list[dict[str, Any]] = world.questions(403)
    for question in asked:
        name = " ".join(question["context"].split()[:2])
        attribute, choices = question["attribute"], question["choices"]
        assert choices[question["gold"]] == f" {facts[name][attribute]}"
        assert len(set(choices)) == len(choices) == 4
        assert {choice[1:] for choice in choices} <= set(world.POOLS[attribute])
        sentence = question["context"] + choices[question["gold"]] + "."
        assert sentence in {
            template.format(subject=name, value=facts[name][attribute]) for template in world.TEMPLATES[attribute]
        }
    shares = Counter(question["attribute"] for question in asked).values()
    assert len(asked) == 403 and max(shares) - min(shares) <= 1
    assert max(Counter(question["gold"] for question in asked).values()) < 150


def test_too_many_questions_are_refused() -> None:
    with pytest.raises(ValueError, match="facts"):
        world.questions(11, world=world.people(2))


def test_splits_are_disjoint_by_subject() -> None:
    subjects = {split: {name.split("/", 1)[1] for name, _ in corpus.documents(split)} for split in corpus.SPLITS}
    assert not subjects["held_out"] & subjects["train"]
    assert subjects["calibration"] and subjects["calibration"] <= subjects["train"]
    with pytest.raises(ValueError, match="unknown split"):
        corpus.documents("test")


def test_held_out_text_is_nowhere_in_training() -> None:
    train = corpus.text("train")
    for name, body in corpus.documents("held_out"):
        pieces = [body[start : start + 300] for start in range(0, len(body) - 300, 900)]
        assert sum(piece in train for piece in pieces) <= 0.1 * len(pieces), name


def test_sources_come_without_their_docstrings() -> None:
    found = {name: body for split in ("train", "held_out") for name, body in corpus.documents(split)}
    assert "Text wrapping and filling." in found["docstrings/textwrap"]
    assert "Text wrapping and filling." not in found["sources/textwrap"]
    assert "class TextWrapper:" in found["sources/textwrap"]


def test_text_is_deterministic_and_cut_by_bytes() -> None:
    assert corpus.text("calibration", 1000) == corpus.text("calibration")[:1000]
    assert len(corpus.text("train", 1001).encode()) <= 1001


def test_tasks_are_written_with_absolute_data_paths(tmp_path: Path) -> None:
    from compress.demo import tasks

    assert tasks.write_tasks(tmp_path / "tasks") == ["demo_facts", "demo_text"]
    facts = [json.loads(line) for line in (tmp_path / "tasks/demo_facts.jsonl").read_text().splitlines()]
    texts = [json.loads(line)["text"] for line in (tmp_path / "tasks/demo_text.jsonl").read_text().splitlines()]
    assert len(facts) == tasks.N_FACTS and all(2000 <= len(body.encode()) < 4000 for body in texts)
    for name in ("demo_facts", "demo_text"):
        assert json.dumps(str(tmp_path / "tasks" / f"{name}.jsonl")) in (tmp_path / f"tasks/{name}.yaml").read_text()


@lru_cache(maxsize=1)
def checkpoint() -> tuple[Any, Any]:
    """Return the bundled model in float32 and its tokenizer."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32, local_files_only=True)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(MODEL, local_files_only=True)


def test_checkpoint_is_small_and_tokenizer_is_lossless() -> None:
    assert (MODEL / "model.safetensors").stat().st_size < 10_000_000
    _, tokenizer = checkpoint()
    sample = "def naïve(x):\n\treturn x  # \u20ac\n"
    assert tokenizer.decode(tokenizer.encode(sample, add_special_tokens=False)) == sample


def test_checkpoint_beats_gzip_on_held_out_text() -> None:
    from compress.demo import measure

    model, tokenizer = checkpoint()
    texts = [body[:5000] for name, body in corpus.documents("held_out") if len(body) > 5000][:4]
    assert len(texts) == 4
    yardstick = measure.compressor_bits_per_byte("\n\n".join(texts))
    assert measure.bits_per_byte(model, tokenizer, texts) < 0.85 * yardstick["gzip"]


def test_checkpoint_knows_the_facts() -> None:
    from compress.demo import measure

    model, tokenizer = checkpoint()
    assert measure.fact_accuracy(model, tokenizer, world.questions(100))["all"] > 0.9
