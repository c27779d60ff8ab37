"""The models that quantizers are compared on, and the one evaluator of whatever a library makes of their weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from quality import GROUP_SIZES
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compress.calibration import load_tokenizer, read_text, window_length, windows

SAMPLES, LENGTH, HELD_OUT_WINDOWS, BATCH = 128, 256, 64, 8
LOGITS_AGREE = 0.02  # largest difference, as a share of the logits' standard deviation: gptqmodel's are float16's
ON_GRID = 0.02  # of a step: what float16 products of codes and scales may miss an integer by


@dataclass(frozen=True)
class Setting:
    """One quantization of a model: the same for all contenders."""

    bits: int
    group_size: int
    symmetric: bool
    seed: int

    @property
    def name(self) -> str:
        """A file's name."""
        return f"{self.bits}bit-group{self.group_size}-{'symmetric' if self.symmetric else 'asymmetric'}-seed{self.seed}"


@dataclass
class Subject:
    """A model with its texts (None: bundled) and its directory in the work directory."""

    name: str
    source: Path
    held_out: str | None
    calibration: str | None
    work: Path

    @cached_property
    def path(self) -> Path:
        """The checkpoint in float32 as transformers writes it, which every peer can read."""
        path = self.work / "models" / self.name
        if not (path / "tokenizer_config.json").exists():
            from transformers import AutoModelForCausalLM, AutoTokenizer

            AutoModelForCausalLM.from_pretrained(self.source, dtype=torch.float32).save_pretrained(path)
            AutoTokenizer.from_pretrained(self.source).save_pretrained(path)
        return path

    @cached_property
    def model(self) -> nn.Module:
        """The dense model."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.path, dtype=torch.float32).eval()

    @cached_property
    def dense(self) -> dict[str, Tensor]:
        """Its own weights."""
        return {name: value.clone() for name, value in self.model.state_dict().items()}

    @cached_property
    def layers(self) -> list[str]:
        """Names of the linear layers that are quantized."""
        return [name for name, layer in self.model.named_modules() if isinstance(layer, nn.Linear) and name != "lm_head"]

    @cached_property
    def groups(self) -> list[int]:
        """The group sizes that divide every layer's inputs, else -1 for whole rows."""
        widths = {self.dense[f"{name}.weight"].shape[1] for name in self.layers}
        return [size for size in GROUP_SIZES if all(width % size == 0 for width in widths)] or [-1]

    def tokens(self, seed: int) -> Path:
        """The calibration windows of a seed: those that compress draws with that seed."""
        path = self.work / "tokens" / f"{self.name}-{seed}.safetensors"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            texts, origin = read_text(self.calibration)
            tokenizer = load_tokenizer(self.path, self.model.config.vocab_size)
            chosen = windows(tokenizer, texts, origin, n=SAMPLES, length=LENGTH, seed=seed)
            save_file({"tokens": chosen.tokens}, path, metadata={"sha256": chosen.digest})
        return path

    @cached_property
    def judged_on(self) -> Tensor:
        """The held-out windows."""
        texts, origin = read_text(self.held_out, bundled="held_out")
        tokenizer, config = load_tokenizer(self.path, self.model.config.vocab_size), self.model.config
        length = window_length(None, config)
        return windows(tokenizer, texts, origin, n=HELD_OUT_WINDOWS, length=length, seed=0, at_most=True).tokens

    @torch.no_grad()
    def perplexity(self, tensors: dict[str, Tensor]) -> float:
        """Of the model with those of its weights replaced."""
        self.model.load_state_dict(self.dense | tensors)
        total, n_tokens = 0.0, 0
        for rows in self.judged_on.split(BATCH):
            logits = self.model(input_ids=rows, use_cache=False).logits[:, :-1].flatten(0, 1)
            total += float(nn.functional.cross_entropy(logits, rows[:, 1:].flatten(), reduction="sum"))
            n_tokens += rows[:, 1:].numel()
        return math.exp(total / n_tokens)

    @torch.no_grad()
    def disagreement(self, tensors: dict[str, Tensor], seed: int, logits: Tensor) -> float:
        """How far the contender's own logits are from those of its matrices, in standard deviations."""
        self.model.load_state_dict(self.dense | tensors)
        mine = self.model(input_ids=load_file(self.tokens(seed))["tokens"][: len(logits)], use_cache=False).logits
        return float((mine - logits).abs().max() / mine.std())

    def judge(self, dump: dict[str, Tensor], setting: Setting) -> dict[str, Any]:
        """Perplexity and true bits of what a contender made of the weights."""
        given = {name: value for name, value in dump.items() if name in self.dense and name != "lm_head.weight"}
        found: dict[str, Any] = {}
        if "logits" in dump:
            found["disagreement"] = self.disagreement(given, setting.seed, dump["logits"])
            if not found["disagreement"] < LOGITS_AGREE:
                raise ValueError(f"the weights read back are not what the library computes with: {found['disagreement']:.3g}")
        n_weights, n_bits = 0, 0.0
        for name in self.layers:
            weight, scale = given[f"{name}.weight"], dump[f"{name}.scale"]
            given[f"{name}.weight"] = on_half_scales(name, weight, scale, setting)
            n_weights += weight.numel()
            n_bits += setting.bits * weight.numel() + (16 + (0 if setting.symmetric else setting.bits)) * scale.numel()
        return found | {"bits_per_weight": n_bits / n_weights, "perplexity": self.perplexity(given)}


def on_half_scales(name: str, weight: Tensor, scale: Tensor, setting: Setting) -> Tensor:
    """A matrix with its scales rounded to float16. Raises ValueError where it is not on the grid that was asked for."""
    size = weight.shape[1] if setting.group_size == -1 else setting.group_size
    if scale.shape != (len(weight), weight.shape[1] // size):
        raise ValueError(f"{name}: scales {tuple(scale.shape)} for a matrix {tuple(weight.shape)} in groups of {size}")
    steps = weight.unflatten(1, (-1, size)) / scale.unsqueeze(2)
    codes = steps.round()
    if not float((steps - codes).abs().max()) < ON_GRID:
        raise ValueError(f"{name}: weights are {float((steps - codes).abs().max()):.3g} of a step off their grid")
    span = int((codes.amax(2).clamp(min=0) - codes.amin(2).clamp(max=0)).max())
    if span > 2**setting.bits - 1:
        raise ValueError(f"{name}: {span + 1} levels in a group, {setting.bits} bits have {2**setting.bits}")
    return (codes * scale.half().float().unsqueeze(2)).flatten(1)
