"""Discovery of methods: the file name is the registry.

``quant/gptq.py`` defines one public :class:`Pass`, ``GPTQ``, whose key is ``gptq``. A third party's package adds its own
through the entry point group ``compress.methods`` (``key = "package.module:Class"``). Nothing else needs to be edited.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pkgutil import iter_modules
from typing import Any, Literal, get_args, get_origin

from pydantic import ValidationError
from pydantic_core import PydanticUndefined

from compress.errors import BadInput, explain
from compress.passes import Pass, Taxon, format_value

FAMILIES = ("quant", "prune", "lowrank", "distill")


@cache
def available() -> dict[str, type[Pass]]:
    """Every installed method by its key, family by family, in alphabetical order."""
    found: dict[str, type[Pass]] = {}
    for family in FAMILIES:
        package = import_module(f"compress.{family}")
        for module_info in sorted(iter_modules(package.__path__), key=lambda info: info.name):
            module = import_module(f"{package.__name__}.{module_info.name}")
            for value in vars(module).values():
                if _is_method(value) and value.__module__ == module.__name__:
                    found[module_info.name] = value
    for entry in sorted(entry_points(group="compress.methods"), key=lambda entry: entry.name):
        found[entry.name] = entry.load()
    return found


def _is_method(value: object) -> bool:
    return inspect.isclass(value) and issubclass(value, Pass) and "taxon" in vars(value)


def get(key: str) -> type[Pass]:
    """The method of that key. Raises :class:`BadInput`, with the nearest name, where there is none."""
    methods = available()
    if key not in methods:
        raise BadInput(f"unknown method {key!r}{did_you_mean(key, methods)}; `compress methods` lists them all")
    return methods[key]


def build(key: str, settings: dict[str, Any]) -> Pass:
    """A configured pass. Raises :class:`BadInput` for an unknown method or key, or a value out of range."""
    method = get(key)
    for name in settings:
        if name not in method.model_fields:
            known = ", ".join(method.model_fields)
            raise BadInput(f"{key}: unknown option {name!r}{did_you_mean(name, method.model_fields)}; options: {known}")
    try:
        return method(**settings)
    except ValidationError as error:
        raise BadInput(f"{key}: {explain(error)}") from None


def with_effort(step: Pass, effort: str) -> Pass:
    """The pass with the settings of an effort ("fast", "default" or "best") for the options that nobody chose."""
    settings = {key: value for key, value in type(step).efforts.get(effort, {}).items() if key not in step.model_fields_set}
    return step.model_copy(update=settings) if settings else step


def parse(text: str) -> Pass:
    """Read ``name:key=value,key=value``, the form of a pass on the command line."""
    key, _, rest = text.partition(":")
    settings: dict[str, Any] = {}
    for item in filter(None, rest.split(",")):
        name, equals, value = item.partition("=")
        if not equals:
            raise BadInput(f"{text!r}: expected key=value after {key!r}:, got {item!r}")
        if name.strip() in settings:
            raise BadInput(f"{text!r}: option {name.strip()!r} is given twice")
        settings[name.strip()] = None if value.strip().lower() in ("none", "null") else value.strip()
    return build(key.strip(), settings)


def did_you_mean(word: object, known) -> str:
    """`` (did you mean 'x'?)`` or nothing."""
    close = get_close_matches(str(word), list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def options(method: type[Pass]) -> list[tuple[str, str, str]]:
    """(name, default, description) of every field of a method."""
    rows = []
    for name, field in method.model_fields.items():
        default = "required" if field.default is PydanticUndefined else _show(field.default)
        choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
        description = field.description or (f"one of {', '.join(map(str, choices))}" if choices else "")
        rows.append((name, default, description))
    return rows


def _show(value: object) -> str:
    return format_value(value) if value not in ((), "") else "-"


def _pairs(settings: dict[str, Any]) -> str:
    return ",".join(f"{name}={format_value(value)}" for name, value in settings.items())


def summary(method: type[Pass]) -> str:
    """First line of the method's file: its idea and citation."""
    module = import_module(method.__module__)
    return (inspect.getdoc(module) or inspect.getdoc(method) or "").split("\n\n")[0].replace("\n", " ")


def idea(method: type[Pass]) -> str:
    """What a method does, in a sentence without its name and citation."""
    return summary(method).partition(": ")[2].rsplit(" (", 1)[0].rstrip(".")


def markdown() -> str:
    """The method table of the README."""
    lines = ["| method | family | taxonomy leaf | idea | paper |", "|---|---|---|---|---|"]
    for key, method in available().items():
        family = method.__module__.split(".")[1] if method.__module__.startswith("compress.") else "plug-in"
        told = idea(method).replace("|", "\\|")
        paper = f"[{method.paper}](https://arxiv.org/abs/{method.paper})" if method.paper[:4].isdigit() else method.paper
        lines.append(f"| `{key}` | {family} | {method.taxon.value} | {told} | {paper} |")
    return "\n".join(lines)


def tree(keys: Sequence[str] = ()) -> str:
    """The survey's taxonomy with these methods (none: every one), their options and defaults. Raises :class:`BadInput` for an
    unknown one."""
    lines, shown = [], {key: get(key) for key in keys} or available()
    for taxon in Taxon:
        if members := {key: method for key, method in shown.items() if method.taxon == taxon}:
            lines.append(taxon.value)
        for key, method in members.items():
            lines.append(f"  {key}  {summary(method)}")
            lines += [f"      {name}={default}  {text}".rstrip() for name, default, text in options(method)]
            lines += [f"      --effort {effort}: {_pairs(settings)}" for effort, settings in method.efforts.items()]
    return "\n".join(lines)
