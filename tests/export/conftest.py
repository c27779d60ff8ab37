"""What tests of several formats share: their real readers, where these are installed."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

# Every layer is fed the identity, so what comes back is the matrix that the reader's own kernel multiplies by.
_SCRIPT = """
import sys
import torch
from safetensors.torch import load_file, save_file

torch.set_num_threads(1)
how, directory, tokens, out = sys.argv[1:]
if how == "transformers":
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float16)
else:
    from gptqmodel import GPTQModel
    model = GPTQModel.load(directory, device="cpu", dtype=torch.float16, backend=how).model
result = {}
with torch.no_grad():
    result["logits"] = model.eval()(input_ids=load_file(tokens)["tokens"]).logits.float()
    for name, module in model.named_modules():
        if hasattr(module, "in_features") and type(module) is not torch.nn.Linear:
            if getattr(module, "bias", None) is not None:
                module.bias = None
            result[name] = module(torch.eye(module.in_features, dtype=torch.float16)).T.contiguous()
save_file(result, out)
"""


class Reading(NamedTuple):
    """What a reader made of a directory. logits: (batch, length, V); weights: (out, in) float16 of every quantized layer."""

    logits: Tensor
    weights: dict[str, Tensor]


@pytest.fixture(scope="session")
def read_back(tokens: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path, str], Reading]:
    """``read_back(directory, how)``; how: a backend of gptqmodel, or "transformers", which chooses one through optimum."""

    def read(directory: Path, how: str) -> Reading:
        needed = ("gptqmodel", "optimum") if how == "transformers" else ("gptqmodel",)
        if missing := [package for package in needed if find_spec(package) is None]:
            pytest.skip(f"{' and '.join(missing)} not installed: the format's real reader cannot be asked")
        work = tmp_path_factory.mktemp("reader")
        save_file({"tokens": tokens}, work / "tokens")
        # gptqmodel does not start on two cores without the first; compiling its kernels takes longer than they save here.
        environment = {**os.environ, "GPTQMODEL_CPU_WORKERS": "2", "TORCHDYNAMO_DISABLE": "1"}
        command = [sys.executable, "-c", _SCRIPT, how, str(directory), str(work / "tokens"), str(work / "result")]
        process = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert process.returncode == 0, process.stderr[-3000:]
        weights = load_file(work / "result")
        return Reading(weights.pop("logits"), weights)

    return read


@pytest.fixture(scope="session")
def assert_reads_as(reload, tokens: Tensor) -> Callable[..., None]:
    """``assert_reads_as(reading, dense, count)``: in ``count`` layers, bit for bit the weights of the dense float16
    checkpoint, and its logits up to float16's rounding, which another order of summing changes.

    With ``exact=False``, for kernels that compute in bfloat16 whatever they are given, both up to that type's rounding.
    """

    def check(reading: Reading, dense: Path, count: int, *, exact: bool = True) -> None:
        model = reload(dense, dtype=torch.float16)
        assert len(reading.weights) == count
        for name, weight in reading.weights.items():
            module = model.get_submodule(name)
            own = module.weight.T if type(module).__name__ == "Conv1D" else module.weight
            tolerance = 0.0 if exact else float(own.detach().abs().max()) / 100
            torch.testing.assert_close(weight, own, rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")
        with torch.no_grad():
            logits = model(input_ids=tokens).logits.float()
        tolerance = (0.02 if exact else 0.08) * float(logits.abs().max())
        torch.testing.assert_close(reading.logits, logits, rtol=0, atol=tolerance)

    return check


# GGUF


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """``write(source, variant=None)`` -> GGUF file."""

    from compress.export.gguf import export

    def run(source: Path, variant: str | None = None) -> Path:
        return export(source, tmp_path / "model.gguf", variant=variant, overwrite=True)

    return run


@pytest.fixture
def edited(tmp_path: Path) -> Callable[[Path, dict], Path]:
    """``edited(source, edits)`` -> a copy whose config.json says something else."""

    def edit(source: Path, edits: dict) -> Path:
        copy = tmp_path / "model"
        shutil.copytree(source, copy)
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps(config | edits))
        return copy

    return edit


@pytest.fixture(scope="session")
def llama_cpp():
    module = pytest.importorskip("llama_cpp", reason="needs llama.cpp: pip install 'compress-lm[gguf-run]'")
    quiet = module.llama_log_callback(lambda level, text, data: None)
    module.llama_log_set(quiet, ctypes.c_void_p(0))
    module._quiet = quiet  # the library calls it as long as it lives
    return module


@pytest.fixture(scope="session")
def llama_logits(llama_cpp) -> Callable[[Path, Tensor], Tensor]:
    """``llama_logits(file, tokens (length,))`` -> (length, V), with keys and values kept in float32."""

    def run(file: Path, tokens: Tensor) -> Tensor:
        single = llama_cpp.GGML_TYPE_F32
        model = llama_cpp.Llama(
            str(file), n_ctx=256, n_batch=256, n_threads=1, logits_all=True, verbose=False, type_k=single, type_v=single
        )
        model.eval(tokens.tolist())
        return torch.from_numpy(np.array(model.scores[: len(tokens)]))

    return run
