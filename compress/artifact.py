"""Turn finished blocks into a complete Hugging Face directory: config, weights, tokenizer, manifest."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from torch import nn

from compress.checkpoint import digest_files
from compress.export import layers
from compress.journal import OUTER, block_part
from compress.manifest import Manifest
from compress.records import Streamed
from compress.skeleton import Skeleton
from compress.weights import KINDS
from compress.writer import BlockStore, write_text

CARRIED = ("stored_layers.py", "stored_codebooks.py", "stored_binary.py", "stored_stacks.py", "stored_tables.py")
"""What ``loader.py`` imports, and artifacts therefore carry beside it."""
_AUTO_MAP = {
    "AutoConfig": "modeling_compress.CompressConfig",
    "AutoModelForCausalLM": "modeling_compress.CompressForCausalLM",
}


def write_artifact(destination: Path, skeleton: Skeleton, streamed: Streamed, store: BlockStore, manifest: Manifest) -> Manifest:
    """Assemble ``destination`` from a finished stage and return its completed manifest, whose file is written last."""
    shutil.rmtree(destination, ignore_errors=True)
    destination.mkdir(parents=True)
    checkpoint = skeleton.checkpoint
    parts = [OUTER, *(block_part(i) for i in range(len(skeleton.blocks)))]
    files = store.assemble(parts, destination)
    write_text(destination / "config.json", json.dumps(artifact_config(skeleton, streamed), indent=2) + "\n")
    checkpoint.copy_companions(destination)
    if streamed.reshaped or checkpoint.structure:
        copy_loader(destination)
    manifest = complete(manifest, skeleton, streamed)
    manifest.nbytes = sum(file.stat().st_size for file in files)
    manifest.weights_digest = digest_files(files)
    manifest.write(destination)
    return manifest


def copy_loader(destination: Path) -> None:
    """Put the code there that opens modules which transformers does not know."""
    for own, name in {"loader.py": "modeling_compress.py", **{each: each for each in CARRIED}}.items():
        shutil.copyfile(Path(__file__).with_name(own), destination / name)


def artifact_config(skeleton: Skeleton, streamed: Streamed) -> dict[str, Any]:
    """``config.json``: the source's, with what its readers must know about quantization and changed modules."""
    checkpoint = skeleton.checkpoint
    config = checkpoint.plain_config
    if streamed.reshaped or checkpoint.structure:
        config |= {
            "model_type": "compress",
            "architectures": ["CompressForCausalLM"],
            "auto_map": _AUTO_MAP,
            "base_model_type": checkpoint.base_model_type,
            "base_architectures": config.get("architectures"),
            "compress_structure": dict(sorted(checkpoint.structure.items())),
            "compress_modules": dict(sorted(streamed.reshaped.items())),
        }
    if any(spec["kind"] == "tied_head" for spec in streamed.reshaped.values()):
        config["tie_word_embeddings"] = False  # there is nothing left for transformers to tie
    config |= streamed.config
    if streamed.quantized or streamed.cache:
        dense = _dense_linears(skeleton, streamed)
        library = layers.library(streamed.quantized)
        config["quantization_config"] = library.quantization_config(streamed.quantized, dense, streamed.cache)
    return config


def _dense_linears(skeleton: Skeleton, streamed: Streamed) -> list[str]:
    """Linear modules of the artifact that are not packed, by the names that a reader sees."""
    prefix = skeleton.arch.blocks + "."
    names = [n for n, m in skeleton.model.named_modules() if isinstance(m, nn.Linear) and not n.startswith(prefix)]
    for name in skeleton.linear_names():
        names += plain_linears(name, streamed.reshaped.get(name))
    return [name for name in names if name not in streamed.quantized]


def plain_linears(name: str, spec: dict[str, Any] | None) -> list[str]:
    """The plain linear modules that a layer with that ``compress_modules`` entry consists of."""
    if spec is None or spec["kind"] == "linear":
        return [name]
    shapes, specs = KINDS[spec["kind"]].child_shapes((0, 0), spec), spec.get("children", {})
    return [module for child in shapes for module in plain_linears(f"{name}.{child}", specs.get(child))]


def complete(manifest: Manifest, skeleton: Skeleton, streamed: Streamed) -> Manifest:
    """Fill in what the stage found: module records, tier and sizes."""
    names = [name for name in skeleton.outer_names() if name.removesuffix(".weight") not in streamed.tables]
    outer = [skeleton.checkpoint.meta(skeleton.outer_source(name)) for name in names]
    outer += [
        skeleton.checkpoint.meta(skeleton.file_name(name))
        for i in range(len(skeleton.blocks))
        for name in skeleton.block_names(i)
    ]
    outer_numel = sum(tensor.numel() for tensor in outer)
    outer_bytes = sum(tensor.numel() * tensor.element_size() for tensor in outer)
    records = [*streamed.records.values(), *streamed.tables.values()]
    shim = streamed.reshaped or skeleton.checkpoint.structure
    return manifest.model_copy(
        update={
            "modules": streamed.records,
            "tables": streamed.tables,
            "tier": "shim" if shim else "native-quantized" if streamed.quantized or streamed.cache else "native",
            "parameters": outer_numel + sum(record.numel for record in records),
            "dense_parameters": outer_numel + sum(record.shape[0] * record.shape[1] for record in records),
            "ideal_nbytes": outer_bytes + sum(record.ideal_nbytes for record in records),
        }
    )


def carry_records(streamed: Streamed, earlier: Manifest | None) -> None:
    """Let a module's record name the passes of earlier stages and runs too."""
    if earlier is None:
        return
    known = earlier.modules | earlier.tables
    for name, record in (streamed.records | streamed.tables).items():
        if before := known.get(streamed.origins.get(name, name)):
            record.passes = before.passes + record.passes
            record.dense_nbytes = before.dense_nbytes
            if record.weight_error is None:
                record.weight_error, record.output_error = before.weight_error, before.output_error
