"""Formats: one file each. A module with a function ``export(source, out, *, overwrite)`` is a target of `compress export`."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules


def targets() -> dict[str, str]:
    """Export formats by name, with their modules."""
    found = {}
    for info in iter_modules(__path__):
        if hasattr(import_module(f"{__name__}.{info.name}"), "export"):
            found[info.name] = f"{__name__}.{info.name}"
    return found


def to(name: str, source: Path, out: Path, *, overwrite: bool = False) -> Path:
    """Export ``source`` in the format of that name. Raises BadInput for an unknown one."""
    from compress.errors import BadInput
    from compress.methods import did_you_mean

    known = targets()
    if name not in known:
        raise BadInput(f"--to {name}: unknown format{did_you_mean(name, known)}; formats: {', '.join(known)}")
    return import_module(known[name]).export(source, out, overwrite=overwrite)
