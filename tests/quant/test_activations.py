"""Rounding of inputs: the reader's numbers, straight-through gradients, hooks, W8A8 and W4A8 end to end."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from compress.activations import Range, round_inputs, rounded
from compress.manifest import Manifest
from compress.methods import parse
from compress.quant.rtn import RTN

KINDS = ["int8", "int4", "fp8"]


def library_rounds(x: torch.Tensor, kind: str) -> torch.Tensor:
    """What compressed-tensors itself makes of a layer's inputs."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, QuantizationStatus
    from compressed_tensors.quantization.lifecycle.forward import forward_quantize

    wanted = QuantizationArgs(
        num_bits=int(kind[-1]), type="float" if kind == "fp8" else "int", symmetric=True, strategy="token", dynamic=True
    )
    module = nn.Linear(x.shape[-1], 1)
    module.quantization_scheme = QuantizationScheme(targets=["Linear"], input_activations=wanted)  # type: ignore[assignment]
    module.quantization_status = QuantizationStatus.COMPRESSED  # type: ignore[assignment]
    return forward_quantize(module, x, "input", wanted)


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 999), magnitude=st.sampled_from([1e-30, 1e-3, 1.0, 300.0, 1e20]), flat=st.booleans())
def test_rounds_as_the_reader_does(kind, seed, magnitude, flat):
    x = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(seed)) * magnitude
    x[0, 0] = 0
    x = x[0] if flat else x
    assert rounded(x, kind).equal(library_rounds(x, kind))
    half = x.clamp(-1e30, 1e30).to(torch.bfloat16)
    assert rounded(half, kind).equal(library_rounds(half, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_each_token_has_its_own_scale_and_is_near_what_it_was(kind):
    x = torch.randn(2, 5, 64) * torch.logspace(-3, 3, 5).unsqueeze(1)
    error = (rounded(x, kind) - x).norm(dim=-1) / x.norm(dim=-1)
    assert bool((error < {"int8": 0.02, "int4": 0.2, "fp8": 0.04}[kind]).all())
    assert rounded(x[:, 2:3], kind).equal(rounded(x, kind)[:, 2:3])


def test_gradients_pass_straight_through():
    x = torch.randn(1, 2, 8, requires_grad=True)
    (rounded(x, "int4") * torch.arange(8.0)).sum().backward()
    assert x.grad is not None and x.grad.equal(torch.arange(8.0).expand(1, 2, 8))


def test_a_module_rounds_until_it_is_told_not_to():
    layer, x = nn.Linear(8, 4), torch.randn(1, 3, 8)
    plain = layer(x)
    for _ in range(2):  # told twice, it still rounds once
        round_inputs(layer, "int4")
        assert layer(x).equal(nn.functional.linear(rounded(x, "int4"), layer.weight, layer.bias))
    round_inputs(layer, None)
    assert layer(x).equal(plain)


def test_grids_use_the_whole_range():
    for numbers in (Range(8, False), Range(4, False), Range(8, True)):
        ends = numbers.nearest(torch.tensor([-numbers.half, numbers.half]) * 2)
        assert ends.tolist() == ([-448, 448] if numbers.is_float else [-(2 ** (numbers.bits - 1)), 2 ** (numbers.bits - 1) - 1])


@pytest.mark.parametrize("method", ["gptq", "rtn"])
@pytest.mark.parametrize("settings", ["bits=8,group_size=-1,activations=int8", "bits=4,group_size=32,activations=int8"])
def test_errors_propagate_and_the_artifact_opens_exactly(method, settings, llama, run_stages, assert_reloads):
    artifact = run_stages(llama, [f"{method}:{settings}"])
    assert_reloads(artifact)
    assert all(record.activations == "int8" for record in Manifest.read(artifact).modules.values())
    without = run_stages(llama, [f"{method}:{settings}".replace("activations=int8", "activations=none")])
    with torch.no_grad():
        tokens = torch.arange(20).unsqueeze(0)
        assert not assert_reloads(artifact)(input_ids=tokens).logits.equal(assert_reloads(without)(input_ids=tokens).logits)


def test_factors_and_training_round_too(llama, make_pass, run_stages, assert_reloads):
    steps = ["svd:ratio=0.7", "rtn:bits=8,group_size=-1,activations=int8", make_pass("logit_kd")]
    artifact = run_stages(llama, steps)
    assert_reloads(artifact, atol=1e-5)
    assert all(record.activations == "int8" for record in Manifest.read(artifact).modules.values())


def test_settings():
    step = parse("rtn:activations=none")
    assert isinstance(step, RTN) and step.activations is None
    assert parse("gptq:activations=fp8").label() == "gptq:activations=fp8"
