"""What a checkpoint computes, read off its files, is what the opened model has and caches."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from compress.checkpoint import Checkpoint
from compress.judge import fits, load_model
from compress.profile import _active_share, _windows, profile, size

FAMILIES = ["llama", "llama-untied", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "gpt2", "opt", "gpt_neox"]


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_and_cache_are_the_opened_models(family, make_checkpoint) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(family))
    model = load_model(checkpoint.path, torch.float32, "cpu")
    found, work = size(checkpoint), profile(checkpoint, torch.float32)
    embedding = [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    tables = {id(table.weight) for table in (*embedding, model.get_output_embeddings())}
    own = list(model.parameters())
    assert found.active_parameters == sum(parameter.numel() for parameter in own)
    assert found.non_embedding_parameters == sum(parameter.numel() for parameter in own if id(parameter) not in tables)
    with torch.no_grad():
        cache = model(input_ids=torch.ones(1, 5, dtype=torch.int64), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert work.kv_cache_bytes(5) == held
    assert work.weight_bytes == checkpoint.nbytes and len(work.windows) == len(cache.layers)
    assert fits(checkpoint, torch.float32, "cpu")


def test_a_tokens_share_of_experts_and_windows() -> None:
    assert _active_share(SimpleNamespace(num_experts_per_tok=2, num_local_experts=8)) == 0.25
    assert _active_share(SimpleNamespace()) == 1
    mixed = SimpleNamespace(sliding_window=64, layer_types=["sliding_attention", "full_attention"])
    assert _windows(mixed, 2) == (64, None)
    assert _windows(SimpleNamespace(sliding_window=64), 2) == (64, 64)
    assert _windows(SimpleNamespace(sliding_window=64, use_sliding_window=False), 2) == (None, None)
