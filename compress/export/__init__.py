"""Formats: one file each. A module with a function ``export(source, out, *, overwrite)`` is a target of `compress export`.

Where the function takes a ``variant`` too, that is what follows a colon: `--to gguf:q4_0`. Where the module has a true
``ROUNDS_INPUTS``, its readers round what enters layers.
"""

from __future__ import annotations

import logging
from importlib import import_module
from inspect import signature
from pathlib import Path
from pkgutil import iter_modules

log = logging.getLogger(__name__)


def targets() -> dict[str, str]:
    """Export formats by name, with their modules."""
    found = {}
    for info in iter_modules(__path__):
        if hasattr(import_module(f"{__name__}.{info.name}"), "export"):
            found[info.name] = f"{__name__}.{info.name}"
    return found


def to(name: str, source: Path, out: Path, *, overwrite: bool = False) -> Path:
    """Export ``source`` in the format of that name, ``FORMAT`` or ``FORMAT:VARIANT``. Raises BadInput for an unknown one."""
    from compress.errors import BadInput
    from compress.methods import did_you_mean

    known, (target, _, variant) = targets(), name.partition(":")
    if target not in known:
        raise BadInput(f"--to {name}: unknown format{did_you_mean(target, known)}; formats: {', '.join(known)}")
    _check_shapes(target, source)
    module = import_module(known[target])
    _warn_of_losses(target, source, getattr(module, "ROUNDS_INPUTS", False))
    export = module.export
    if not variant:
        return export(source, out, overwrite=overwrite)
    if "variant" not in signature(export).parameters:
        raise BadInput(f"--to {name}: {target} has no variants")
    return export(source, out, overwrite=overwrite, variant=variant)


def _check_shapes(target: str, source: Path) -> None:
    from compress.checkpoint import Checkpoint
    from compress.errors import BadInput

    kinds = {spec["kind"] for spec in Checkpoint(source).structure.values()}
    if "shortcut" in kinds:
        raise BadInput(
            f"{source}: its residual stream changes its basis between layers, which no other format holds; slicegpt with "
            "shared=true keeps one basis, and leaves an ordinary model"
        )
    if target != "decilm" and kinds - {"shared"}:
        raise BadInput(
            f"{source}: its blocks have shapes of their own, which {target} does not hold; --to decilm does for Llamas, and "
            "methods with uniform=true leave all blocks alike where transformers takes the numbers"
        )


def _warn_of_losses(target: str, source: Path, rounds_inputs: bool) -> None:
    from compress.checkpoint import Checkpoint

    checkpoint = Checkpoint(source)
    groups = (checkpoint.quantization or {}).get("config_groups", {}).values()
    rounded = any(group.get("input_activations") for group in groups)
    lost = ["the rounding of inputs"] * (rounded and not rounds_inputs)
    lost += ["the rounding of the KV cache"] * bool(checkpoint.cache_scheme)
    if lost:
        log.warning("%s: %s holds weights only, %s is left out", source, target, " and ".join(lost))
