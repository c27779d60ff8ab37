"""Adapters: peft's own reader opens them, and the model that they lie beside computes with them what the artifact does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from compress import export
from compress.errors import BadInput

LORA = "lora:steps=2,batch_size=2,length=16"
CHAINS = {
    "loftq": ["loftq:bits=4,group_size=16,rank=4"],
    "beside a grid": ["gptq:bits=4,group_size=16", "lora:steps=2,batch_size=2,length=16,rank=3"],
    "beside dense matrices": ["lora:steps=2,batch_size=2,length=16,rank=3,merge=false,targets=q_proj+down_proj,trains=blocks"],
    "of two ranks": [
        "svd:ratio=0.8,targets=o_proj",
        "lora:steps=2,batch_size=2,length=16,rank=40,merge=false,targets=q_proj+k_proj",
    ],
}


@pytest.fixture(scope="module", params=CHAINS)
def pair(request, llama, run_stages, tmp_path_factory) -> tuple[Path, Path]:
    """An artifact, and what the export made of it."""
    artifact = run_stages(llama, CHAINS[request.param])
    return artifact, export.to("peft", artifact, tmp_path_factory.mktemp("exported") / "out")


@torch.no_grad()
def logits_of(model, tokens: Tensor) -> Tensor:
    return model.eval()(input_ids=tokens).logits


def test_model_and_adapter_compute_what_the_artifact_does(pair, tokens, reload):
    """Whoever reads the adapter: ``x -> base(x) + B A x`` by the files alone."""
    artifact, out = pair
    base = reload(out)
    changes = load_file(out / "adapter" / "adapter_model.safetensors")
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    before = logits_of(base, tokens)
    for name in config["target_modules"]:
        down, up = (changes[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        rank = config["rank_pattern"].get(name, config["r"])
        assert down.shape[0] == up.shape[1] == rank and config["alpha_pattern"].get(name, config["lora_alpha"]) == rank
        base.get_submodule(name).register_forward_hook(
            lambda _, inputs, output, down=down, up=up: output + inputs[0] @ down.T @ up.T
        )
    expected = logits_of(reload(artifact), tokens)
    torch.testing.assert_close(logits_of(base, tokens), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before, expected, atol=1e-3)


def test_peft_opens_it(pair, tokens, reload):
    peft = pytest.importorskip("peft", reason="peft is not installed: the adapter's real reader cannot be asked")
    artifact, out = pair
    config = json.loads((out / "config.json").read_text())
    unpacked = {"quantization_config": CompressedTensorsConfig(run_compressed=False)} if "quantization_config" in config else {}
    base = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, **unpacked)
    model = peft.PeftModel.from_pretrained(base, str(out / "adapter"))
    torch.testing.assert_close(logits_of(model, tokens), logits_of(reload(artifact), tokens), rtol=1e-4, atol=1e-4)


def test_an_artifact_without_changes_is_refused(llama, tmp_path):
    with pytest.raises(BadInput, match="no layer has a low-rank change"):
        export.to("peft", llama, tmp_path / "out")
