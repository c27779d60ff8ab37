"""The bitnet format: packing against transformers' own, and whole exports opened by stock transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from compress import export
from compress.activations import round_inputs
from compress.errors import BadInput
from compress.export import bitnet
from compress.weights import Quantized

TERNARY = ["bitnet:steps=2,batch_size=2,length=16"]


@pytest.fixture(scope="module")
def artifact(llama, run_stages) -> Path:
    return run_stages(llama, TERNARY)


def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens).logits.float()


def rounding_to_8_bits(model: nn.Module, names: list[str]) -> nn.Module:
    """The model with the inputs of these layers rounded as BitNet's are: 127 steps up to a token's largest number."""

    def rounded(_: nn.Module, arguments: tuple) -> tuple:
        step = arguments[0].abs().amax(-1, keepdim=True).clamp_min(1e-5) / 127
        return ((arguments[0] / step).round() * step,)

    for name in names:
        round_inputs(model.get_submodule(name), None)
        model.get_submodule(name).register_forward_pre_hook(rounded)
    return model


def test_packing_is_what_the_reader_unpacks():
    from transformers.integrations.bitnet import pack_weights, unpack_weights

    codes = torch.randint(-1, 2, (24, 10), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    weight = Quantized(codes, torch.full((24, 1), 0.5), None, 2)
    found = bitnet.tensors(weight)
    assert found["weight"].equal(pack_weights(codes.clone())) and found["weight_scale"].tolist() == [2.0]
    with torch.compiler.set_stance("force_eager"):
        assert unpack_weights(found["weight"], torch.float32).equal(codes.float())


@pytest.mark.parametrize("source", ["llama", "llama-untied"])
def test_stock_transformers_opens_the_same_model(source, make_checkpoint, run_stages, reload, tokens, tmp_path):
    """Up to the rounding of inputs, which the artifact's own model is made to do here."""
    own = run_stages(make_checkpoint(source), ["bitnet:steps=2,batch_size=2,length=16,skip=*.1.mlp.down_proj"])
    out = export.to("bitnet", own, tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "llama" and config["quantization_config"]["quant_method"] == "bitnet"
    stored = load_file(out / "model.safetensors")
    ternary = [name.removesuffix(".weight") for name, tensor in stored.items() if tensor.dtype == torch.uint8]
    assert len(ternary) == 13 and stored["model.layers.1.mlp.down_proj.weight"].dtype == torch.float32
    with torch.compiler.set_stance("force_eager"):
        model = reload(out)
        assert type(model.get_submodule(ternary[0])).__name__ == "BitLinear"
        found = logits_of(model, tokens)
    expected = logits_of(rounding_to_8_bits(reload(own), ternary), tokens)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4 * float(expected.abs().max()))
    plain = logits_of(reload(own), tokens)
    assert 0 < (found - plain).norm() < 0.1 * plain.norm()


def test_bfloat16_and_inputs_that_were_rounded_all_along(make_checkpoint, run_stages, reload, tokens, tmp_path, caplog):
    """The one reader's 8 bits have 127 steps up to the largest number, the other's 127.5."""
    source = make_checkpoint("llama", torch.bfloat16)
    own = run_stages(source, ["bitnet:steps=2,batch_size=2,length=16,activations=int8"], dtype="float32")
    out = export.to("bitnet", own, tmp_path / "out")
    assert "rounding" not in caplog.text and "rounds" not in caplog.text
    with torch.compiler.set_stance("force_eager"):
        found, half = logits_of(reload(out), tokens), logits_of(reload(out, dtype=torch.bfloat16), tokens)
    expected = logits_of(reload(own), tokens)
    assert (found - expected).norm() < 0.06 * expected.norm() and (half - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        (["rtn:bits=4,group_size=-1"], r"not all -1, 0 or 1.*compress run MODEL bitnet"),
        (["rtn:bits=2,group_size=16"], "not all -1, 0 or 1"),
        (["bitnet:steps=1,batch_size=2,length=16,per_row=true"], "more than one scale"),
        ([*TERNARY, "logit_kd:steps=1,batch_size=2,length=16"], "more than one scale, as training"),
        (["bitnet:steps=1,batch_size=2,length=16,activations=int4"], "rounded to int4"),
        (["svd:ratio=0.5"], "kind low_rank has no place"),
        (["wanda"], "holds no ternary layer"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_the_format_does_not_hold_is_refused(passes, message, llama, run_stages, tmp_path):
    with pytest.raises(BadInput, match=message):
        export.to("bitnet", run_stages(llama, passes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_shapes_and_classes_that_do_not_fit(make_checkpoint, run_stages, tmp_path):
    with pytest.raises(BadInput, match="Conv1D"):
        export.to("bitnet", run_stages(make_checkpoint("gpt2"), TERNARY), tmp_path / "out")
    odd = make_checkpoint("llama", intermediate_size=102)
    with pytest.raises(BadInput, match="its outputs, 102, are no multiple of 4"):
        export.to("bitnet", run_stages(odd, TERNARY), tmp_path / "out")


def test_the_command_line_writes_it(artifact, cli, tmp_path):
    outcome = cli("export", artifact, "--to", "bitnet", "-o", tmp_path / "out")
    assert outcome.code == 0 and (tmp_path / "out" / "tokenizer.json").exists()
