"""A seeded world of invented people, whose facts a small model can learn and damage can erase.

Held-out text measures how well a model predicts; it says little about what the model *knows*. Following "Physics of
Language Models: Part 3.3, Knowledge Capacity Scaling Laws" (Allen-Zhu and Li, 2404.05405), each person has a handful
of attributes drawn from pools, told again and again in changing words and order. Recall of those facts is a
multiple-choice task with a known ceiling. Only `Random.random` is used, which is stable across Python versions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import TypeVar


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FIRST_NAMES = _words(
    """Anaya Briar Cedric Dalia Edmund Farah Gideon Hester Ivo Jolene Kasper Lavinia Magnus Nadia Osric Petra Quentin
    Rosalind Silas Tamsin Ursula Viggo Wilhelmina Xander Yara Zeno Alma Boris Clio Dmitri Elspeth Fabian Greta
    Hugo Imogen Jasper Kiran Leonie Milo Nerissa Otto Paloma Rafael Sabine Tobias Una Vera Winston Ximena Yusuf"""
)
LAST_NAMES = _words(
    """Forth Abernathy Bellweather Crane Dunmore Eastlake Fairchild Grimshaw Holloway Ingram Jessop Kestrel Lockhart
    Marlowe Northcott Oakhurst Pemberton Quill Ravenscroft Stroud Thackeray Underhill Vance Whitlock Yarrow
    Zimmer Ashdown Birch Calloway Drummond Ellery Finch Garrick Hawthorne Ives Juniper Kirkwood Langley Merrick
    Nightingale Orchard Prescott Quarles Radcliffe Sterling Tolliver Upton Vesper Wexford Yates"""
)
CITIES = _words(
    """Lisbon Oslo Nairobi Kyoto Lima Prague Dublin Cairo Hanoi Quito Vienna Tunis Seoul Warsaw Accra Bergen Havana
    Geneva Manila Dakar Boston Turin Riga Perth Bogota Athens Lagos Zagreb Osaka Denver"""
)
YEARS = tuple(str(year) for year in range(1931, 1991))
FIELDS = _words(
    """botany astronomy linguistics chemistry sculpture economics geology medicine music philosophy law architecture
    physics history zoology statistics theology agronomy optics robotics genetics poetry surveying metallurgy
    nursing ecology logic journalism painting oceanography"""
)
EMPLOYER_NAMES = _words(
    """Amber Northern Silver Harbor Crimson Granite Willow Atlas Falcon Meridian Copper Lantern Orchid Summit Velvet
    Beacon Juniper Pioneer Cobalt Maple Thunder Ivory Compass Juggler Saffron Glacier Raven Prairie Cedar Comet
    Opal Anchor"""
)
TRADES = _words("Airlines Press Shipping Bank Motors Books Hotels Radio")
EMPLOYERS = tuple(f"{name} {TRADES[index % len(TRADES)]}" for index, name in enumerate(EMPLOYER_NAMES))
INSTRUMENTS = _words(
    """violin cello oboe trumpet harp guitar piano flute banjo clarinet accordion mandolin trombone viola drums organ
    lute bassoon saxophone zither tuba harmonica ukulele xylophone bagpipes piccolo cornet sitar fiddle recorder"""
)

POOLS = {"city": CITIES, "year": YEARS, "field": FIELDS, "employer": EMPLOYERS, "instrument": INSTRUMENTS}
TEMPLATES = {
    "city": (
        "{subject} was born in the city of {value}.",
        "{subject} grew up in {value}.",
        "{subject} comes from {value}.",
    ),
    "year": (
        "{subject} was born in the year {value}.",
        "{subject} is a child of {value}.",
        "{subject} has been here since {value}.",
    ),
    "field": (
        "{subject} took a degree in {value}.",
        "{subject} studied the subject of {value}.",
        "{subject} knows all about {value}.",
    ),
    "employer": (
        "{subject} worked for {value}.",
        "{subject} made a career at {value}.",
        "{subject} has a desk at {value}.",
    ),
    "instrument": (
        "{subject} learned to play the {value}.",
        "{subject} gave concerts on the {value}.",
        "{subject} owns a {value}.",
    ),
}
N_PEOPLE = 200
WORLD_SEED = 2024

Item = TypeVar("Item")


@dataclass(frozen=True)
class Person:
    """One invented person: a unique full name, a pronoun, and one value for every attribute in `POOLS`."""

    name: str
    pronoun: str
    facts: tuple[tuple[str, str], ...]


def people(n: int = N_PEOPLE, seed: int = WORLD_SEED) -> list[Person]:
    """Return `n` people with distinct full names; a longer list begins with the shorter one of the same seed.

    Raises `ValueError` when `n` exceeds half of the possible names, past which drawing distinct ones gets slow.
    """
    if 2 * n > len(FIRST_NAMES) * len(LAST_NAMES):
        raise ValueError(f"at most {len(FIRST_NAMES) * len(LAST_NAMES) // 2} people have distinct names, not {n}")
    random = Random(seed)
    found: dict[str, Person] = {}
    while len(found) < n:
        name = f"{_pick(FIRST_NAMES, random)} {_pick(LAST_NAMES, random)}"
        pronoun = _pick(("He", "She"), random)
        facts = tuple((attribute, _pick(pool, random)) for attribute, pool in POOLS.items())
        found.setdefault(name, Person(name, pronoun, facts))
    return list(found.values())


def biography(person: Person, random: Random) -> str:
    """Tell every fact of a person once: random order, random templates, one sentence each.

    The first sentence names the person in full; a later one does so four times in five, else it uses the pronoun.
    Sentences are joined by blanks or by line breaks, so that a fact is often met as a line of its own.
    """
    sentences = []
    for attribute, value in _shuffled(person.facts, random):
        named = not sentences or random.random() < 0.8
        template = _pick(TEMPLATES[attribute], random)
        sentences.append(template.format(subject=person.name if named else person.pronoun, value=value))
    return (" " if random.random() < 0.5 else "\n").join(sentences)


def questions(n: int, seed: int = 0, n_choices: int = 4, world: Sequence[Person] | None = None) -> list[dict[str, object]]:
    """Return `n` multiple-choice questions about `world` (default: `people()`), as even as possible over attributes.

    Each is a dict of `context` (a sentence in a template of the biographies, up to its value), `choices` (`n_choices`
    distinct values of the attribute's pool, each with its leading blank), `gold` (index of the true one) and
    `attribute`. No fact is asked twice. Raises `ValueError` when `n` exceeds the number of facts.
    """
    world = people() if world is None else world
    if n > len(world) * len(POOLS):
        raise ValueError(f"{len(world)} people have {len(world) * len(POOLS)} facts, fewer than {n}")
    random = Random(seed)
    asked: list[dict[str, object]] = []
    for attribute_index, attribute in enumerate(POOLS):
        share = n // len(POOLS) + (attribute_index < n % len(POOLS))
        asked += [_question(person, attribute, n_choices, random) for person in _shuffled(world, random)[:share]]
    return _shuffled(asked, random)


def _question(person: Person, attribute: str, n_choices: int, random: Random) -> dict[str, object]:
    value = dict(person.facts)[attribute]
    wrong = [other for other in _shuffled(POOLS[attribute], random) if other != value][: n_choices - 1]
    choices = _shuffled([value, *wrong], random)
    context = _pick(TEMPLATES[attribute], random).format(subject=person.name, value="").removesuffix(" .")
    return {
        "context": context,
        "choices": [f" {choice}" for choice in choices],
        "gold": choices.index(value),
        "attribute": attribute,
    }


def _pick(items: Sequence[Item], random: Random) -> Item:
    return items[int(random.random() * len(items))]


def _shuffled(items: Sequence[Item], random: Random) -> list[Item]:
    return [item for _, _, item in sorted((random.random(), index, item) for index, item in enumerate(items))]
