"""Several processes train one model."""

from __future__ import annotations

import multiprocessing
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, PreTrainedModel

from compress.distill.logit_kd import LogitKD
from compress.prune.gradual import Gradual
from compress.quant.pv_tuning import PVTuning
from compress.train import TrainResult, train
from compress.train_pass import TrainPass
from tests.training import SHAPE, VOCABULARY, compressed, fixed_parts, low_rank, make, uneven


def share(rank: int, port: int, directory: Path, settings: dict[str, Any], outcome: Any) -> None:
    """One of two processes that train together."""
    os.environ["ACCELERATE_USE_FSDP"] = settings.pop("splits")
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
    torch.set_num_threads(1)
    for stop in (4, None):  # what was saved is gone on from, by processes that are as many
        result, student = shared_run(directory, stop, accumulate=2, **settings)
        torch.distributed.barrier()  # the first one may still be writing
    assert result is not None
    others = {name: value.numpy() for name, value in student.state_dict().items()}
    if rank == 0:
        outcome.put((result.history, result.held_out, [weight.dense().numpy() for weight in result.weights.values()], others))
    torch.distributed.destroy_process_group()


def shared_run(
    directory: Path, stop: int | None = None, method: type[TrainPass] = LogitKD, **settings
) -> tuple[TrainResult | None, PreTrainedModel]:
    teacher = make(LlamaConfig(**SHAPE, attention_bias=True))
    student, weights = compressed(teacher, low_rank)
    tokens = torch.randint(0, VOCABULARY, (64, 32), generator=torch.Generator().manual_seed(0))
    settings = {"steps": 6, "batch_size": 8, "learning_rate": 1e-3, "evaluate_every": 2, "hold_out": 0.15} | settings

    def progress(done: int, total: int, message: str) -> None:
        if done == stop:
            raise KeyboardInterrupt

    try:
        result = train(student, weights, teacher, tokens, method(**settings), seed=0, device="cpu", directory=directory,
                       progress=progress, save_every=2, counted=uneven(tokens))  # fmt: skip
    except KeyboardInterrupt:
        return None, student
    for model in (student, teacher):
        assert not any("FSDP" in type(module).__name__ or module._forward_pre_hooks for module in model.modules())
        assert not any(isinstance(parameter, DTensor) or not parameter.numel() for parameter in model.parameters())
    return result, student


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "settings",
    [
        {"splits": "false"}, {"splits": "true"}, {"splits": "true", "checkpointing": True, "trains": "everything", "patience": 5},
        {"splits": "true", "method": Gradual, "sparsity": 0.75, "end": 0.9, "every": 1},
        {"splits": "true", "method": PVTuning, "code_learning_rate": 0.3, "delta_decay": 0.1, "warmup": 0.34},
    ],
    ids=["whole models", "split parameters", "split parameters, all trained", "split parameters, masks chosen anew",
         "split parameters, codes chosen anew"],
)  # fmt: skip
def test_two_processes_compute_what_one_does(settings, tmp_path):
    """Uneven numbers of tokens in every share, held-out windows that cannot be shared out evenly, and an interruption."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    outcome = context.Queue()
    processes = [context.Process(target=share, args=(rank, port, tmp_path / "two", settings, outcome)) for rank in range(2)]
    for process in processes:
        process.start()
    history, held_out, values, others = outcome.get(timeout=600)
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    alone, student = shared_run(tmp_path / "one", **{name: value for name, value in settings.items() if name != "splits"})
    assert alone is not None
    _, begun = compressed(make(LlamaConfig(**SHAPE, attention_bias=True)), low_rank)
    parts = [(fixed_parts(weight), fixed_parts(alone.weights[name])) for name, weight in begun.items()]
    stayed = all(ours.equal(theirs) for before, after in parts for ours, theirs in zip(before, after, strict=True))
    assert stayed is ("method" not in settings)
    torch.testing.assert_close(torch.tensor(history), torch.tensor(alone.history), rtol=1e-5, atol=0)
    torch.testing.assert_close(torch.tensor(held_out), torch.tensor(alone.held_out), rtol=1e-5, atol=0)
    for ours, theirs in zip(values, alone.weights.values(), strict=True):
        torch.testing.assert_close(torch.from_numpy(ours), theirs.dense(), rtol=1e-3, atol=1e-5)
    for name, value in student.state_dict().items():
        torch.testing.assert_close(torch.from_numpy(others[name]), value, rtol=1e-3, atol=1e-5)
