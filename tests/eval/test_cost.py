"""Bytes come from the files and speed from running the model."""

from __future__ import annotations

import json
import time

import pytest
import torch
from safetensors.torch import save_file

from compress.eval.cost import artifact_cost, measure_speed


def test_bytes_are_those_of_the_files(model_directory, model):
    cost = artifact_cost(model_directory)
    file = model_directory / "model.safetensors"
    assert cost.bytes_on_disk == file.stat().st_size
    assert cost.weight_bytes == 4 * model.num_parameters()  # tied embeddings are stored once
    assert cost.parameters == model.num_parameters()
    assert 0 < cost.bytes_on_disk - cost.weight_bytes < 10_000
    assert cost.ideal_bytes is None


def test_shards_are_added_up_and_stray_files_left_out(tmp_path):
    save_file({"a": torch.zeros(10, 4, dtype=torch.float16)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"b": torch.zeros(8, dtype=torch.int32)}, tmp_path / "model-00002-of-00002.safetensors")
    save_file({"a": torch.zeros(1000)}, tmp_path / "consolidated.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    cost = artifact_cost(tmp_path, {"ideal_bytes": 90.5, "parameters": 48, "compressed_bits_per_weight": 4.2})
    assert cost.weight_bytes == 80 + 32
    assert (cost.ideal_bytes, cost.parameters, cost.compressed_bits_per_weight) == (90.5, 48, 4.2)
    assert artifact_cost(tmp_path).parameters is None  # packed integers are not parameters


def test_a_directory_without_weights_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="safetensors"):
        artifact_cost(tmp_path)


def test_speed_is_positive_and_quick_to_measure(model):
    start = time.perf_counter()
    speed = measure_speed(model, prompt_tokens=16, new_tokens=8, repeats=1)
    assert time.perf_counter() - start < 10
    assert speed.decode_tokens_per_second > 0
    assert speed.prefill_tokens_per_second > 0
    assert speed.resident_weight_bytes >= 4 * model.num_parameters()
    assert speed.peak_process_bytes > speed.resident_weight_bytes
    assert (speed.device, speed.dtype, speed.peak_device_bytes) == ("cpu", "float32", None)


def test_a_prompt_is_shortened_to_the_context(model):
    assert measure_speed(model, prompt_tokens=1000, new_tokens=2, repeats=1).prompt_tokens == 254
    with pytest.raises(ValueError, match="no room"):
        measure_speed(model, new_tokens=256)
