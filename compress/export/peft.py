"""Split an artifact into a model and the low-rank changes beside its layers, as an adapter that peft opens.

The model loses what made its layers sums: a grid with a correction becomes an ordinary quantized layer, which runtimes know, and
many of them serve adapters in peft's format beside it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from compress.artifact import artifact_config, copy_loader
from compress.errors import BadInput
from compress.export import dense, layers
from compress.records import Streamed, describe, grids
from compress.skeleton import Skeleton
from compress.weights import Dense, LowRank, Sum, Weight
from compress.writer import write_text

ADAPTER = "adapter"
CONFIG_FILE, TENSOR_FILE, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
"""The names that peft gives to the files of an adapter, and what it puts before the names of a model's modules."""


@torch.no_grad()
def export(source: Path, out: Path, *, overwrite: bool = False) -> Path:
    """Write the model without its low-rank changes into ``out``, and these into ``out/adapter``:
    ``PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(out), out / "adapter")`` computes what ``source`` does. On
    packed grids peft puts no adapter: they are opened with ``CompressedTensorsConfig(run_compressed=False)`` for it.

    Raises BadInput where ``out`` exists, and where no layer has such a change.
    """

    def beside(skeleton: Skeleton, directory: Path) -> None:
        _write_adapter(skeleton, out, directory / ADAPTER)
        if "auto_map" in json.loads((directory / "config.json").read_text()):
            copy_loader(directory)

    return dense.write("peft", source, out, _config, _block, overwrite=overwrite, beside=beside)


def parted(weight: Weight) -> tuple[Weight, LowRank | None]:
    """A layer without the low-rank change beside it, and that change, of which both factors are dense; None: it has none."""
    parts = weight.parts if isinstance(weight, Sum) else ()
    change = next((p for p in parts if isinstance(p, LowRank) and isinstance(p.down, Dense) and isinstance(p.up, Dense)), None)
    if change is None or len(parts) < 2:
        return weight, None
    rest = tuple(part for part in parts if part is not change)
    return (rest[0] if len(rest) == 1 else Sum(rest)), change


def _config(skeleton: Skeleton) -> dict[str, Any]:
    checkpoint, found = skeleton.checkpoint, _weights(skeleton)
    bases = {name: parted(weight)[0] for name, weight in found.items()}
    if all(bases[name] is weight for name, weight in found.items()):
        raise BadInput(
            f"{checkpoint.path}: no layer has a low-rank change beside it; loftq leaves such, lora with merge=false or on grids"
        )
    quantized = grids(bases | skeleton.tables())
    skeleton.mixed = layers.library(quantized).is_mixed(quantized, checkpoint.cache_scheme)
    streamed = Streamed({}, {}, {}, (torch.empty(0), torch.empty(0)), cache=checkpoint.cache_scheme)
    for name, weight in bases.items():
        weight = skeleton.settled(weight)
        streamed.add(name, weight, describe(name, weight, weight, [], None), skeleton.is_conv1d(_local(skeleton, name)))
    streamed.add_tables(skeleton.tables(), {}, skeleton.tied_head())
    return artifact_config(skeleton, streamed)


def _block(skeleton: Skeleton, index: int) -> dict[str, torch.Tensor]:
    tensors = {name: skeleton.checkpoint.tensor(skeleton.file_name(name)) for name in skeleton.block_names(index)}
    for local, weight in skeleton.read_weights(index).items() if index not in skeleton.owners else ():
        base = skeleton.settled(parted(weight)[0])
        tensors |= layers.tensors(skeleton.module_name(index, local), base, transposed=skeleton.is_conv1d(local))
    return tensors


def _weights(skeleton: Skeleton) -> dict[str, Weight]:
    """All linear layers, of meta tensors, by full name."""
    own = [index for index in range(len(skeleton.blocks)) if index not in skeleton.owners]
    read = {index: skeleton.read_weights(index, meta=True) for index in own}
    return {skeleton.module_name(i, local): weight for i, found in read.items() for local, weight in found.items()}


def _local(skeleton: Skeleton, name: str) -> str:
    return name.removeprefix(f"{skeleton.arch.blocks}.").partition(".")[2]


def _write_adapter(skeleton: Skeleton, base: Path, directory: Path) -> None:
    """The changes of all layers, each scaled by 1."""
    directory.mkdir(exist_ok=True)
    changes: dict[str, LowRank] = {}
    for index in range(len(skeleton.blocks)):
        for local, weight in skeleton.read_weights(index).items() if index not in skeleton.owners else ():
            if (change := parted(weight)[1]) is not None:
                changes[skeleton.module_name(index, local)] = change
    ranks = {name: change.rank for name, change in changes.items()}
    rank = max(ranks.values())
    smaller = {name: own for name, own in ranks.items() if own != rank}
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base.resolve()), "inference_mode": True,
        "r": rank, "lora_alpha": rank, "rank_pattern": smaller, "alpha_pattern": smaller, "target_modules": sorted(changes),
        "lora_dropout": 0.0, "bias": "none", "use_rslora": False,
        "fan_in_fan_out": any(skeleton.is_conv1d(local) for local in skeleton.arch.linears),
    }  # fmt: skip
    write_text(directory / CONFIG_FILE, json.dumps(config, indent=2) + "\n")
    tensors = {f"{PREFIX}{name}.lora_A.weight": change.down.dense().contiguous() for name, change in changes.items()}
    tensors |= {f"{PREFIX}{name}.lora_B.weight": change.up.dense().contiguous() for name, change in changes.items()}
    save_file(tensors, directory / TENSOR_FILE, {"format": "pt"})
