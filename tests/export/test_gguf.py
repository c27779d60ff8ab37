"""GGUF files say what llama.cpp wants to read, and llama.cpp computes from them what transformers computes from the source."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from compress.checkpoint import Checkpoint
from compress.errors import BadInput
from compress.export.gguf import VARIANTS, export, pack_grid, rounds_to_itself
from compress.skeleton import Skeleton
from compress.weights import Dense, Masked, Quantized
from tests.gguf_reading import Read

gguf = pytest.importorskip("gguf", reason="needs the gguf package: pip install 'compress-lm[gguf]'")

LONG_ROPE = {
    "rope_type": "longrope", "rope_theta": 500.0, "original_max_position_embeddings": 512, "factor": 2.0,
    "short_factor": [1.1] * 8, "long_factor": [1.0 + i for i in range(8)],
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip


# what is in the file


def test_names_types_and_metadata_of_llama(make_checkpoint, write):
    source = make_checkpoint("llama")
    read = Read(write(source))
    block = {"attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down", "attn_norm", "ffn_norm"}
    expected = {f"blk.{i}.{name}.weight" for i in range(2) for name in block} | {"token_embd.weight", "output_norm.weight"}
    assert set(read.tensors) == expected  # a tied head is not written again
    assert {kind for name, kind in read.types.items() if "norm" in name} == {"F32"}
    assert {kind for name, kind in read.types.items() if "norm" not in name} == {"F16"}
    wanted = {
        "general.architecture": "llama", "llama.block_count": 2, "llama.context_length": 128, "llama.embedding_length": 64,
        "llama.feed_forward_length": 112, "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 16, "llama.rope.dimension_count": 16, "llama.rope.freq_base": 10000.0,
        "llama.vocab_size": 256, "general.file_type": 1,
    }  # fmt: skip
    assert {key: read.metadata[key] for key in wanted} == wanted
    assert read.metadata["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)


def test_rotary_halves_become_pairs(make_checkpoint, write):
    """Component i of a half, and its partner of the other half, lie side by side."""
    source = make_checkpoint("llama-untied")
    read, checkpoint = Read(write(source, "f32")), Checkpoint(source)
    for name, heads in (("q", 4), ("k", 2)):
        for kind in ("weight", "bias"):
            own = checkpoint.tensor(f"model.layers.1.self_attn.{name}_proj.{kind}")
            found = read.tensors[f"blk.1.attn_{name}.{kind}"]
            for head in range(heads):
                for i in range(8):
                    assert torch.equal(found[head * 16 + 2 * i], own[head * 16 + i])
                    assert torch.equal(found[head * 16 + 2 * i + 1], own[head * 16 + 8 + i])
    value = checkpoint.tensor("model.layers.1.self_attn.v_proj.weight")
    assert torch.equal(read.tensors["blk.1.attn_v.weight"], value)
    assert torch.equal(read.tensors["output.weight"], checkpoint.tensor("lm_head.weight"))


def test_gemma2_norms_are_shifted_and_scores_rescaled(make_checkpoint, write):
    source = make_checkpoint("gemma2", query_pre_attn_scalar=64)
    read, checkpoint = Read(write(source, "f32")), Checkpoint(source)
    for own, name in (("model.norm", "output_norm"), ("model.layers.1.post_feedforward_layernorm", "blk.1.post_ffw_norm")):
        assert torch.equal(read.tensors[f"{name}.weight"], checkpoint.tensor(f"{own}.weight") + 1)
    query = checkpoint.tensor("model.layers.0.self_attn.q_proj.weight")
    torch.testing.assert_close(read.tensors["blk.0.attn_q.weight"], query / 2)  # llama.cpp divides by sqrt(head size 16)
    assert read.metadata["gemma2.attention.sliding_window"] == 12
    assert list(read.metadata["gemma2.attention.sliding_window_pattern"]) == [True, False]


def test_gpt_neox_rows_by_query_key_value(make_checkpoint, write):
    source = make_checkpoint("gpt_neox")
    read, checkpoint = Read(write(source, "f32")), Checkpoint(source)
    own = checkpoint.tensor("gpt_neox.layers.0.attention.query_key_value.weight").reshape(4, 3, 16, 64)
    assert torch.equal(read.tensors["blk.0.attn_qkv.weight"], torch.cat([own[:, i].reshape(64, 64) for i in range(3)]))


def test_rows_that_blocks_do_not_divide_stay_f16(make_checkpoint, write, caplog):
    """112 inputs of down_proj are no multiple of 32."""
    with caplog.at_level(logging.WARNING):
        read = Read(write(make_checkpoint("llama"), "q4_0"))
    assert read.types["blk.0.ffn_down.weight"] == "F16" and read.types["blk.0.ffn_up.weight"] == "Q4_0"
    assert read.types["token_embd.weight"] == "Q8_0"
    assert "mlp.down_proj" in caplog.text and "stays f16" in caplog.text


@pytest.mark.parametrize(
    "variant", [v for v in VARIANTS if v in ("bf16", "q5_0", "q5_1", "q4_1", "q8_0", "mxfp4", "tq1_0", "tq2_0")]
)
def test_types_of_the_package(make_checkpoint, write, variant: str):
    source = make_checkpoint("llama", hidden_size=256, intermediate_size=256, num_hidden_layers=1)
    read = Read(write(source, variant))
    assert read.types["blk.0.ffn_down.weight"] == variant.upper()
    own = Checkpoint(source).tensor("model.layers.0.mlp.down_proj.weight")
    error = (read.tensors["blk.0.ffn_down.weight"] - own).norm() / own.norm()
    assert error < {"bf16": 3e-3, "q8_0": 1e-2, "q5_0": 0.06, "q5_1": 0.06}.get(variant, 0.15 if "tq" not in variant else 1)


def test_a_window_that_llama_cpp_lacks_bounds_the_context(make_checkpoint, write, caplog):
    with caplog.at_level(logging.WARNING):
        read = Read(write(make_checkpoint("mistral")))
    assert read.metadata["llama.context_length"] == 12
    assert "context of 12" in caplog.text


# grids


def grid(bits: int, group: int, symmetric: bool, seed: int = 0) -> Quantized:
    draw = torch.Generator().manual_seed(seed)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    codes = torch.randint(low, high, (6, 128), generator=draw, dtype=torch.int8)
    scale = torch.rand(6, 128 // group, generator=draw) * 0.02 + 0.001
    zero = None if symmetric else torch.randint(low, high, scale.shape, generator=draw, dtype=torch.int8)
    return Quantized(codes, scale, zero, bits)


@pytest.mark.parametrize(
    ("bits", "group", "symmetric", "kind"),
    [
        (4, 32, True, "Q4_0"), (4, 128, True, "Q4_0"), (3, 64, True, "Q4_0"), (2, 32, True, "Q4_0"), (4, 32, False, "Q4_1"),
        (3, 32, False, "Q4_1"), (4, 32, False, "Q5_0"), (5, 64, True, "Q5_0"), (5, 32, False, "Q5_1"), (4, 32, True, "Q5_1"),
        (8, 32, True, "Q8_0"), (4, 128, False, "Q8_0"), (7, 32, False, "Q8_0"),
    ],
)  # fmt: skip
def test_a_grid_keeps_its_codes(bits: int, group: int, symmetric: bool, kind: str):
    """Only the scales are rounded, to half precision."""
    weight = grid(bits, group, symmetric)
    packed = pack_grid(weight, kind)
    assert packed is not None
    found = torch.from_numpy(gguf.dequantize(packed, gguf.GGMLQuantizationType[kind]).copy())
    torch.testing.assert_close(found, weight.dense(), rtol=0, atol=float(weight.scale.max()) * 2**bits * 2**-11)
    order = torch.randperm(6)
    moved = pack_grid(Masked(weight, torch.ones(6, 128, dtype=torch.bool)), kind, order, 0.5)
    assert moved is not None
    found = torch.from_numpy(gguf.dequantize(moved, gguf.GGMLQuantizationType[kind]).copy())
    torch.testing.assert_close(found, 0.5 * weight.dense()[order], rtol=0, atol=float(weight.scale.max()) * 2**bits * 2**-12)


@pytest.mark.parametrize(
    ("weight", "kind"),
    [
        (grid(4, 16, True), "Q4_0"), (grid(5, 32, True), "Q4_0"), (grid(8, 32, False), "Q8_0"), (grid(5, 32, False), "Q4_1"),
        (grid(4, 32, True), "F16"), (Dense(torch.ones(6, 128)), "Q4_0"),
        (Quantized(*vars(grid(4, 32, True)).values()).rebuild({"scale": torch.full((6, 4), 1e-6)}), "Q4_0"),
    ],
    ids=["narrow groups", "too wide", "unsigned too wide", "minimum too wide", "no blocks", "no grid", "tiny scales"],
)  # fmt: skip
def test_a_grid_that_does_not_fit(weight, kind: str):
    assert pack_grid(weight, kind) is None


@pytest.mark.parametrize(
    ("passes", "variant"),
    [(("gptq:bits=4,group_size=32,full_range=false",), "q4_0"), (("wanda", "rtn:bits=4,group_size=32,symmetric=false"), "q4_1")],
)
def test_an_artifact_keeps_its_grid(make_checkpoint, run_stages, write, passes: tuple[str, ...], variant: str):
    artifact = run_stages(make_checkpoint("qwen2", intermediate_size=128), passes)
    read = Read(write(artifact, variant))
    weight = Skeleton(Checkpoint(artifact)).read_weights(1)["mlp.up_proj"]
    own, found = weight.dense(torch.float32), read.tensors["blk.1.ffn_up.weight"]
    assert read.types["blk.1.ffn_up.weight"] == variant.upper()
    assert (found - own).norm() < 1e-3 * own.norm()
    kind = gguf.GGMLQuantizationType[variant.upper()]
    anew = torch.from_numpy(gguf.dequantize(gguf.quantize(own.numpy(), kind), kind).copy())
    assert variant == "q4_1" or (anew - own).norm() > 1e-2 * own.norm()  # rounded anew, it is no longer what GPTQ made


def test_a_grid_rounded_twice_is_reported(make_checkpoint, run_stages, write, caplog):
    artifact = run_stages(make_checkpoint("llama"), ("rtn:bits=8,group_size=32",))
    with caplog.at_level(logging.WARNING):
        write(artifact, "f16")
        assert "second time" not in caplog.text
        write(artifact, "q4_0")
    assert "12 quantized layers do not fit the blocks of q4_0" in caplog.text  # down_proj is f16 and was not rounded again


@pytest.mark.parametrize("variant", ["tq1_0", "tq2_0"])
def test_ternary_matrices_keep_their_codes(variant: str, make_checkpoint, run_stages, write, caplog):
    """Also in rows that 256 does not divide, for which there is a wider type, and with a scale for every row."""
    source = make_checkpoint("llama", hidden_size=256, intermediate_size=224, num_hidden_layers=1)
    artifact = run_stages(source, ["bitnet:steps=1,batch_size=2,length=16,per_row=true"])
    with caplog.at_level(logging.WARNING):
        read = Read(write(artifact, variant))
    assert "second time" not in caplog.text
    assert "rows of 224 are no multiple of the 256" in caplog.text and "becomes q4_0" in caplog.text
    for local, name, kind in (("up_proj", "ffn_up", variant.upper()), ("down_proj", "ffn_down", "Q4_0")):
        weight, found = Skeleton(Checkpoint(artifact)).read_weights(0)[f"mlp.{local}"], read.tensors[f"blk.0.{name}.weight"]
        assert isinstance(weight, Quantized) and read.types[f"blk.0.{name}.weight"] == kind
        assert torch.equal(found.sign().to(torch.int8), weight.codes)
        torch.testing.assert_close(found, weight.dense(), rtol=2**-11, atol=0)


def test_only_ternary_grids_round_to_themselves():
    codes = torch.randint(-1, 2, (4, 512), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    scale = torch.full((4, 2), 0.02)
    assert rounds_to_itself(Quantized(codes, scale, None, 2), "TQ2_0")
    assert rounds_to_itself(Quantized(codes, scale, None, 2).masked(codes > 0), "TQ1_0")
    assert not rounds_to_itself(Quantized(codes, scale, None, 2), "Q4_0")
    assert not rounds_to_itself(Quantized(codes * 2, scale, None, 3), "TQ2_0")
    assert not rounds_to_itself(Quantized(codes, torch.full((4, 4), 0.02), None, 2), "TQ2_0")
    assert not rounds_to_itself(Quantized(codes, scale * 1e-6, None, 2), "TQ2_0")


def test_other_grids_in_a_ternary_type_are_reported(make_checkpoint, run_stages, write, caplog):
    source = make_checkpoint("llama", hidden_size=256, intermediate_size=256, num_hidden_layers=1)
    with caplog.at_level(logging.WARNING):
        write(run_stages(source, ["rtn:bits=4"]), "tq2_0")
    assert "7 quantized layers do not fit the blocks of tq2_0" in caplog.text


# refusals


def test_refusals(make_checkpoint, tmp_path: Path, monkeypatch):
    source = make_checkpoint("llama")
    with pytest.raises(BadInput, match=r"gguf:q4_9: unknown type.*did you mean"):
        export(source, tmp_path / "out.gguf", variant="q4_9")
    with pytest.raises(BadInput, match="'opt' has no GGUF form"):
        export(make_checkpoint("opt"), tmp_path / "out.gguf")
    with pytest.raises(BadInput, match="replace its own source"):
        export(source, source, overwrite=True)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(BadInput, match="not a GGUF file"):
        export(source, tmp_path / "notes.txt", overwrite=True)
    out = export(source, tmp_path / "out.gguf")
    before = out.read_bytes()
    with pytest.raises(BadInput, match="exists already"):
        export(source, out)
    export(source, out, overwrite=True)
    assert out.read_bytes() == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["notes.txt", "out.gguf"]

    def absent(name: str):
        raise ImportError(name)

    monkeypatch.setattr("compress.export.gguf.importlib.import_module", absent)
    with pytest.raises(BadInput, match=r"pip install 'compress-lm\[gguf\]'"):
        export(source, tmp_path / "other.gguf")


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type 'dynamic'"),
        ("qwen2", {"rope_parameters": LLAMA3}, "rope_type 'llama3'"),
        ("qwen3", {"rope_parameters": {**YARN, "beta_fast": 16}}, "beta_fast 32"),
        ("llama", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "rotates whole heads"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ("gemma2", {"final_logit_softcapping": None}, "without soft-capped"),
        ("phi3", {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}, "do not add up"),
    ],
)
def test_what_llama_cpp_does_not_compute(make_checkpoint, edited, tmp_path: Path, family: str, changes: dict, message: str):
    source = edited(make_checkpoint(family), changes)
    with pytest.raises(BadInput, match=message):
        export(source, tmp_path / "out.gguf")
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_weights_beyond_half_precision(make_checkpoint, tmp_path: Path):
    from safetensors.torch import load_file, save_file

    source = tmp_path / "model"
    shutil.copytree(make_checkpoint("llama"), source)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e5
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInput, match=r"up_proj.*use bf16 or f32"):
        export(source, tmp_path / "out.gguf")
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]
    assert export(source, tmp_path / "out.gguf", variant="bf16").exists()


# llama.cpp itself


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


ARCHITECTURES = [  # family, changes of its tiny configuration, edits of config.json
    ("llama", {}, {}), ("llama-untied", {"mlp_bias": True, "head_dim": 32}, {}), ("mistral", {"sliding_window": None}, {}),
    ("qwen2", {}, {}), ("qwen3", {}, {}), ("gemma2", {}, {}), ("phi3", {"sliding_window": None}, {}), ("gpt2", {}, {}),
    ("gpt_neox", {}, {}), ("gpt_neox", {"use_parallel_residual": False, "tie_word_embeddings": True}, {}),
    ("gpt2", {"tie_word_embeddings": False}, {}), ("llama", {}, {"rope_parameters": LLAMA3}),
    ("llama", {}, {"rope_parameters": YARN}), ("qwen3", {}, {"rope_parameters": {**YARN, "attention_factor": 1.3}}),
    ("llama", {}, {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}}),
    ("phi3", {"sliding_window": None}, {"rope_parameters": {"rope_theta": 500.0, "partial_rotary_factor": 0.75}}),
    ("phi3", {"sliding_window": None, "original_max_position_embeddings": 512}, {"rope_parameters": LONG_ROPE}),
    ("gemma2", {"num_hidden_layers": 3, "query_pre_attn_scalar": 40}, {
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
    }),
]  # fmt: skip


@pytest.mark.parametrize(
    ("family", "changes", "edits"), ARCHITECTURES, ids=lambda v: v if isinstance(v, str) else ",".join(v) or "-"
)
def test_logits(make_checkpoint, edited, reload, tokens, write, llama_logits, family: str, changes: dict, edits: dict):
    """f32 in f32: equal but for the order of sums, and for the table of GELU values in half precision that llama.cpp uses."""
    source = edited(make_checkpoint(family, **changes), edits)
    with torch.no_grad():
        expected = reload(source)(input_ids=tokens[:1]).logits[0]
    found = llama_logits(write(source, "f32"), tokens[0])
    assert difference(found, expected) < (1e-3 if family in ("gemma2", "gpt2", "gpt_neox") else 1e-5)


@pytest.mark.parametrize(
    ("family", "passes"),
    [
        ("llama", ("wanda", "gptq:bits=4,group_size=32")),
        ("qwen2", ("svd:ratio=0.5", "rtn:bits=8,group_size=16")),
        ("gpt2", ("rtn:bits=8,group_size=16",)),
    ],
)
def test_logits_of_artifacts(make_checkpoint, run_stages, reload, tokens, write, llama_logits, family: str, passes: tuple):
    artifact = run_stages(make_checkpoint(family), passes)
    with torch.no_grad():
        expected = reload(artifact)(input_ids=tokens[:1]).logits[0]
    file = write(artifact, "f32")
    assert difference(llama_logits(file, tokens[0]), expected) < 1e-3
    assert Read(file).metadata["tokenizer.ggml.model"] == "gpt2"


@pytest.mark.parametrize(
    ("variant", "low", "high"),
    [("f16", 1e-5, 1e-3), ("q8_0", 1e-3, 0.03), ("q4_0", 0.01, 0.15), ("q4_k_m", 0.01, 0.12)],
)
def test_logits_of_the_demo_model(reload, write, llama_logits, variant: str, low: float, high: float):
    """Rounding shows, a little."""
    from compress.demo import MODEL

    tokens = torch.randint(0, 2048, (48,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = reload(MODEL)(input_ids=tokens[None]).logits[0]
    assert low < difference(llama_logits(write(MODEL, variant), tokens), expected) < high
