"""The training loop: one, on accelerate, for every method that trains what compression has left of a model.

A compressed layer is trained *in its representation*: :class:`TrainableLinear` holds float32 masters of what the
representation may move (kept values, factors, the scales of a grid) and rebuilds the matrix from them at every forward.
Masks, ranks and codes are not parameters, so no step can break them and none has to repair them; a pass that wants others
says so between steps, by ``TrainPass.choose``. For a quantized matrix this is E2E-QP, the second phase of EfficientQAT
(2407.11062): integers frozen, scales trained.

Models run in eval mode: the student is fitted to a fixed function, so dropout would only add noise, and without it
nothing here draws random numbers except the order of the sequences. A run that was interrupted therefore resumes from
its state file and ends with the same bits.

A step's loss is the mean over all tokens that it predicts: parts of a batch, and the shares of processes, count by how many of
these they have. So neither changes what is computed, but for the order of a sum.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from compress.allocator import give_back_large_blocks
from compress.errors import BadInput, CompressError
from compress.processes import asks_for_shares, environment
from compress.progress import RESUMED, Progress
from compress.rollouts import Rollouts
from compress.sharding import as_shared, sharded, whole
from compress.signals import check_head, signal_of
from compress.teacher import CachedTeacher
from compress.train_pass import Batch, TrainPass
from compress.trainable import TrainableFactors, TrainableLinear, recomputed_blocks, trainable_layers, write_back
from compress.training_state import STATE_FILE, Past, StateFile, Trainee, fingerprint
from compress.weights import LowRank, Weight, spec_of

Teacher = PreTrainedModel | CachedTeacher


class TrainResult(NamedTuple):
    """weights: the trained representations, in their storage dtypes. history: loss of every step, in nats per token.
    held_out: (steps done, loss on the windows that were held out). n_steps: those behind the weights, fewer than there were where
    an early stop went back to the best."""

    weights: dict[str, Weight]
    history: list[float]
    held_out: list[tuple[int, float]]
    n_steps: int

    def summary(self) -> dict[str, Any]:
        """What an artifact says about it, as plain JSON values; ``loss`` is the last step's."""
        found: dict[str, Any] = {"steps": self.n_steps, "loss": self.history[-1]}
        if self.held_out:
            found |= {"held_out_loss": dict(self.held_out)[self.n_steps], "held_out": self.held_out}
        return found


def train(
    student: PreTrainedModel,
    weights: Mapping[str, Weight],
    teacher: Teacher | None,
    tokens: Tensor,
    step: TrainPass,
    *,
    seed: int,
    device: str,
    directory: Path,
    progress: Progress,
    save_every: int = 50,
    counted: Tensor | None = None,
    tasks: Tensor | None = None,
) -> TrainResult:
    """Train a compressed model.

    student: a causal language model with all parameters in memory; trained in float32, with forward passes in bfloat16
    on a GPU that has it. Afterwards its linear layers hold the dense values of the returned weights, unless these have another
    form than before, and its other trained parameters their new values, in their own dtypes. weights: the representation of
    each linear layer by the full name of its module: an nn.Linear, a Conv1D, or for a low-rank weight a module with ``down`` and
    ``up``. teacher: the uncompressed model, given back unchanged, or what was kept of one; None where the pass needs none.
    tokens: (n, length) int64; sequences are drawn without replacement, permutation after permutation, from those that
    are not held out. counted: of the same shape, bool, the tokens that are to be predicted; None: all of them, but for the
    first of each sequence. A sequence of which none is to be predicted is left out. tasks: of that shape too, int8, for passes
    that tell several apart.
    device: "cpu", "cuda", ...; of several processes (accelerate launch) each takes its own, and a share of the batches.
    directory: the state is saved there every ``save_every`` steps; a rerun with equal arguments resumes from it, and
    after the last step returns at once. The caller deletes it.

    Raises BadInput when the teacher is missing, batches cannot be shared or the model's head is not understood, and
    CompressError when the loss or its gradient is not finite (the student's norms and biases are then spoilt; where processes
    shared out parameters, these are gone).
    """
    used = _used(step, teacher, tokens, counted)
    directory.mkdir(parents=True, exist_ok=True)
    give_back_large_blocks()
    state = StateFile(directory / STATE_FILE, fingerprint(weights, tokens, counted, step, seed), save_every)
    with ExitStack() as stack:
        accelerator = stack.enter_context(_accelerator(torch.device(device)))
        place = accelerator.device if accelerator.num_processes > 1 else torch.device(device)
        forms = {name: _form(step, name, weight, seed) for name, weight in weights.items()}
        layers = stack.enter_context(trainable_layers(student, forms, place))
        stack.enter_context(_borrowed(student, place, torch.float32))
        check_head(student, tokens[:1, :8].to(place))
        if step.checkpointing:
            stack.enter_context(recomputed_blocks(student))
        if isinstance(teacher, PreTrainedModel):
            stack.enter_context(_borrowed(teacher, place))
            check_head(teacher, tokens[:1, :8].to(place))
        objective = _Objective(student, teacher, step, tokens[:1, :8].to(place))
        _open(_parameter_groups(student, step))
        shares = accelerator.num_processes > 1 and asks_for_shares(step)
        with sharded(objective, accelerator.num_processes, place) if shares else nullcontext():
            past = _Loop(accelerator, objective, Batch(tokens, counted, rows=used, tasks=tasks), seed, state, progress).run()
        trained = {name: _settled(step, name, layer.trained()) for name, layer in layers.items()}
    for name, weight in trained.items():
        if spec_of(weight) == spec_of(weights[name]):
            write_back(student.get_submodule(name), weight, layers[name].bias)
    return TrainResult(trained, past.losses, past.held_out, past.best_step if past.best else len(past.losses))


