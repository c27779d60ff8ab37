"""How well do the linear layers of a compressed checkpoint reproduce the outputs of the dense model's?

For each layer, |(W - Q) X|^2 / |W X|^2, X being the inputs that the layer has in the *dense* model on the calibration
tokens, W its weight and Q what any library made of it, dequantized here from its files. The same function reads
every library's artifact: plain weights, the compressed-tensors format, and GPTQ's own.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from compress.checkpoint import Checkpoint
from compress.export.layers import Source, read_weight
from compress.skeleton import Skeleton
from compress.stats import LinearStats

BATCH = 8


class Artifact:
    """The weights of a compressed directory, as float32 matrices (out, in)."""

    def __init__(self, directory: Path):
        self.quantization = json.loads((directory / "config.json").read_text()).get("quantization_config")
        self.files = [safe_open(file, framework="pt") for file in sorted(directory.glob("*.safetensors"))]
        self.where = {key: file for file in self.files for key in file.keys()}  # noqa: SIM118

    def tensor(self, name: str) -> Tensor:
        """One tensor of the files."""
        return self.where[name].get_tensor(name)

    def matrix(self, name: str) -> Tensor:
        """The matrix that the layer ``name`` computes with."""
        if f"{name}.qweight" in self.where:
            return self._gptq(name)
        return read_weight(name, Source(self.tensor, self.where.__contains__, self.quantization)).dense(torch.float32)

    def _gptq(self, name: str) -> Tensor:
        """GPTQ's format: codes packed along the inputs, zero points along the outputs and, in version 1, less one."""
        bits = self.quantization["bits"]
        packed, zeros = self.tensor(f"{name}.qweight"), self.tensor(f"{name}.qzeros")
        scales, groups = self.tensor(f"{name}.scales").float(), self.tensor(f"{name}.g_idx").long()
        shifts = torch.arange(0, 32, bits)
        codes = (packed.unsqueeze(1) >> shifts.view(1, -1, 1) & (1 << bits) - 1).flatten(0, 1)
        zero_points = (zeros.unsqueeze(2) >> shifts & (1 << bits) - 1).flatten(1)
        if self.quantization.get("checkpoint_format", "gptq") == "gptq":
            zero_points = zero_points + 1
        return ((codes - zero_points[groups]) * scales[groups]).T.contiguous()


@torch.no_grad()
def reconstruction_errors(model: Path, tokens: Tensor, artifacts: dict[str, Path]) -> dict[str, float]:
    """The mean over all linear layers of their relative output error, for each artifact by name."""
    skeleton = Skeleton(Checkpoint(model))
    opened = {name: Artifact(path) for name, path in artifacts.items()}
    found: dict[str, list[float]] = {name: [] for name in artifacts}
    hidden = list(skeleton.embed(list(tokens.split(BATCH))))
    for index in range(len(skeleton.blocks)):
        block = skeleton.load_block(index, skeleton.read_weights(index))
        gathered = {group: LinearStats(_inputs(block, group[0]), {"hessian"}) for group in skeleton.arch.groups}
        handles = [
            block.get_submodule(group[0]).register_forward_pre_hook(lambda _, inputs, stats=stats: stats.add(inputs[0]))
            for group, stats in gathered.items()
        ]
        hidden = [skeleton.run_block(index, rows) for rows in hidden]
        for handle in handles:
            handle.remove()
        for group, stats in gathered.items():
            hessian = stats.finish().hessian
            for local in group:
                dense = block.get_submodule(local).weight
                energy = ((dense @ hessian) * dense).sum()
                for name, artifact in opened.items():
                    change = artifact.matrix(skeleton.module_name(index, local)) - dense
                    found[name].append(float(((change @ hessian) * change).sum() / energy))
        skeleton.free_block(index)
    return {name: sum(values) / len(values) for name, values in found.items()}


def _inputs(block: nn.Module, local: str) -> int:
    return block.get_submodule(local).in_features  # type: ignore[return-value]
