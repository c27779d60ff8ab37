"""Numbers with units, as people read and type them."""

from __future__ import annotations

import re

from compress.errors import BadInput

_NUMBER = r"\s*([0-9]{0,18}\.?[0-9]{1,18}%s)\s*%s\s*"
_DECIMAL = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9, "t": 10**12}
_BINARY = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_bytes(text: str, option: str) -> int:
    """``2.5GB``, ``800MiB`` or a plain number as bytes. Raises :class:`BadInput`, which names the option."""
    match = re.fullmatch(_NUMBER % ("", "([kmgt]?|[kmgt]i)b?"), text.lower())
    if match is None:
        raise BadInput(f"{option}: {text!r} is no size; write 2.5GB, 800MB, 1GiB or a number of bytes")
    return int(float(match[1]) * (_DECIMAL | _BINARY)[match[2]])


def parse_tokens(text: str) -> int:
    """``15T``, ``300B``, ``1.2e13`` or a plain number as tokens, at least one. Raises :class:`BadInput`."""
    match = re.fullmatch(_NUMBER % (r"(?:e\+?[0-9]{1,2})?", "([kmgbt]?)"), text.lower().replace("_", ""))
    tokens = int(float(match[1]) * _DECIMAL[match[2]]) if match is not None else 0
    if tokens < 1:
        raise BadInput(f"{text!r} is no number of tokens; write 15T, 300B, 1.2e13 or all digits")
    return tokens


def format_count(number: float) -> str:
    """A number of parameters or tokens to three figures: 8.03B."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"
