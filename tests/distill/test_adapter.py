"""What peft trained beside a model is in the model afterwards, in the form that its layers have."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from compress import Pipeline
from compress.checkpoint import Checkpoint
from compress.distill.adapter import Adapter
from compress.errors import BadInput
from compress.export.peft import CONFIG_FILE, TENSOR_FILE
from compress.skeleton import Skeleton
from compress.weights import LowRank, Sum, Weight

peft = pytest.importorskip("peft", reason="peft is not installed: there is nobody to train adapters")


def opened(path: Path):
    config = json.loads((path / "config.json").read_text())
    unpacked = {"quantization_config": CompressedTensorsConfig(run_compressed=False)} if "quantization_config" in config else {}
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, trust_remote_code=True, **unpacked).eval()


def trained(path: Path, directory: Path, **settings):
    """An adapter beside the model, as peft makes and writes it; returns peft's own model."""
    settings = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"} | settings
    model = peft.get_peft_model(opened(path), peft.LoraConfig(**settings)).eval()
    draw = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=draw) * 0.1
    model.save_pretrained(directory)
    return model


@torch.no_grad()
def logits_of(model, tokens: Tensor) -> Tensor:
    return model.eval()(input_ids=tokens).logits


def weights_of(path: Path) -> dict[str, Weight]:
    skeleton = Skeleton(Checkpoint(path))
    return {
        skeleton.module_name(i, local): w for i in range(len(skeleton.blocks)) for local, w in skeleton.read_weights(i).items()
    }


WAYS = {
    "plainly": {},
    "with patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.1\.mlp\.down_proj": 5, "q_proj": 1}},
    "by the rank's root": {"use_rslora": True, "r": 4},
    "of all layers": {"target_modules": "all-linear"},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_dense_model_computes_what_peft_does(way, llama, calibration, tokens, tmp_path, reload):
    expected = logits_of(trained(llama, tmp_path / "adapter", **WAYS[way]), tokens)
    step = Adapter(path=str(tmp_path / "adapter"))
    result = Pipeline([step], calibration=calibration, evaluate=False, dtype="float32").run(llama, tmp_path / "out")
    found = logits_of(reload(result.path), tokens)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(found, logits_of(reload(llama), tokens), atol=1e-2)
    assert result.bytes == sum(file.stat().st_size for file in result.path.glob("*.safetensors"))


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_other_architectures(family, make_checkpoint, run_stages, tokens, tmp_path, reload):
    """Also where matrices are stored transposed."""
    source = make_checkpoint(family)
    names = {"gpt2": ["c_attn", "c_proj"], "opt": ["q_proj", "fc2"]}[family]
    model = trained(source, tmp_path / "adapter", target_modules=names, fan_in_fan_out=family == "gpt2")
    artifact = run_stages(source, [Adapter(path=str(tmp_path / "adapter"))])
    torch.testing.assert_close(logits_of(reload(artifact), tokens), logits_of(model, tokens), rtol=1e-3, atol=1e-3)


def test_removed_weights_stay_removed_and_kept_ones_take_the_change_up(llama, run_stages, tmp_path, caplog):
    pruned = run_stages(llama, ["wanda:sparsity=0.5"])
    model = trained(pruned, tmp_path / "adapter")
    merged = model.merge_and_unload()
    artifact = run_stages(pruned, [Adapter(path=str(tmp_path / "adapter"))])
    assert "of the change falls on removed weights and is lost" in caplog.text
    before = weights_of(pruned)
    for name, weight in weights_of(artifact).items():
        expected = merged.get_submodule(name).weight.detach() * before[name].mask
        assert torch.equal(weight.mask, before[name].mask)
        torch.testing.assert_close(weight.dense(torch.float32), expected, rtol=1e-2, atol=1e-4)  # stored in bfloat16


def test_factors_take_up_their_own_changes(llama, run_stages, tokens, tmp_path, reload):
    factored = run_stages(llama, ["svd:ratio=0.6"])
    model = trained(factored, tmp_path / "adapter", target_modules=[r"model\.layers\.0\.self_attn\.q_proj\.down", "o_proj.up"])
    artifact = run_stages(factored, [Adapter(path=str(tmp_path / "adapter"))])
    torch.testing.assert_close(logits_of(reload(artifact), tokens), logits_of(model, tokens), rtol=1e-2, atol=1e-2)
    ranks = {name: weight.rank for name, weight in weights_of(factored).items()}
    assert ranks == {name: weight.rank for name, weight in weights_of(artifact).items()}
    with pytest.raises(BadInput, match="has no factors here"):
        run_stages(llama, [Adapter(path=str(tmp_path / "adapter"))])


def test_a_grid_keeps_its_codes_and_the_change_beside(llama, run_stages, tokens, tmp_path, reload):
    quantized = run_stages(llama, ["rtn:bits=4,group_size=16"])
    model = trained(quantized, tmp_path / "adapter")
    artifact = run_stages(quantized, [Adapter(path=str(tmp_path / "adapter"))])
    torch.testing.assert_close(logits_of(reload(artifact), tokens), logits_of(model, tokens), rtol=1e-3, atol=1e-3)
    before, after = weights_of(quantized), weights_of(artifact)
    name = "model.layers.0.self_attn.q_proj"
    assert isinstance(after[name], Sum) and isinstance(after[name].parts[1], LowRank)
    torch.testing.assert_close(after[name].parts[0].dense(), before[name].dense(), rtol=0, atol=0)
    both = run_stages(llama, ["wanda", "rtn:bits=4,group_size=16"])
    with pytest.raises(BadInput, match=r"q_proj: a masked grid .* merge before quantizing"):
        run_stages(both, [Adapter(path=str(tmp_path / "adapter"))])


