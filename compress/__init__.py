"""compress: post-training compression of Hugging Face causal language models, end to end.

``Pipeline([Wanda(sparsity=0.5), GPTQ(bits=4)]).run(model, out)`` compresses, reloads, evaluates and charts a checkpoint.
Importing this package also registers the loader of artifacts whose shapes stock transformers cannot express, so that
``AutoModelForCausalLM.from_pretrained`` opens them without remote code.
"""

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# In a checkout the families lie beside this package, not inside it; an installed package has them as subpackages.
if not (Path(__file__).parent / "quant").is_dir():
    __path__.append(str(Path(__file__).parent.parent))

if TYPE_CHECKING:
    from compress import methods
    from compress.opening import open_stack
    from compress.pipeline import Pipeline, Result, run
    from compress.recipe import Calibration, Evaluation, Recipe

_AUTO_CONFIG = "transformers.models.auto.configuration_auto"


class _Registration(MetaPathFinder):
    """Imports ``compress.registration`` as soon as transformers' AutoConfig is imported.

    To import them here would cost seconds, also where nothing but the command line's help is wanted.
    """

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname != _AUTO_CONFIG:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: Any) -> None:
                execute(module)
                import_module("compress.registration")

            spec.loader.exec_module = execute_and_register
        return spec


if _AUTO_CONFIG in sys.modules:
    import_module("compress.registration")
else:
    sys.meta_path.insert(0, _Registration())

__all__ = ["Calibration", "Evaluation", "Pipeline", "Recipe", "Result", "methods", "open_stack", "run"]

_HOMES = {
    "Pipeline": "pipeline", "Result": "pipeline", "run": "pipeline",
    "open_stack": "opening",
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
