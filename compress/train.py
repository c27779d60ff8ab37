"""The training loop: one, on accelerate, for every method that trains what compression has left of a model.

A compressed layer is trained *in its representation*: :class:`TrainableLinear` holds float32 masters of what the
representation may move (kept values, factors, the scales of a grid) and rebuilds the matrix from them at every forward.
Masks, ranks and codes are not parameters, so no step can break them and none has to repair them. For a quantized matrix
this is E2E-QP, the second phase of EfficientQAT (2407.11062): integers frozen, scales trained.

Models run in eval mode: the student is fitted to a fixed function, so dropout would only add noise, and without it
nothing here draws random numbers except the order of the sequences. A run that was interrupted therefore resumes from
its state file and ends with the same bits.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from safetensors import safe_open
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from compress.errors import BadInput, CompressError
from compress.progress import Progress
from compress.rollouts import Rollouts
from compress.train_pass import Batch, Signal, TrainPass
from compress.trainable import TrainableFactors, TrainableLinear, trainable_layers, write_back
from compress.weights import Weight
from compress.writer import save_tensors

logger = logging.getLogger(__name__)

Parameters = Mapping[str, nn.Parameter]
Layers = Mapping[str, TrainableLinear]
STATE_FILE = "training.safetensors"
"""Parameters, AdamW's moments, chosen masks and, in the header's metadata, the losses so far and what they belong to."""


class TrainResult(NamedTuple):
    """weights: the trained representations, in their storage dtypes. history: loss of every step, in nats per token."""

    weights: dict[str, Weight]
    history: list[float]


def train(
    student: PreTrainedModel,
    weights: Mapping[str, Weight],
    teacher: PreTrainedModel | None,
    tokens: Tensor,
    step: TrainPass,
    *,
    seed: int,
    device: str,
    directory: Path,
    progress: Progress,
    save_every: int = 50,
    counted: Tensor | None = None,
) -> TrainResult:
    """Train a compressed model.

    student: a causal language model with all parameters in memory; trained in float32, with forward passes in bfloat16
    on a GPU that has it. Afterwards its linear layers hold the dense values of the returned weights, and its other
    trained parameters their new values, in their own dtypes. weights: the representation of each linear layer by the
    full name of its module: an nn.Linear, a Conv1D, or for a low-rank weight a module with ``down`` and ``up``.
    teacher: the uncompressed model, given back unchanged; None where the pass does not need one.
    tokens: (n, length) int64; sequences are drawn without replacement, permutation after permutation. counted: of the same
    shape, bool, the tokens that are to be predicted; None: all of them, but for the first of each sequence.
    device: "cpu", "cuda", ...; of several processes (accelerate launch) each takes its own, and a share of the batches.
    directory: the state is saved there every ``save_every`` steps; a rerun with equal arguments resumes from it, and
    after the last step returns at once. The caller deletes it.

    Raises BadInput when the teacher is missing, batches cannot be shared or the model's head is not understood, and
    CompressError when the loss or its gradient is not finite (the student's norms and biases are then spoilt).
    """
    if step.needs.teacher and teacher is None:
        raise BadInput(f"{step.method()} needs the uncompressed model as a teacher, and none was given")
    if tokens.shape[0] == 0 or tokens.shape[1] < 2:
        raise BadInput(f"{step.method()} predicts a token from those before it: tokens {tuple(tokens.shape)} hold none")
    directory.mkdir(parents=True, exist_ok=True)
    state = _State(directory / STATE_FILE, _fingerprint(weights, tokens, step, seed), save_every)
    with ExitStack() as stack:
        accelerator = stack.enter_context(_accelerator(torch.device(device)))
        place = accelerator.device if accelerator.num_processes > 1 else torch.device(device)
        layers = stack.enter_context(trainable_layers(student, weights, place))
        stack.enter_context(_borrowed(student, place, torch.float32))
        _check_head(student, tokens[:1, :8].to(place))
        if teacher is not None:
            stack.enter_context(_borrowed(teacher, place))
            _check_head(teacher, tokens[:1, :8].to(place))
        objective = _Objective(student, teacher, step, tokens[:1, :8].to(place))
        history = _run(accelerator, objective, Batch(tokens, counted), seed, state, progress)
        trained = {name: layer.trained() for name, layer in layers.items()}
    for name, weight in trained.items():
        write_back(student.get_submodule(name), weight, layers[name].bias)
    return TrainResult(trained, history)


def head_of(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """The function from final hidden states (..., d) to logits (..., vocabulary) that the model's forward applies.

    Beside the output matrix: Cohere and Granite scale their logits, Gemma caps them softly at ``cap * tanh(x / cap)``.
    """
    config = model.config.get_text_config()
    if (output := model.get_output_embeddings()) is None:
        raise BadInput(f"a {config.model_type} model has no output head to train with")
    scale = getattr(config, "logit_scale", None)
    if scale is None and config.model_type.startswith("granite"):
        scale = 1 / config.logits_scaling
    cap = getattr(config, "final_logit_softcapping", None)

    def head(hidden: Tensor) -> Tensor:
        logits = output(hidden)
        if scale is not None:
            logits = logits * scale
        return logits if cap is None else torch.tanh(logits / cap) * cap

    return head


class _Objective(nn.Module):
    """A batch -> the loss of predicting its tokens: one module, so that processes can share it.

    tokens: (1, length), any, to see by how wide the models are.
    """

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel | None, step: TrainPass, tokens: Tensor):
        super().__init__()
        self.student, self.teacher, self.step = student, teacher, step
        with torch.no_grad():
            self.aids = step.aids(*(self._widths(model, tokens) for model in (student, teacher)))
        if self.aids is not None:
            self.aids.to(tokens.device)

    def _widths(self, model: PreTrainedModel | None, tokens: Tensor) -> tuple[int, ...]:
        if model is None or not self.step.needs.states:
            return ()
        return tuple(state.shape[-1] for state in _signal(model, Batch(tokens), states=True).states)

    def forward(self, batch: Batch) -> Tensor:
        states, teacher_signal = self.step.needs.states, None
        if self.teacher is not None:
            with torch.no_grad():
                teacher_signal = _signal(self.teacher, batch, states)
        return self.step.loss(_signal(self.student, batch, states), teacher_signal, batch._replace(aids=self.aids))


def _signal(model: PreTrainedModel, batch: Batch, states: bool = False) -> Signal:
    output = model.get_decoder()(input_ids=batch.tokens, use_cache=False, output_hidden_states=states)
    hidden = batch.before_predicted(output.last_hidden_state)
    return Signal(hidden, head_of(model), tuple(map(batch.before_predicted, output.hidden_states)) if states else ())


@torch.no_grad()
def _check_head(model: PreTrainedModel, tokens: Tensor) -> None:
    """Raise BadInput unless the hidden states and the head that training uses give the model's own logits."""
    signal = _signal(model, Batch(tokens))
    ours = signal.head(signal.hidden).float()
    theirs = model(input_ids=tokens, use_cache=False).logits[:, :-1].flatten(0, 1).float()
    if not torch.allclose(ours, theirs, rtol=0, atol=0.02 * float(theirs.abs().max()), equal_nan=True):
        raise BadInput(f"training does not know how a {model.config.model_type} model computes its logits")


def _run(
    accelerator: Accelerator, objective: _Objective, data: Batch, seed: int, state: _State, progress: Progress
) -> list[float]:
    """Train what asks for gradients in the objective's student, from the saved state if there is one."""
    step, student = objective.step, objective.student
    groups = _parameter_groups(student, step)
    parameters = {name: value for name, value in student.named_parameters() if value.requires_grad}
    if parameters and objective.aids is not None:
        groups.append({"params": list(objective.aids.parameters()), "share": 1.0, "weight_decay": 0.0})
        parameters |= {f"aids.{name}": value for name, value in objective.aids.named_parameters()}
    layers = {name: module for name, module in student.named_modules() if isinstance(module, TrainableLinear)}
    if not parameters:
        raise BadInput(f"{step.label()}: nothing in the model is trained by that; use trains=blocks, or other targets")
    optimizer = torch.optim.AdamW(groups, lr=step.learning_rate)
    history = _load_state(state, parameters, layers, optimizer)
    if history:
        progress(len(history), step.steps, "resumed")
    batches = _batches(len(data.tokens), step, seed, accelerator)
    rollouts = Rollouts(student, objective.teacher, seed)
    model, optimizer = accelerator.prepare(objective, optimizer)
    for index in range(len(history), step.steps):
        for group in optimizer.param_groups:
            group["lr"] = group["share"] * step.learning_rate_at(index)
        _choose(step, index, layers)
        loss = torch.zeros((), device=next(iter(parameters.values())).device)
        for rows in batches[index]:
            part_loss = model(_prepared(step, data, rows, index, rollouts, loss.device)) / step.accumulate
            accelerator.backward(part_loss)
            loss += part_loss.detach()
        done, mean_loss = index + 1, float(accelerator.reduce(loss, "mean"))  # type: ignore[arg-type]
        norm = float(accelerator.clip_grad_norm_(parameters.values(), step.gradient_clip))  # type: ignore[arg-type]
        if not (math.isfinite(mean_loss) and math.isfinite(norm)):
            raise CompressError(
                f"{step.method()}: loss {mean_loss:g}, gradient norm {norm:g} at step {done} of {step.steps}; "
                f"try a smaller learning rate, such as learning_rate={step.learning_rate / 10:g}"
            )
        optimizer.step()
        optimizer.zero_grad()
        history.append(mean_loss)
        if accelerator.is_main_process and (done % state.save_every == 0 or done == step.steps):
            _save_state(state, parameters, layers, optimizer, history)
        progress(done, step.steps, f"loss {mean_loss:.4f}")
    return history


@torch.no_grad()
def _prepared(step: TrainPass, data: Batch, rows: Tensor, index: int, rollouts: Rollouts, device: torch.device) -> Batch:
    counted = None if data.counted is None else data.counted[rows].to(device)
    return step.prepare(Batch(data.tokens[rows].to(device), counted, index), rollouts)


def _choose(step: TrainPass, index: int, layers: Layers) -> None:
    """Let the pass say what each matrix is trained under from here on."""
    for layer in layers.values():
        values = layer.values
        mask = None if values is None else step.choose(index, values, layer.earlier)
        if mask is not None:
            layer.choose(mask)


def _batches(n_sequences: int, step: TrainPass, seed: int, accelerator: Accelerator) -> Tensor:
    """This process's sequences: (steps, accumulate, sequences), drawn from seeded permutations in a row."""
    n_shares = step.accumulate * accelerator.num_processes
    if step.batch_size % n_shares:
        raise BadInput(f"batch_size={step.batch_size} is not a multiple of accumulate x processes, {n_shares}")
    generator = torch.Generator().manual_seed(seed)
    n_drawn = step.steps * step.batch_size
    permutations = [torch.randperm(n_sequences, generator=generator) for _ in range(math.ceil(n_drawn / n_sequences))]
    order = torch.cat(permutations)[:n_drawn]
    return order.view(step.steps, step.accumulate, accelerator.num_processes, -1)[:, :, accelerator.process_index]


def _parameter_groups(student: nn.Module, step: TrainPass) -> list[dict[str, Any]]:
    """AdamW's groups of what ``step.trains`` names, asking for its gradients; norms and biases have one dimension.

    Adam moves every parameter by about the learning rate. A move of a scale is multiplied by codes up to 2**(bits-1),
    so with a "share" of 2**(1-bits) of the rate no weight moves faster than one that is trained directly.
    """
    layers = {name: module for name, module in student.named_modules() if isinstance(module, TrainableLinear)}
    factors = [name for name, module in student.named_modules() if isinstance(module, TrainableFactors)]
    groups = []
    for name, layer in layers.items():
        if step.trains_layer(name) and (step.trains != "factors" or name.startswith(tuple(f"{each}." for each in factors))):
            for master, share in layer.shares():
                groups.append({"params": [master], "share": share, "weight_decay": step.weight_decay if share == 1 else 0.0})
    masters = {master for group in groups for master in group["params"]}
    every_master = {master for layer in layers.values() for master in layer.masters}
    dimensions = {"factors": (), "weights": (), "blocks": (1,), "everything": (0, 1, 2, 3)}[step.trains]
    rest = [value for value in student.parameters() if value not in every_master and value.dim() in dimensions]
    for parameter in chain(masters, rest):
        parameter.data = parameter.data.clone()  # a loader may have given both models the same memory
        parameter.requires_grad_(True)
    return [*groups, {"params": rest, "share": 1.0, "weight_decay": 0.0}]


@contextmanager
def _borrowed(model: nn.Module, device: torch.device, dtype: torch.dtype | None = None) -> Iterator[None]:
    """Move the model, in eval mode and frozen; afterwards its mode and its tensors' places and flags are as before."""
    mode = model.training
    before = [(t, t.device, t.dtype, t.requires_grad) for t in chain(model.parameters(), model.buffers())]
    model.eval().requires_grad_(False).to(device=device, dtype=dtype)
    try:
        yield
    finally:
        model.train(mode)
        for tensor, home, storage, requires_grad in before:
            tensor.grad = None
            tensor.data = tensor.data.to(home, storage)
            tensor.requires_grad_(requires_grad)


@contextmanager
def _accelerator(device: torch.device) -> Iterator[Accelerator]:
    """An Accelerator, and no trace of it: accelerate's process-wide dictionaries are put back afterwards."""
    shared = [state._shared_state for state in (AcceleratorState, PartialState, GradientState)]
    before = [dict(state) for state in shared]
    try:
        for state in shared:
            state.clear()
        precision = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "no"
        yield Accelerator(cpu=device.type == "cpu", mixed_precision=precision, device_placement=False)
    finally:
        for state, values in zip(shared, before, strict=True):
            state.clear()
            state.update(values)


class _State(NamedTuple):
    path: Path
    fingerprint: str
    save_every: int


def _fingerprint(weights: Mapping[str, Weight], tokens: Tensor, step: TrainPass, seed: int) -> str:
    """A digest of what a saved state belongs to: settings, data, and a row of every tensor of the weights."""
    digest = hashlib.sha256(json.dumps([step.method(), step.model_dump(mode="json"), seed, tokens.shape]).encode())
    digest.update(tokens.cpu().numpy().tobytes())

    def add_first_row(tensor: Tensor) -> Tensor:
        digest.update(tensor[:1].contiguous().view(torch.uint8).cpu().numpy().tobytes())
        return tensor

    for name, weight in weights.items():
        digest.update(f"{name} {type(weight).__name__} {weight.shape}".encode())
        weight.map(add_first_row)
    return digest.hexdigest()


def _save_state(state: _State, parameters: Parameters, layers: Layers, optimizer: Optimizer, history: list[float]) -> None:
    """Write what the next step depends on, aside and then in place; one file, so that no crash can mix two states."""
    tensors = {f"parameter/{name}": value.detach() for name, value in parameters.items()}
    for name, value in parameters.items():
        tensors |= {f"{key}/{name}": moment for key, moment in optimizer.state.get(value, {}).items()}
    tensors |= {f"mask/{name}": layer.chosen for name, layer in layers.items() if layer.chosen is not None}
    aside = state.path.with_suffix(".part")
    save_tensors(tensors, aside, {"training": json.dumps({"fingerprint": state.fingerprint, "history": history})})
    with aside.open("rb") as file:
        os.fsync(file.fileno())
    aside.replace(state.path)


@torch.no_grad()
def _load_state(state: _State, parameters: Parameters, layers: Layers, optimizer: Optimizer) -> list[float]:
    """Restore parameters, moments and masks; returns the losses of the steps that are done, [] where nothing was saved."""
    if not state.path.exists():
        return []
    with safe_open(state.path, framework="pt") as file:
        header = json.loads(file.metadata()["training"])
        if header["fingerprint"] != state.fingerprint:
            logger.warning("%s belongs to other settings, data or weights: training starts anew", state.path)
            return []
        for key in file.keys():  # noqa: SIM118 (not a dict)
            kind, _, name = key.partition("/")
            tensor = file.get_tensor(key)
            if kind == "mask":
                layers[name].choose(tensor.to(layers[name].masters[0].device))
                continue
            parameter = parameters[name]
            if kind == "parameter":
                parameter.copy_(tensor)
            else:  # AdamW keeps its step counts, scalars, on the CPU
                optimizer.state[parameter][kind] = tensor.to(parameter.device) if tensor.dim() else tensor
    return header["history"]