def _used(step: TrainPass, teacher: Teacher | None, tokens: Tensor, counted: Tensor | None) -> Tensor:
    """The sequences of which some token is to be predicted: (n,) int64. Raises BadInput where nothing can be trained on."""
    if step.needs.teacher and teacher is None:
        raise BadInput(f"{step.method()} needs the uncompressed model as a teacher, and none was given")
    used = torch.arange(len(tokens)) if counted is None else counted[:, 1:].any(1).nonzero().flatten()
    if not len(used) or tokens.shape[1] < 2:
        raise BadInput(f"{step.method()} predicts a token from those before it: tokens {tuple(tokens.shape)} hold none")
    return used


def _form(step: TrainPass, name: str, weight: Weight, seed: int) -> Weight:
    """The form in which a matrix is trained."""
    if isinstance(weight, LowRank):
        return LowRank(_form(step, f"{name}.down", weight.down, seed), _form(step, f"{name}.up", weight.up, seed))
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)
    return step.adapt(weight, generator) if step.trains_layer(name) else weight


def _settled(step: TrainPass, name: str, weight: Weight) -> Weight:
    """What becomes of it afterwards."""
    if isinstance(weight, LowRank):
        return LowRank(_settled(step, f"{name}.down", weight.down), _settled(step, f"{name}.up", weight.up))
    try:
        return step.settle(weight)
    except ValueError as error:
        raise CompressError(f"{step.label()} at {name}: {error}") from None


class _Objective(nn.Module):
    """A batch -> the loss of predicting its tokens: one module, so that processes can share it.

    tokens: (1, length), any, to see by how wide the models are.
    """

    def __init__(self, student: PreTrainedModel, teacher: Teacher | None, step: TrainPass, tokens: Tensor):
        super().__init__()
        self.student, self.teacher, self.step = student, teacher, step
        with torch.no_grad():
            self.aids = step.aids(*(self._widths(model, tokens) for model in (student, teacher)))
        if self.aids is not None:
            self.aids.to(tokens.device)

    def _widths(self, model: Teacher | None, tokens: Tensor) -> tuple[int, ...]:
        if not isinstance(model, PreTrainedModel) or not self.step.needs.states:
            return ()
        return tuple(state.shape[-1] for state in signal_of(model, Batch(tokens), states=True).states)

    def forward(self, batch: Batch) -> Tensor:
        states, teacher_signal = self.step.needs.states, None
        if isinstance(self.teacher, CachedTeacher):
            teacher_signal = self.teacher.signal(batch)
        elif self.teacher is not None:
            with torch.no_grad():
                teacher_signal = signal_of(self.teacher, batch, states)
        return self.step.loss(signal_of(self.student, batch, states), teacher_signal, batch._replace(aids=self.aids))


