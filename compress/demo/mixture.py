"""The bundled text as the bundled model has met it: documents and biographies in turn.

Calibrating on the documents alone would tell a method that the weights which hold the biographies carry nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from compress.demo import corpus, world

BIOGRAPHY_SHARE = 0.2
"""Of all characters; about their share of the model's training text."""


def texts(split: str) -> Iterator[str]:
    """Documents of a split ("train", "calibration", "held_out"), each followed by biographies in proportion.

    Held-out text has none: every person is known from training.
    """
    random = Random(split)
    people = world.people()
    for _, document in corpus.documents(split):
        yield document
        wanted = 0 if split == "held_out" else len(document) * BIOGRAPHY_SHARE / (1 - BIOGRAPHY_SHARE)
        while wanted > 0:
            biography = world.biography(people[int(random.random() * len(people))], random)
            wanted -= len(biography)
            yield biography
