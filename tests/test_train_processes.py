"""Several processes train one model."""

from __future__ import annotations

import multiprocessing
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from compress.distill.logit_kd import LogitKD
from compress.train import TrainResult, train
from tests.training import SHAPE, VOCABULARY, compressed, low_rank, make, silent, uneven


def share(rank: int, port: int, directory: Path, outcome: Any) -> None:
    """One of two processes that train together."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
    torch.set_num_threads(1)
    result = shared_run(directory, accumulate=2)
    if rank == 0:
        outcome.put((result.history, result.held_out, [weight.dense().numpy() for weight in result.weights.values()]))
    torch.distributed.destroy_process_group()


def shared_run(directory: Path, **settings) -> TrainResult:
    teacher = make(LlamaConfig(**SHAPE, attention_bias=True))
    student, weights = compressed(teacher, low_rank)
    tokens = torch.randint(0, VOCABULARY, (64, 32), generator=torch.Generator().manual_seed(0))
    step = LogitKD(steps=6, batch_size=8, learning_rate=1e-3, evaluate_every=2, hold_out=0.15, **settings)
    return train(student, weights, teacher, tokens, step, seed=0, device="cpu", directory=directory, progress=silent,
                 counted=uneven(tokens))  # fmt: skip


@pytest.mark.slow
def test_two_processes_compute_what_one_does(tmp_path):
    """Uneven numbers of tokens in every share, held-out windows that cannot be shared out evenly."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    outcome = context.Queue()
    processes = [context.Process(target=share, args=(rank, port, tmp_path / "two", outcome)) for rank in range(2)]
    for process in processes:
        process.start()
    history, held_out, values = outcome.get(timeout=300)
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    alone = shared_run(tmp_path / "one")
    torch.testing.assert_close(torch.tensor(history), torch.tensor(alone.history), rtol=1e-5, atol=0)
    torch.testing.assert_close(torch.tensor(held_out), torch.tensor(alone.held_out), rtol=1e-5, atol=0)
    for ours, theirs in zip(values, alone.weights.values(), strict=True):
        torch.testing.assert_close(torch.from_numpy(ours), theirs.dense(), rtol=1e-3, atol=1e-5)
