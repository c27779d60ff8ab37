"""AutoAWQ's format: packing against an unpacker written from its description, whole exports against gptqmodel itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from compress import export
from compress.errors import BadInput
from compress.export import awq
from compress.weights import Quantized

_NIBBLE_OF_OUTPUT = (0, 4, 1, 5, 2, 6, 3, 7)  # where, among a word's nibbles, each of eight consecutive outputs lies


def unpack(words: Tensor) -> Tensor:
    """(n, out / 8) int32 -> (n, out)."""
    return torch.stack([words >> 4 * nibble & 15 for nibble in _NIBBLE_OF_OUTPUT], dim=-1).flatten(1)


def decode(tensors: dict[str, Tensor]) -> Tensor:
    """The (out, in) matrix, float32, that the tensors of a layer stand for."""
    codes, zeros, scales = unpack(tensors["qweight"]), unpack(tensors["qzeros"]), tensors["scales"].float()
    group_size = len(codes) // len(scales)
    return ((codes - zeros.repeat_interleave(group_size, 0)).float() * scales.repeat_interleave(group_size, 0)).T


@st.composite
def grids(draw) -> tuple[Quantized, int]:
    """A 4-bit matrix and a group size that divides its own."""
    out_features, group_size, n_groups = 8 * draw(st.integers(1, 4)), 2 * draw(st.integers(1, 20)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    codes = torch.randint(-8, 8, (out_features, group_size * n_groups), generator=generator).to(torch.int8)
    scale = torch.rand(out_features, n_groups, generator=generator).half().clamp(min=1e-3)
    zero_point = torch.randint(-8, 8, scale.shape, generator=generator).to(torch.int8) if draw(st.booleans()) else None
    return Quantized(codes, scale, zero_point, 4), draw(st.sampled_from((-1, group_size, group_size // 2)))


@settings(deadline=None, max_examples=60)
@given(grids())
def test_tensors_decode_to_the_grid(drawn: tuple[Quantized, int]):
    weight, group_size = drawn
    tensors = awq.tensors(weight, group_size)
    out_features, in_features = weight.shape
    n_groups = weight.scale.shape[1] if group_size == -1 else in_features // group_size
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()} == {
        "qweight": ((in_features, out_features // 8), torch.int32),
        "qzeros": ((n_groups, out_features // 8), torch.int32),
        "scales": ((n_groups, out_features), torch.float16),
    }
    assert torch.equal(decode(tensors).half(), weight.dense())


def test_one_word():
    """The nibbles of the outputs 0 to 7, lowest first: 0 2 4 6 1 3 5 7, as AutoAWQ's packing order says."""
    weight = Quantized(torch.arange(-8, 0, dtype=torch.int8).reshape(8, 1), torch.ones(8, 1).half(), None, 4)
    assert awq.tensors(weight, -1)["qweight"].tolist() == [[0x75316420]]
    assert awq.tensors(weight, -1)["qzeros"].item() & 0xFFFFFFFF == 0x88888888


PARTLY_DENSE = [{"gptq": {"bits": 4, "group_size": 32, "symmetric": False, "skip": ["lm_head", "*.1.mlp.down_proj"]}}]


@pytest.fixture(scope="module")
def model(make_checkpoint) -> Path:
    return make_checkpoint("llama-untied", torch.float16, intermediate_size=128)


def test_files(model: Path, run_stages, tmp_path: Path):
    """The tensors of every layer decode to what the dense export holds; everything else is as in the source."""
    artifact = run_stages(model, ["wanda:sparsity=0.5", *PARTLY_DENSE])
    export.to("awq", artifact, tmp_path / "awq")
    export.to("dense", artifact, tmp_path / "dense")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["awq", "dense"]
    config, before = (json.loads((path / "config.json").read_text()) for path in (tmp_path / "awq", model))
    assert config.pop("quantization_config") == {
        "quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm",
        "modules_to_not_convert": ["lm_head", "model.layers.1.mlp.down_proj"],
        "dynamic": {r"-:^model\.layers\.(1)\.(mlp\.down_proj)$": {}},
    }  # fmt: skip
    assert config == before

    stored, dense = load_file(tmp_path / "awq" / "model.safetensors"), load_file(tmp_path / "dense" / "model.safetensors")
    for name, values in dense.items():
        module = name.removesuffix(".weight")
        if f"{module}.qweight" not in stored:
            assert torch.equal(stored.pop(name), values)
            continue
        decoded = decode({leaf: stored.pop(f"{module}.{leaf}") for leaf in ("qweight", "qzeros", "scales")})
        assert torch.equal(decoded.half(), values)
        assert int((decoded == 0).sum()) >= decoded.numel() // 2
    assert not stored


@pytest.mark.parametrize("how", ["awq_torch", "transformers"])
@pytest.mark.parametrize(("passes", "count"), [(["wanda:sparsity=0.5", "gptq:bits=4,group_size=64"], 14), (PARTLY_DENSE, 13)])
def test_gptqmodel_reads_the_same_model(
    model: Path, run_stages, read_back, assert_reads_as, tmp_path: Path, passes, count: int, how: str
):
    artifact = run_stages(model, passes)
    awq.export(artifact, tmp_path / "awq")
    export.to("dense", artifact, tmp_path / "dense")
    assert_reads_as(read_back(tmp_path / "awq", how), tmp_path / "dense", count, exact=how != "transformers")


@pytest.mark.parametrize(
    ("family", "passes", "reason"),
    [
        ("llama", ["rtn:bits=8,group_size=-1"], "awq holds 4-bit codes, this layer has 8; `--to gptq`"),
        ("llama", ["wanda:sparsity=0.5"], "holds no quantized layer"),
        ("llama", ["svd_llm:ratio=0.6", "rtn:bits=4,group_size=-1"], "low_rank has no place in the awq format"),
        ("gpt2", ["rtn:bits=4,group_size=-1"], "gpt2: readers of awq replace nn.Linear layers"),
        ("gpt_neox", ["rtn:bits=4,group_size=-1"], "gpt_neox: transformers expects awq files of this architecture"),
    ],
)
def test_refuses(make_checkpoint, run_stages, tmp_path: Path, family: str, passes: list[str], reason: str):
    with pytest.raises(BadInput, match=reason):
        awq.export(run_stages(make_checkpoint(family), passes), tmp_path / "awq")
    assert not list(tmp_path.iterdir())
