"""Read a checkpoint lazily and distrustfully: one tensor at a time, safetensors only, nothing outside its directory.

Names are the model's own state-dict names; what files call differently (a missing ``transformer.`` prefix, a tied head
stored instead of the embedding) is resolved here once.
"""

from __future__ import annotations

import copy
import logging
import shutil
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.arch import Architecture, architecture
from compress.errors import BadInput, explain
from compress.export.layers import LIBRARIES, NEEDED, Source, read_weight
from compress.manifest import Manifest
from compress.shards import Shards, digest_files, read_json
from compress.weights import KINDS, Composed, Lookup, Masked, Weight

log = logging.getLogger(__name__)

_LEGACY = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias")
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "README.md"]


class Checkpoint:
    """A Hugging Face causal-LM directory, read lazily.

    path: the directory. config: the configuration of the underlying architecture (an artifact's own wrapping removed).
    arch: its row in ``arch.py``. manifest: what compress did to it before, or None.
    """

    def __init__(self, path: Path, *, trust_remote_code: bool = False, allow_pickle: bool = False):
        self.path = path
        self.trust_remote_code, self.allow_pickle = trust_remote_code, allow_pickle
        self.raw_config = read_json(path / "config.json", "is not a Hugging Face model directory: config.json")
        self._refuse_remote_code()
        has_experts = any("expert" in key for key in self.raw_config) or "moe" in self.base_model_type
        self.arch: Architecture = architecture(self.base_model_type, self.raw_config, has_experts=has_experts)
        self._readers = Shards(path, allow_pickle)
        self.manifest = Manifest.read(path)
        self._check_quantization()

    @classmethod
    def open(cls, source: str | Path, **permissions: bool) -> Checkpoint:
        """Open a directory, a hub id or ``demo``. Raises :class:`BadInput` for what is missing, broken or unsafe."""
        return cls(resolve(source), **permissions)

    def __reduce__(self) -> Any:
        return _reopen, (self.path, self.trust_remote_code, self.allow_pickle)

    @property
    def base_model_type(self) -> str:
        """The architecture's model type, also of an artifact that carries a type of its own."""
        return str(self.raw_config.get("base_model_type") or self.raw_config.get("model_type") or "unknown")

    def _refuse_remote_code(self) -> None:
        own = self.raw_config.get("model_type") == "compress"  # opened by our own loader, its copy is never run
        if self.raw_config.get("auto_map") and not own and not self.trust_remote_code:
            raise BadInput(
                f"{self.path}: the checkpoint wants to run its own code (auto_map in config.json). If you trust it, pass "
                "--trust-remote-code; if transformers supports its model type natively, delete auto_map instead"
            )

    def _check_quantization(self) -> None:
        quantization = self.raw_config.get("quantization_config") or {}
        if not isinstance(quantization, dict):
            raise BadInput(f"{self.path / 'config.json'}: quantization_config is no JSON object: {quantization!r}")
        if quantization and quantization.get("quant_method") not in LIBRARIES:
            raise BadInput(
                f"{self.path}: already quantized by {quantization.get('quant_method')!r}, which compress does not read; "
                f"start from the unquantized checkpoint or one of {' or '.join(LIBRARIES)}"
            )

    @property
    def plain_config(self) -> dict[str, Any]:
        """``config.json`` of the underlying architecture, without what compress and quantizers have added to it."""
        raw = {key: value for key, value in self.raw_config.items() if key not in _ADDED}
        if "base_model_type" in self.raw_config:
            raw.pop("auto_map", None)
            raw |= {"model_type": self.base_model_type, "architectures": self.raw_config.get("base_architectures")}
        if any(spec["kind"] == "tied_head" for spec in self.reshaped.values()):
            raw["tie_word_embeddings"] = True
        return raw

    @cached_property
    def config(self) -> Any:
        """The transformers configuration of the underlying architecture."""
        from transformers import AutoConfig

        raw = self.plain_config
        if "auto_map" in raw:
            return AutoConfig.from_pretrained(self.path, trust_remote_code=self.trust_remote_code)
        kwargs = {key: value for key, value in raw.items() if key != "model_type"}
        try:
            return AutoConfig.for_model(self.base_model_type, **kwargs)
        except Exception as error:  # every kind of exception, depending on what is wrong with the values
            kind = f"not a valid {self.base_model_type} configuration"
            raise BadInput(f"{self.path / 'config.json'}: {kind}: {explain(error)}") from None

    @property
    def reshaped(self) -> dict[str, dict[str, Any]]:
        """Modules that differ from the architecture's own, as :func:`compress.weights.spec_of` describes them."""
        return self.raw_config.get("compress_modules", {})

    @property
    def structure(self) -> dict[str, dict[str, Any]]:
        """Modules that differ from the architecture's own in shape, or share their weights; see ``loader.restructure``."""
        return self.raw_config.get("compress_structure", {})

    def altered(self, config: dict[str, Any], structure: dict[str, dict[str, Any]]) -> Checkpoint:
        """The same files under another configuration: what a model is about to become. ``structure`` replaces its own."""
        other = copy.copy(self)
        for name in ("config", "quantization"):
            other.__dict__.pop(name, None)
        other.raw_config = self.raw_config | config | {"compress_structure": structure}
        return other

    @cached_property
    def quantization(self) -> dict[str, Any] | None:
        """The compressed-tensors configuration, or None."""
        return self.raw_config.get("quantization_config")

    @property
    def cache_scheme(self) -> dict[str, Any] | None:
        """How readers round keys and values before they are cached, as compressed-tensors says it; None: not at all."""
        return (self.quantization or {}).get("kv_cache_scheme")

    @property
    def keys(self) -> set[str]:
        """Tensor names as the files have them."""
        return set(self._readers.where)

    @cached_property
    def _prefix(self) -> str:
        return self.arch.blocks.split(".")[0] + "."

    def _key(self, name: str) -> str | None:
        """The file's name of a model tensor: itself, without the base model's prefix, or an alias of its architecture."""
        aliases = (other for own, other in self.arch.aliases if own == name)
        for candidate in (name, name.removeprefix(self._prefix), *aliases):
            if candidate in self._readers.where:
                return candidate
        return None

    @cached_property
    def tables(self) -> set[str]:
        """The modules outside the blocks, embeddings and head, that are compressed: their matrices are read as if dense."""
        names = {name.removesuffix(".weight_scale") for name in self.keys if name.endswith(".weight_scale")}
        blocks = (f"{self.arch.blocks}.", f"{self.arch.blocks}.".removeprefix(self._prefix))
        tables = {name for name, spec in self.reshaped.items() if issubclass(KINDS.get(spec["kind"], Composed), Lookup)}
        return tables | {name for name in names if not name.startswith(blocks)}

    def _table(self, name: str) -> str | None:
        module = name.removesuffix(".weight")
        return module if module in self.tables and name.endswith(".weight") else None

    def __contains__(self, name: str) -> bool:
        return self._key(name) is not None or self._table(name) is not None

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """One tensor, mapped from its file, in ``dtype`` (None: its own). Raises :class:`BadInput` where it is missing."""
        if table := self._table(name):
            return self.weight(table, (0, 0)).dense(dtype)
        return self._stored(name) if dtype is None else self._stored(name).to(dtype)

    def _stored(self, name: str) -> Tensor:
        key = self._key(name)
        if key is None:
            raise BadInput(f"{self.path}: tensor {name!r} is missing from the checkpoint")
        return self._readers.read(key)

    def meta(self, name: str) -> Tensor:
        """The tensor's shape and dtype, as a meta tensor, without reading it."""
        if table := self._table(name):
            return self.weight(table, (0, 0), meta=True).dense()
        return self._stored_meta(name)

    def _stored_meta(self, name: str) -> Tensor:
        key = self._key(name)
        if key is None:
            raise BadInput(f"{self.path}: tensor {name!r} is missing from the checkpoint")
        shape, dtype = self._readers.describe(key)
        return torch.empty(shape, dtype=dtype, device="meta")

    def weight(self, module: str, shape: tuple[int, int], *, conv1d: bool = False, meta: bool = False) -> Weight:
        """The linear layer ``module``, (out, in) by the configuration, in whatever representation the files hold; conv1d: a
        dense one is stored (in, out)."""

        def get(name: str) -> Tensor:
            return self._stored_meta(name) if meta and not name.endswith(NEEDED) else self._stored(name)

        masked = self.manifest.is_masked if self.manifest else (lambda _: False)
        source = Source(get, self.__contains__, self.quantization, masked)
        spec = self.reshaped.get(module)
        weight = read_weight(module, source, spec, shape, transposed=conv1d and spec is None)
        if meta and self.manifest and isinstance(weight, Masked):  # the mask's size is all that can be known of it unread
            return replace(weight, n_kept=self.manifest.modules[module].numel)
        return weight

    def check_complete(self, names: set[str], modules: set[str]) -> None:
        """Raise :class:`BadInput` unless every tensor of the model is there; names outside ``modules`` must be as named."""
        missing = sorted(name for name in names if name not in self)
        plain = (m for m in modules if self.reshaped.get(m, {"kind": "linear"})["kind"] == "linear")
        missing += sorted(m for m in plain if f"{m}.weight" not in self and f"{m}.weight_packed" not in self)
        if missing:
            shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
            raise BadInput(f"{self.path}: the checkpoint lacks {len(missing)} tensors of its model: {shown}")
        wanted = {self._key(name) for name in names}
        extra = [
            key for key in self.keys - wanted
            if not key.endswith(_LEGACY) and not any(f"{m}." in f"{self._prefix}{key}" or key.startswith(m) for m in modules)
        ]  # fmt: skip
        if extra:
            log.warning(
                "%s: %d tensors belong to no module and are left out: %s",
                self.path,
                len(extra),
                ", ".join(sorted(extra)[:3]),
            )

    def check_finite(self) -> None:
        """Read every floating-point tensor once; raises :class:`BadInput` naming the first with NaN or infinity."""
        for key in sorted(self.keys):
            tensor = self._readers.read(key)
            if tensor.is_floating_point() and tensor.numel():
                low, high = torch.aminmax(tensor.float() if tensor.itemsize == 1 else tensor)
                if not (torch.isfinite(low) and torch.isfinite(high)):
                    raise BadInput(f"{self.path}: tensor {key!r} contains NaN or infinite weights; the checkpoint is broken")
        self.unmap()

    def unmap(self) -> None:
        """Let go of the files' mappings, whose pages count as this process's; the next read maps them again."""
        self._readers.unmap()

    @cached_property
    def digest(self) -> str:
        """SHA-256 over config and weight files, in the order of their names."""
        return digest_files([self.path / "config.json", *self._readers.files])

    @property
    def files(self) -> list[Path]:
        """The weight files, in the order of their names."""
        return self._readers.files

    @property
    def nbytes(self) -> int:
        """Bytes of the weight files."""
        return sum(file.stat().st_size for file in self._readers.files)

    def copy_companions(self, destination: Path) -> None:
        """Copy tokenizer, generation config and the like, but no weights, code, or what compress writes itself."""
        for file in sorted(self.path.iterdir()):
            if (file.is_file() and file.name in _COMPANIONS) or file.name.startswith(("tokenizer", "special_tokens")):
                shutil.copyfile(file, destination / file.name)


_ADDED = ("quantization_config", "compress_modules", "compress_structure", "base_model_type", "base_architectures")
_COMPANIONS = (
    "generation_config.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja",
    "chat_template.json", "spiece.model", "sentencepiece.bpe.model", "LICENSE", "LICENSE.txt", "NOTICE",
)  # fmt: skip


def resolve(source: str | Path, *, cached: bool = False) -> Path:
    """A local directory for a path, a hub id or ``demo``. cached: of what the hub gave before, and nothing else. Raises
    :class:`BadInput` where there is none."""
    if str(source) == "demo":
        from compress.demo import MODEL

        return MODEL
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or str(source).startswith((".", "~")) or str(source).count("/") > 1 or path.exists():
        raise BadInput(f"{source}: no such model directory")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), allow_patterns=_HUB_FILES, local_files_only=cached))
    except Exception as error:  # the hub client raises a dozen kinds, all of which mean the same to the user
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BadInput(f"{source}: neither a local directory nor a model that the hub gave: {reason}") from None


def _reopen(path: Path, trust_remote_code: bool, allow_pickle: bool) -> Checkpoint:
    """What a checkpoint is for another process: its files."""
    return Checkpoint(path, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle)
