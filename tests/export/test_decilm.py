"""DeciLM: a reader that knows only the format's description computes what the artifact does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from compress import export
from compress.errors import BadInput
from compress.export.decilm import padded


def width_of(ffn_mult: float, hidden_size: int) -> int:
    """What the format says of a number of neurons."""
    return -(-int(2 * ffn_mult * hidden_size / 3) // 256) * 256


def read(directory: Path, tokens: Tensor) -> Tensor:
    """Logits by ``config.json`` and the tensors alone: Llama's layers, each in the shape that its entry says."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    raw = json.loads((directory / "config.json").read_text())
    assert raw["architectures"] == ["DeciLMForCausalLM"] and raw["model_type"] == "nemotron-nas"
    left_out = {"architectures", "model_type", "auto_map", "block_configs", "num_key_value_heads", "intermediate_size"}
    common = {key: value for key, value in raw.items() if key not in left_out}
    model = LlamaForCausalLM(LlamaConfig(**common, intermediate_size=8))
    for index, block in enumerate(raw["block_configs"]):
        assert not any(block[part][what] for part in ("attention", "ffn") for what in ("no_op", "replace_with_linear"))
        own = {
            "num_key_value_heads": raw["num_attention_heads"] // block["attention"]["n_heads_in_group"],
            "intermediate_size": width_of(block["ffn"]["ffn_mult"], raw["hidden_size"]),
        }
        config = LlamaConfig(**common, **own)
        config._attn_implementation = "sdpa"
        model.model.layers[index] = LlamaDecoderLayer(config, index)
    tensors = load_file(directory / "model.safetensors")
    if raw["tie_word_embeddings"]:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict(tensors)
    with torch.no_grad():
        return model.eval()(input_ids=tokens, use_cache=False).logits


@pytest.mark.parametrize(
    ("family", "passes"),
    [
        ("llama", ["llm_pruner:units=neurons,keep_first=1"]),
        ("llama-untied", ["minitron:uniform=false,round_to=8", "wanda"]),
        ("llama", ["minitron:num_attention_heads=2,num_key_value_heads=2"]),
    ],
)
def test_reads_as(family, passes, make_checkpoint, run_stages, reload, tokens, tmp_path):
    artifact = run_stages(make_checkpoint(family), passes)
    export.to("decilm", artifact, tmp_path / "out")
    with torch.no_grad():
        expected = reload(artifact)(input_ids=tokens).logits
    torch.testing.assert_close(read(tmp_path / "out", tokens), expected, rtol=0, atol=1e-4)


def test_its_configuration_opens_by_the_code_that_travels_with_it(llama, run_stages, tmp_path):
    from transformers import AutoConfig

    export.to("decilm", run_stages(llama, ["llm_pruner:units=neurons,keep_first=1"]), tmp_path / "out")
    for step in range(2):
        config = AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True)
        assert config.model_type == "nemotron-nas" and len(config.block_configs) == 2
        assert config.block_configs[1].attention.n_heads_in_group == 2
        assert width_of(config.block_configs[1].ffn.ffn_mult, config.hidden_size) == 256
        assert not hasattr(config.block_configs[1].ffn, "intermediate_size")
        if not step:
            config.save_pretrained(tmp_path / "out")


@pytest.mark.parametrize("hidden_size", [64, 96, 2048, 3072, 4096, 8192])
def test_every_width_comes_back(hidden_size):
    for width in range(1, 40000, 97):
        assert width_of(3 * padded(width) / (2 * hidden_size), hidden_size) == padded(width) >= width


@pytest.mark.parametrize(
    ("family", "passes", "reason"),
    [
        ("llama", ["flap"], "compensate=false"),
        ("llama", ["llm_pruner:keep_first=1,sparsity=0.5"], "one number of query heads for all blocks, here they have 4\\+2"),
        ("qwen2", ["minitron"], "a form of Llama"),
    ],
)
def test_refuses(family, passes, reason, make_checkpoint, run_stages, tmp_path):
    with pytest.raises(BadInput, match=reason):
        export.to("decilm", run_stages(make_checkpoint(family), passes), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_other_formats_refuse_shapes_of_their_own(llama, run_stages, tmp_path):
    artifact = run_stages(llama, ["llm_pruner:units=neurons,keep_first=1"])
    for target in ("dense", "gguf"):
        with pytest.raises(BadInput, match="--to decilm"):
            export.to(target, artifact, tmp_path / "out")