def test_plan_knows_the_bytes_and_a_chain_goes_on(cli, llama, calibration, tmp_path):
    trained(llama, tmp_path / "adapter")
    chain = ["rtn:bits=4,group_size=16", f"adapter:path={tmp_path / 'adapter'}"]
    planned = json.loads(cli("plan", llama, *chain, "--json").out)
    result = Pipeline(chain, calibration=calibration, evaluate=False).run(llama, tmp_path / "out")
    assert planned["predicted_bytes"] == pytest.approx(result.bytes, abs=4096)
    onward = Pipeline([chain[1], "wanda", "gptq"], calibration=calibration, evaluate=False).run(llama, tmp_path / "onward")
    assert [step.method for step in onward.manifest.steps] == ["adapter", "wanda", "gptq"]


def edited(directory: Path, **changes) -> None:
    file = directory / CONFIG_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_what_cannot_be_merged_is_refused_before_compute(llama, make_checkpoint, run_stages, tmp_path):
    def refused(match: str, source: Path = llama) -> None:
        with pytest.raises(BadInput, match=match):
            run_stages(source, [Adapter(path=str(adapter))])

    adapter = tmp_path / "adapter"
    with pytest.raises(BadInput, match="Give adapter:path=DIR"):
        run_stages(llama, ["adapter"])
    refused("neither a local directory|no such model directory")
    adapter.mkdir()
    refused("no adapter_config.json: no adapter of peft")
    trained(llama, adapter / "mine")
    refused("no adapter_config.json .did you mean .*mine")
    (adapter / CONFIG_FILE).write_text("[" * 100_000)
    refused("cannot be read")
    trained(llama, adapter)
    refused("changes a matrix of 64 x", make_checkpoint("llama", hidden_size=96))
    config = json.loads((adapter / CONFIG_FILE).read_text())
    for changes, told in (
        ({"peft_type": "IA3"}, "peft_type is IA3"), ({"use_dora": True}, "use_dora may change .*merge_and_unload"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens may"), ({"of_the_future": 1}, "of_the_future may"),
        ({"init_lora_weights": "pissa"}, "pissa changed the base"), ({"lora_alpha": float("nan")}, "lora_alpha"),
        ({"alpha_pattern": {"q_proj(": 3}}, "no regular expression"), ({"alpha_pattern": [3]}, "alpha_pattern"),
        ({"use_rslora": "false"}, "use_rslora"),
    ):  # fmt: skip
        (adapter / CONFIG_FILE).write_text(json.dumps(config | changes))
        refused(told)
    (adapter / CONFIG_FILE).write_text(json.dumps(config))
    tensors = load_file(adapter / TENSOR_FILE)
    name = next(name for name in tensors if "q_proj.lora_A" in name)
    misspelt = {other.replace("q_proj", "q_prj"): tensors[other].clone() for other in (name, name.replace("_A", "_B"))}
    for changes, told in (
        ({"base_model.model.lm_head.weight": torch.zeros(2, 2)}, "lm_head.weight is no low-rank change .*merge_and_unload"),
        ({name: tensors[name] * float("nan")}, "not finite"), ({name: tensors[name].int()}, "floating-point"),
        ({name: tensors[name][:0]}, "no product"), ({name: tensors[name][:2]}, "no product"),
        (misspelt, "q_prj is no linear layer .*did you mean '.*q_proj'"),
    ):  # fmt: skip
        save_file(tensors | changes, adapter / TENSOR_FILE)
        refused(told)
    (adapter / TENSOR_FILE).write_bytes(b"no")
    refused("cannot be read")
    (adapter / TENSOR_FILE).rename(adapter / "adapter_model.bin")
    refused("pickled adapters are not opened")


def test_how_an_adapter_may_have_begun(llama, run_stages, tokens, tmp_path, reload):
    model = trained(llama, tmp_path / "adapter", init_lora_weights="gaussian", bias="all", exclude_modules="o_proj")
    artifact = run_stages(llama, [Adapter(path=str(tmp_path / "adapter"))])
    torch.testing.assert_close(logits_of(reload(artifact), tokens), logits_of(model, tokens), rtol=1e-3, atol=1e-3)


def test_another_adapter_at_the_same_place_is_another_run(llama, calibration, tmp_path):
    """An interrupted run is not gone on with, and the artifact says which one it took in."""
    trained(llama, tmp_path / "adapter")
    chain = [Adapter(path=str(tmp_path / "adapter")), "rtn"]

    def stop(done: int, total: int, message: str) -> None:
        if "reloading" in message:
            raise KeyboardInterrupt

    pipeline = Pipeline(chain, calibration=calibration, evaluate=False)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(llama, tmp_path / "out", progress=stop)
    tensors = load_file(tmp_path / "adapter" / TENSOR_FILE)
    before = chain[0].contents()
    save_file({name: 3 * tensor for name, tensor in tensors.items()}, tmp_path / "adapter" / TENSOR_FILE)
    with pytest.raises(BadInput, match=r"out\.partial"):
        pipeline.run(llama, tmp_path / "out")
    result = pipeline.run(llama, tmp_path / "other")
    assert result.manifest.steps[0].contents == chain[0].contents() != before
