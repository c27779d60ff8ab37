"""Random Llama checkpoints for the other benchmarks, written one shard per block so that making them takes little memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor


def llama_config(hidden: int, layers: int, intermediate: int, vocabulary: int, tied: bool, head: int = 64) -> dict[str, Any]:
    """``config.json`` of a Llama of that shape; head: numbers per attention head."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "num_hidden_layers": layers,
        "intermediate_size": intermediate, "vocab_size": vocabulary, "tie_word_embeddings": tied,
        "num_attention_heads": hidden // head, "num_key_value_heads": hidden // head, "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6, "hidden_act": "silu", "bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.02,
        "attention_bias": False, "mlp_bias": False, "rope_theta": 10000.0, "dtype": "float32", "torch_dtype": "float32",
    }  # fmt: skip


def write_llama(directory: Path, config: dict[str, Any], seed: int = 0) -> Path:
    """Write that model with normal weights of deviation 0.02; one that is already there is kept."""
    if (directory / "config.json").exists() and json.loads((directory / "config.json").read_text()) == config:
        return directory
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    n_shards = config["num_hidden_layers"] + 1
    weight_map: dict[str, str] = {}
    total = 0
    for number, tensors in enumerate(_shards(config, generator), 1):
        name = f"model-{number:05d}-of-{n_shards:05d}.safetensors"
        save_file(tensors, directory / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    write_tokenizer(directory)
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    return directory


def _shards(config: dict[str, Any], generator: torch.Generator) -> Iterator[dict[str, Tensor]]:
    """The tensors outside the blocks, then those of each block."""
    hidden, intermediate = config["hidden_size"], config["intermediate_size"]

    def normal(n_outputs: int, n_inputs: int) -> Tensor:
        return torch.randn(n_outputs, n_inputs, generator=generator).mul_(0.02)

    outer = {"model.embed_tokens.weight": normal(config["vocab_size"], hidden), "model.norm.weight": torch.ones(hidden)}
    if not config["tie_word_embeddings"]:
        outer["lm_head.weight"] = normal(config["vocab_size"], hidden)
    yield outer
    for index in range(config["num_hidden_layers"]):
        block = f"model.layers.{index}."
        tensors = {f"{block}self_attn.{name}_proj.weight": normal(hidden, hidden) for name in "qkvo"}
        tensors |= {f"{block}mlp.{name}_proj.weight": normal(intermediate, hidden) for name in ("gate", "up")}
        tensors[f"{block}mlp.down_proj.weight"] = normal(hidden, intermediate)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{block}{name}.weight"] = torch.ones(hidden)
        yield tensors


def write_tokenizer(directory: Path) -> None:
    """A tokenizer of one end-of-text token and the 256 bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<|endoftext|>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>",
        "model_max_length": 2048,
    }  # fmt: skip
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def write_words(directory: Path, n_words: int) -> None:
    """Give a checkpoint a tokenizer whose token ``number`` is the word ``w<number>``, so that text can be any tokens."""
    tokenizer = Tokenizer(models.WordLevel(vocab={f"w{number}": number for number in range(n_words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "w0", "model_max_length": 2048}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