class _Loop:
    """A run of training, from the saved state if there is one. data: all windows, of which ``rows`` are used."""

    def __init__(
        self, accelerator: Accelerator, objective: _Objective, data: Batch, seed: int, state: StateFile, progress: Progress
    ):
        self.accelerator, self.objective, self.data, self.state, self.progress = accelerator, objective, data, state, progress
        self.step, student = objective.step, objective.student
        groups = _parameter_groups(student, self.step)
        parameters = {name: value for name, value in student.named_parameters() if value.requires_grad}
        if not parameters:
            raise BadInput(f"{self.step.label()}: nothing in the model is trained by that; use trains=blocks, or other targets")
        self.device = next(iter(parameters.values())).device
        if objective.aids is not None:
            groups.append({"params": list(objective.aids.parameters()), "share": 1.0, "weight_decay": 0.0})
            parameters |= {f"aids.{name}": value for name, value in objective.aids.named_parameters()}
        layers = {name: module for name, module in student.named_modules() if isinstance(module, TrainableLinear)}
        self.trainee = Trainee(parameters, layers, torch.optim.AdamW(groups, lr=self.step.learning_rate))
        self.past = state.load(self.trainee)
        teacher = objective.teacher if isinstance(objective.teacher, PreTrainedModel) else None
        past, gather = self.past, accelerator.gather
        self.rollouts = Rollouts(student, teacher, seed, past.memory, gather, past.held_out)  # type: ignore[arg-type]
        assert data.rows is not None
        n_held_out = self.step.n_held_out(len(data.rows))
        if self.step.patience and not n_held_out:
            raise BadInput(f"{self.step.label()}: {len(data.rows)} windows are too few to hold some out; give more text")
        order = torch.randperm(len(data.rows), generator=torch.Generator().manual_seed(seed))
        self.held_out = data.rows[order[:n_held_out].sort().values]
        self.batches = _batches(data.rows[order[n_held_out:].sort().values], self.step, seed, accelerator)
        settings: Any = DistributedDataParallelKwargs(find_unused_parameters=objective.aids is not None)
        accelerator.ddp_handler = settings
        self.model, self.optimizer = objective, self.trainee.optimizer
        if not isinstance(objective, FSDPModule):
            self.model, self.optimizer = accelerator.prepare(objective, self.trainee.optimizer)

    def run(self) -> Past:
        """Train to the end; the student is left with the parameters to keep."""
        past, step = self.past, self.step
        if past.losses:
            self.progress(len(past.losses), step.steps, RESUMED)
        elif len(self.held_out):
            self._measure()
        while len(past.losses) < step.steps and not past.stands_still(step.patience):
            past.losses.append(self._train())
            done = len(past.losses)
            if len(self.held_out) and (done % step.evaluate_every == 0 or done == step.steps):
                self._measure()
            is_last = done == step.steps or past.stands_still(step.patience)
            if done % self.state.save_every == 0 or is_last:
                self.state.save(self.trainee, past, self.accelerator.is_main_process)
            held_out = f", held out {past.held_out[-1][1]:.4f}" if past.held_out else ""
            self.progress(done, step.steps, f"loss {past.losses[-1]:.4f}{held_out}")
        with torch.no_grad():
            for name, value in past.best.items():
                self.trainee.parameters[name].copy_(as_shared(value, self.trainee.parameters[name]))
        return past

    def _train(self) -> float:
        """One step; returns its loss."""
        index, accelerator = len(self.past.losses), self.accelerator
        for group in self.optimizer.param_groups:
            group["lr"] = group["share"] * self.step.learning_rate_at(index)
        if self.step.chooses:
            _choose(self.step, index, self.trainee.layers)
        with torch.no_grad():
            parts = [self.step.prepare(self._batch(rows, index), self.rollouts) for rows in self.batches[index]]
        n_predicted = float(accelerator.reduce(self._number(sum(len(part.targets) for part in parts)), "sum"))  # type: ignore
        loss = self._number(0)
        for number, part in enumerate(parts, 1):
            share = len(part.targets) / n_predicted
            with accelerator.no_sync(self.model) if number < len(parts) else nullcontext(), accelerator.autocast():
                part_loss = self.model(part) * share
                accelerator.backward(part_loss * accelerator.num_processes)  # whose gradients are averaged
            loss += part_loss.detach()
        mean_loss = float(accelerator.reduce(loss, "sum"))  # type: ignore[arg-type]
        norm = float(whole(accelerator.clip_grad_norm_(self.trainee.parameters.values(), self.step.gradient_clip)))  # type: ignore
        if not (math.isfinite(mean_loss) and math.isfinite(norm)):
            raise CompressError(
                f"{self.step.method()}: loss {mean_loss:g}, gradient norm {norm:g} at step {index + 1} of {self.step.steps}; "
                f"try a smaller learning rate, such as learning_rate={self.step.learning_rate / 10:g}"
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        return mean_loss

    @torch.no_grad()
    def _measure(self) -> None:
        """The mean loss over the tokens of the held-out windows, of which every process takes some: on the text as it is, and as
        in the last step, so that measurements can be compared whatever a pass does in between.

        Processes that share parameters compute equally often: one for which nothing is left repeats what then does not count."""
        accelerator, done = self.accelerator, len(self.past.losses)
        parts = self.held_out.split(self.batches.shape[-1])
        total, n_predicted = self._number(0), self._number(0)
        for first in range(0, len(parts), accelerator.num_processes):
            index = first + accelerator.process_index
            part = self._batch(parts[min(index, len(parts) - 1)], self.step.steps - 1)
            with accelerator.autocast():
                loss = self.objective(part)
            if index < len(parts):
                total += loss * len(part.targets)
                n_predicted += len(part.targets)
        total, n_predicted = accelerator.reduce(total, "sum"), accelerator.reduce(n_predicted, "sum")
        is_best = self.past.measured(done, float(total / n_predicted))  # type: ignore[operator]
        if is_best and self.step.patience:
            self.past.best = {name: whole(value.detach()).to("cpu", copy=True) for name, value in self.trainee.parameters.items()}

    def _batch(self, rows: Tensor, index: int) -> Batch:
        tokens, counted, tasks = (
            None if values is None else values[rows].to(self.device)
            for values in (self.data.tokens, self.data.counted, self.data.tasks)
        )
        assert tokens is not None
        return Batch(tokens, counted, index, rows=rows.to(self.device), tasks=tasks)

    def _number(self, value: float) -> Tensor:
        return torch.tensor(value, dtype=torch.float32, device=self.device)


@torch.no_grad()
def _choose(step: TrainPass, index: int, layers: Mapping[str, TrainableLinear]) -> None:
    """Let the pass say what each matrix is trained as from here on."""
    for name, layer in layers.items():
        if step.trains_layer(name) and (chosen := step.choose(index, layer.weight)) is not None:
            layer.take(chosen)


def _batches(rows: Tensor, step: TrainPass, seed: int, accelerator: Accelerator) -> Tensor:
    """This process's sequences of ``rows``: (steps, accumulate, sequences), drawn from seeded permutations in a row."""
    n_shares = step.accumulate * accelerator.num_processes
    if step.batch_size % n_shares:
        raise BadInput(f"batch_size={step.batch_size} is not a multiple of accumulate x processes, {n_shares}")
    generator = torch.Generator().manual_seed(seed)
    n_drawn = step.steps * step.batch_size
    permutations = [torch.randperm(len(rows), generator=generator) for _ in range(math.ceil(n_drawn / len(rows)))]
    order = rows[torch.cat(permutations)[:n_drawn]]
    return order.view(step.steps, step.accumulate, accelerator.num_processes, -1)[:, :, accelerator.process_index]


def _parameter_groups(student: nn.Module, step: TrainPass) -> list[dict[str, Any]]:
    """AdamW's groups of what ``step.trains`` names; norms and biases have one dimension.

    Adam moves every parameter by about the learning rate. A move of a scale is multiplied by codes up to 2**(bits-1),
    so with a "share" of 2**(1-bits) of the rate no weight moves faster than one that is trained directly.
    """
    layers = {name: module for name, module in student.named_modules() if isinstance(module, TrainableLinear)}
    factors = [name for name, module in student.named_modules() if isinstance(module, TrainableFactors)]
    groups = []
    for name, layer in layers.items():
        if step.trains_layer(name) and (step.trains != "factors" or name.startswith(tuple(f"{each}." for each in factors))):
            for own, master, share in filter(lambda each: step.trains_parameter(each[0]), layer.shares()):
                decay = step.weight_decay if share == 1 else 0.0
                groups.append({"params": [master], "share": share, "weight_decay": decay, "betas": step.betas(own)})
    every_master = {master for layer in layers.values() for master in layer.masters}
    dimensions = {"scales": (), "factors": (), "weights": (), "blocks": (1,), "everything": (0, 1, 2, 3)}[step.trains]
    rest = [value for value in student.parameters() if value not in every_master and value.dim() in dimensions]
    return [*groups, {"params": rest, "share": 1.0, "weight_decay": 0.0, "betas": step.betas("")}]


def _open(groups: list[dict[str, Any]]) -> None:
    """Ask for the gradients of these parameters."""
    for parameter in chain.from_iterable(group["params"] for group in groups):
        parameter.data = parameter.data.clone()  # a loader may have given both models the same memory
        parameter.requires_grad_(True)


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
        with environment({"ACCELERATE_USE_FSDP": None}):  # its way cannot split a student and its teacher at once
            accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=precision, device_placement=False)
        yield accelerator
    finally:
        for state, values in zip(shared, before, strict=True):
            state.clear()
            state.update(values)
