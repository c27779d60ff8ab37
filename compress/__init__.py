"""compress: post-training compression of Hugging Face causal language models, end to end.

``Pipeline([Wanda(sparsity=0.5), GPTQ(bits=4)]).run(model, out)`` compresses, reloads, evaluates and charts a checkpoint.
Importing this package also registers the loader of artifacts whose shapes stock transformers cannot express, so that
``AutoModelForCausalLM.from_pretrained`` opens them without remote code.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# In a checkout the families lie beside this package, not inside it; an installed package has them as subpackages.
if not (Path(__file__).parent / "quant").is_dir():
    __path__.append(str(Path(__file__).parent.parent))

if TYPE_CHECKING:
    from compress import methods
    from compress.pipeline import Pipeline, Result, run
    from compress.recipe import Calibration, Evaluation, Recipe

__all__ = ["Calibration", "Evaluation", "Pipeline", "Recipe", "Result", "methods", "run"]

_HOMES = {
    "Pipeline": "pipeline", "Result": "pipeline", "run": "pipeline",
    "Recipe": "recipe", "Calibration": "recipe", "Evaluation": "recipe",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Public names are imported on first use; method classes (``from compress import GPTQ``) are found by discovery."""
    if name.startswith("__"):
        raise AttributeError(name)
    if name in _HOMES:
        return getattr(import_module(f"compress.{_HOMES[name]}"), name)
    if name[0].isupper():
        for method in import_module("compress.methods").available().values():
            if method.__name__ == name:
                return method
    raise AttributeError(f"module 'compress' has no attribute {name!r}")
