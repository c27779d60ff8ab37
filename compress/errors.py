"""How a run stops on purpose, which the command line maps to exit codes, and how other libraries' errors are put in a line."""

from typing import Any

from pydantic import ValidationError


class CompressError(Exception):
    """Something failed while working; exit code 1."""


class BadInput(CompressError, ValueError):
    """The request or its files are at fault: said before compute, with what to do; exit code 2."""


class GateMissed(CompressError):
    """The artifact was made but does not meet a condition; exit code 3. result: what was made or measured all the same."""

    def __init__(self, message: str, result: Any = None):
        super().__init__(message)
        self.result = result


def explain(error: Exception) -> str:
    """Any error as one line; of a pydantic error, which field, what is wrong, what was given."""
    if not isinstance(error, ValidationError):
        return " ".join(str(error).split()) or type(error).__name__
    parts = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        given = "" if item["type"] in ("missing", "value_error", "json_invalid") else f" (got {item['input']!r})"
        parts.append(f"{where + ': ' if where else ''}{message}{given}")
    return "; ".join(parts)
