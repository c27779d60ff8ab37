"""What an interrupted training run goes on from: one file, written aside and renamed, so that no crash can mix two states."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.optim import Optimizer

from compress.sharding import as_shared, whole
from compress.train_pass import TrainPass
from compress.trainable import TrainableLinear
from compress.weights import Weight
from compress.writer import save_tensors

logger = logging.getLogger(__name__)

STATE_FILE = "training.safetensors"
"""Parameters, AdamW's moments, chosen masks and codes, what passes remember, the best parameters and, in the header's metadata,
the losses so far and what all this belongs to."""


class Trainee(NamedTuple):
    """What is trained. parameters: by name; layers: whose fixed parts may be chosen anew, by name."""

    parameters: Mapping[str, nn.Parameter]
    layers: Mapping[str, TrainableLinear]
    optimizer: Optimizer


@dataclass
class Past:
    """What a run has behind it. losses: of every step. held_out: (steps done, loss on the windows that are not trained on).
    best: the parameters at the least of these, on the CPU, where they are wanted. memory: what the pass keeps by name."""

    losses: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)
    memory: dict[str, Tensor] = field(default_factory=dict)

    def measured(self, done: int, loss: float) -> bool:
        """Take in a loss on held-out windows; returns whether it is the least so far."""
        self.held_out.append((done, loss))
        return self.best_step == done

    @property
    def best_step(self) -> int:
        """Steps that were done when the loss on held-out windows was least."""
        return min(self.held_out, key=lambda entry: entry[1])[0]

    def stands_still(self, patience: int | None) -> bool:
        """Whether the last ``patience`` measurements were all no better than an earlier one."""
        return patience is not None and sum(done > self.best_step for done, _ in self.held_out) >= patience


class StateFile(NamedTuple):
    """path: of the file. fingerprint: of what it belongs to. save_every: so many steps."""

    path: Path
    fingerprint: str
    save_every: int

    def save(self, trainee: Trainee, past: Past, writes: bool) -> None:
        """Write what the next step depends on. All processes call it, of which one ``writes``."""
        tensors: dict[str, Tensor] = {}
        for name, value in trainee.parameters.items():
            moments = trainee.optimizer.state.get(value, {})
            for kind, part in {"parameter": value.detach(), **moments}.items():
                tensor = whole(part)  # one at a time, so that no device needs to have room for all that were shared out
                tensors |= {f"{kind}/{name}": tensor.cpu()} if writes else {}
        if not writes:
            return
        for name, layer in trainee.layers.items():
            if layer.chosen:
                tensors |= {f"fixed {number}/{name}": tensor.contiguous() for number, tensor in enumerate(layer.fixed)}
        tensors |= {f"best/{name}": value for name, value in past.best.items()}
        tensors |= {f"memory/{name}": value.contiguous() for name, value in past.memory.items()}
        header = {"fingerprint": self.fingerprint, "losses": past.losses, "held_out": past.held_out}
        aside = self.path.with_suffix(".part")
        save_tensors(tensors, aside, {"training": json.dumps(header)})
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        aside.replace(self.path)

    @torch.no_grad()
    def load(self, trainee: Trainee) -> Past:
        """Restore parameters, moments and what was chosen; the past is empty where nothing was saved."""
        if not self.path.exists():
            return Past()
        with safe_open(self.path, framework="pt") as file:
            header = json.loads(file.metadata()["training"])
            if header["fingerprint"] != self.fingerprint:
                logger.warning("%s belongs to other settings, data or weights: training starts anew", self.path)
                return Past()
            past = Past(header["losses"], [(done, loss) for done, loss in header["held_out"]])
            fixed: dict[str, dict[int, Tensor]] = {}
            for key in file.keys():  # noqa: SIM118 (not a dict)
                kind, _, name = key.partition("/")
                tensor = file.get_tensor(key)
                if kind.startswith("fixed "):
                    fixed.setdefault(name, {})[int(kind.removeprefix("fixed "))] = tensor
                elif kind == "best":
                    past.best[name] = tensor
                elif kind == "memory":
                    past.memory[name] = tensor.to(next(iter(trainee.parameters.values())).device)
                elif kind == "parameter":
                    trainee.parameters[name].copy_(as_shared(tensor, trainee.parameters[name]))
                else:  # AdamW keeps its step counts, scalars, on the CPU
                    parameter = trainee.parameters[name]
                    trainee.optimizer.state[parameter][kind] = as_shared(tensor, parameter) if tensor.dim() else tensor
        for name, tensors in fixed.items():
            trainee.layers[name].restore([tensors[number] for number in range(len(tensors))])
        return past


def fingerprint(weights: Mapping[str, Weight], tokens: Tensor, counted: Tensor | None, step: TrainPass, seed: int) -> str:
    """A digest of what a saved state belongs to: settings, data, and a row of every tensor of the weights."""
    digest = hashlib.sha256(json.dumps([step.method(), step.model_dump(mode="json"), seed, tokens.shape]).encode())
    for data in (tokens, counted):
        digest.update(b"" if data is None else data.cpu().numpy().tobytes())

    def add_first_row(tensor: Tensor) -> Tensor:
        digest.update(tensor[:1].contiguous().view(torch.uint8).cpu().numpy().tobytes())
        return tensor

    for name, weight in weights.items():
        digest.update(f"{name} {type(weight).__name__} {weight.shape}".encode())
        weight.map(add_first_row)
    return digest.hexdigest()
