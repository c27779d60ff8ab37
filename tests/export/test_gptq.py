"""The GPTQ format: packing against an unpacker written from its description, whole exports against gptqmodel itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from compress import export
from compress.errors import BadInput
from compress.export import gptq
from compress.weights import Quantized

# Of 32 values of 3 bits in three words: by how much each word is shifted for its twelve fields, the last or first of which
# is only the part of a value that did not fit into its neighbour.
_SHIFTS_OF_3 = (
    (0, 3, 6, 9, 12, 15, 18, 21, 24, 27, 30, 0),
    (0, 1, 4, 7, 10, 13, 16, 19, 22, 25, 28, 31),
    (0, 2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 0),
)


def unpack(words: list[int], bits: int) -> list[int]:
    """The values in a column of int32 words."""
    words = [word & 0xFFFFFFFF for word in words]
    if bits != 3:
        return [word >> shift & (1 << bits) - 1 for word in words for shift in range(0, 32, bits)]
    values = []
    for first, second, third in zip(words[::3], words[1::3], words[2::3], strict=True):
        a, b, c = ([word >> shift for shift in shifts] for word, shifts in zip((first, second, third), _SHIFTS_OF_3, strict=True))
        a[10] = a[10] & 3 | b[0] << 2 & 4
        b[11] = b[11] & 1 | c[0] << 1 & 6
        values += [field & 7 for field in (*a[:11], *b[1:12], *c[1:11])]
    return values


def decode(tensors: dict[str, Tensor], bits: int, version: int) -> Tensor:
    """The (out, in) matrix, float32, that the tensors of a layer stand for."""
    codes = torch.tensor([unpack(column, bits) for column in tensors["qweight"].T.tolist()])
    zeros = torch.tensor([unpack(row, bits) for row in tensors["qzeros"].tolist()]).T
    if version == 1:
        zeros = zeros + 1
    groups = tensors["g_idx"].long()
    return (codes - zeros[:, groups]).float() * tensors["scales"].float().T[:, groups]


@st.composite
def grids(draw) -> tuple[Quantized, int]:
    """A quantized matrix whose sides fill whole words, and a group size that divides its own."""
    bits = draw(st.sampled_from((2, 3, 4, 8)))
    unit = {2: 16, 3: 32, 4: 8, 8: 4}[bits]
    out_features = unit * draw(st.integers(1, 2))
    group_size, n_groups = unit * draw(st.integers(1, 2)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    codes = torch.randint(low, high, (out_features, group_size * n_groups), generator=generator).to(torch.int8)
    scale = torch.rand(out_features, n_groups, generator=generator).half().clamp(min=1e-3)
    zero_point = torch.randint(low, high, scale.shape, generator=generator).to(torch.int8) if draw(st.booleans()) else None
    stored = draw(st.sampled_from((-1, group_size, group_size // 2)))
    return Quantized(codes, scale, zero_point, bits), stored


@settings(deadline=None, max_examples=60)
@given(grids())
def test_tensors_decode_to_the_grid(drawn: tuple[Quantized, int]):
    weight, group_size = drawn
    version = 1 if weight.zero_point is None else 2
    tensors = gptq.tensors(weight, group_size, version)
    out_features, in_features = weight.shape
    n_groups = weight.scale.shape[1] if group_size == -1 else in_features // group_size
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()} == {
        "qweight": ((in_features * weight.bits // 32, out_features), torch.int32),
        "qzeros": ((n_groups, out_features * weight.bits // 32), torch.int32),
        "scales": ((n_groups, out_features), torch.float16),
        "g_idx": ((in_features,), torch.int32),
    }
    assert torch.equal(decode(tensors, weight.bits, version).half(), weight.dense())


# whole exports


@pytest.fixture(scope="module")
def model(make_checkpoint) -> Path:
    return make_checkpoint("llama-untied", torch.float16, intermediate_size=128)


def quantization(directory: Path) -> dict:
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    assert json.loads((directory / "quantize_config.json").read_text()) == config
    return config


def test_files(model: Path, run_stages, reload, tmp_path: Path):
    """The tensors of every layer decode to what the dense export holds; everything else is as in the source."""
    artifact = run_stages(model, ["wanda:sparsity=0.5", "gptq:bits=4,group_size=32"])
    export.to("gptq", artifact, tmp_path / "gptq")
    export.to("dense", artifact, tmp_path / "dense")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["dense", "gptq"]
    config, before = (json.loads((path / "config.json").read_text()) for path in (tmp_path / "gptq", model))
    told = config.pop("quantization_config")
    assert config == before
    assert told.pop("meta")["quantizer"][0].startswith("compress:")
    assert told == {
        "quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False, "lm_head": False,
        "checkpoint_format": "gptq", "format": "gptq",
    }  # fmt: skip
    assert (tmp_path / "gptq" / "tokenizer.json").exists()

    stored, dense = load_file(tmp_path / "gptq" / "model.safetensors"), load_file(tmp_path / "dense" / "model.safetensors")
    for name, values in dense.items():
        module = name.removesuffix(".weight")
        if f"{module}.qweight" not in stored:
            assert torch.equal(stored.pop(name), values)
            continue
        tensors = {leaf: stored.pop(f"{module}.{leaf}") for leaf in ("qweight", "qzeros", "scales", "g_idx")}
        decoded = decode(tensors, 4, 1)
        assert torch.equal(decoded.half(), values)
        assert int((decoded == 0).sum()) >= decoded.numel() // 2
    assert not stored


def test_group_sizes_become_their_common_divisor(model: Path, run_stages, tmp_path: Path):
    passes = [
        {"rtn": {"bits": 4, "group_size": 64, "targets": ["*.mlp.*"]}},
        {"rtn": {"bits": 4, "group_size": 32, "targets": ["*.self_attn.o_proj"]}},
        {"rtn": {"bits": 4, "group_size": -1, "targets": ["*.[qkv]_proj"]}},
    ]
    artifact = run_stages(model, passes)
    gptq.export(artifact, tmp_path / "gptq")
    export.to("dense", artifact, tmp_path / "dense")
    assert quantization(tmp_path / "gptq")["group_size"] == 32
    stored, dense = load_file(tmp_path / "gptq" / "model.safetensors"), load_file(tmp_path / "dense" / "model.safetensors")
    for module in ("model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj"):
        tensors = {leaf: stored[f"{module}.{leaf}"] for leaf in ("qweight", "qzeros", "scales", "g_idx")}
        assert torch.equal(decode(tensors, 4, 1).half(), dense[f"{module}.weight"])


MIXED = [
    {"rtn": {"bits": 4, "group_size": 32, "targets": ["*.self_attn.*"], "skip": ["*.1.self_attn.o_proj"]}},
    {"rtn": {"bits": 8, "group_size": 32, "targets": ["*.mlp.*"]}},
]


def test_rules_for_other_bits_and_dense_layers(model: Path, run_stages, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    gptq.export(run_stages(model, MIXED), tmp_path / "gptq")
    config = quantization(tmp_path / "gptq")
    assert config["bits"] == 8
    assert config["dynamic"] == {
        r"+:^model\.layers\.\d+\.(self_attn\.q_proj|self_attn\.k_proj|self_attn\.v_proj|self_attn\.qkv_proj)$": {"bits": 4},
        r"+:^model\.layers\.(0)\.(self_attn\.o_proj)$": {"bits": 4},
        r"-:^model\.layers\.(1)\.(self_attn\.o_proj)$": {},
    }
    assert "model.layers.0.self_attn.o_proj" in config["modules_in_block_to_quantize"][0]
    assert "model.layers.1.self_attn.o_proj" not in config["modules_in_block_to_quantize"][0]
    assert "transformers does not" in caplog.text


def test_the_same_dense_layers_in_every_block(model: Path, run_stages, tmp_path: Path):
    artifact = run_stages(model, [{"rtn": {"bits": 4, "group_size": 32, "targets": ["*.mlp.*"]}}])
    gptq.export(artifact, tmp_path / "gptq")
    assert quantization(tmp_path / "gptq")["modules_in_block_to_quantize"] == [
        ["mlp.gate_proj", "mlp.up_proj"],
        ["mlp.down_proj"],
    ]


@pytest.mark.parametrize(
    ("family", "changes", "passes", "how", "count"),
    [
        ("llama-untied", {"intermediate_size": 128}, ["wanda:sparsity=0.5", "gptq:bits=4,group_size=32"], "gptq_torch", 14),
        ("llama-untied", {"intermediate_size": 128}, ["rtn:bits=3,group_size=32,symmetric=false"], "gptq_torch", 14),
        ("llama-untied", {"intermediate_size": 128}, MIXED, "gptq_torch", 13),
        ("gpt2", {"n_inner": 128}, ["rtn:bits=8,group_size=-1"], "gptq_torch", 8),
        ("qwen3", {"intermediate_size": 128}, ["rtn:bits=2,group_size=32,symmetric=false"], "transformers", 14),
        ("llama-untied", {"intermediate_size": 128}, ["rtn:bits=8,group_size=32,skip=*.1.mlp.down_proj"], "transformers", 13),
    ],
)
def test_gptqmodel_reads_the_same_model(
    make_checkpoint, run_stages, read_back, assert_reads_as, tmp_path: Path, family, changes, passes, how, count
):
    artifact = run_stages(make_checkpoint(family, torch.float16, **changes), passes)
    gptq.export(artifact, tmp_path / "gptq")
    export.to("dense", artifact, tmp_path / "dense")
    assert_reads_as(read_back(tmp_path / "gptq", how), tmp_path / "dense", count)


# refusals


@pytest.mark.parametrize(
    ("passes", "reason"),
    [
        (["wanda:sparsity=0.5"], "holds no quantized layer"),
        (["rtn:bits=5,group_size=32"], "holds codes of 2, 3, 4 or 8 bits, this layer has 5"),
        (["rtn:bits=4,group_size=16"], "one group size for all layers, 32 or a larger power of two"),
        (["svd_llm:ratio=0.6", "rtn:bits=8,group_size=-1"], "low_rank has no place in the gptq format.*--to dense"),
    ],
)
def test_refuses(model: Path, run_stages, tmp_path: Path, passes: list[str], reason: str):
    with pytest.raises(BadInput, match=reason):
        gptq.export(run_stages(model, passes), tmp_path / "gptq")
    assert not list(tmp_path.iterdir())


def test_refuses_sides_that_fill_no_words(llama: Path, run_stages, tmp_path: Path):
    with pytest.raises(BadInput, match=r"inputs are a multiple of 32 and outputs of 32.* 64 inputs and 112 outputs"):
        gptq.export(run_stages(llama, ["rtn:bits=3,group_size=-1"]), tmp_path / "gptq")


@pytest.mark.parametrize(("factor", "reason"), [(1e9, "beyond float16's largest number"), (1e-6, "too few digits")])
def test_refuses_scales_that_float16_cannot_hold(llama: Path, run_stages, tmp_path: Path, factor: float, reason: str):
    artifact = run_stages(llama, ["rtn:bits=4,group_size=-1"])
    tensors = load_file(artifact / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight_scale"] *= factor
    save_file(tensors, artifact / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadInput, match=rf"layers\.1\.mlp\.up_proj: its scales .*{reason}"):
        gptq.export(artifact, tmp_path / "gptq")
    assert not list(tmp_path.iterdir())
