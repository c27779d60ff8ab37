"""ShortGPT: what influence is, which blocks go, and that what is left is the model without them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from compress.checkpoint import Checkpoint
from compress.errors import BadInput
from compress.prune.shortgpt import ShortGPT, influence
from compress.skeleton import Skeleton
from compress.walk import Walk


@pytest.fixture(scope="module")
def four(make_checkpoint):
    return make_checkpoint("llama", num_hidden_layers=4)


@pytest.fixture
def idle(four, tmp_path):
    """A copy of the model whose block 1 adds nothing to the stream."""
    shutil.copytree(four, tmp_path / "idle")
    tensors = load_file(tmp_path / "idle" / "model.safetensors")
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        tensors[f"model.layers.1.{name}.weight"].zero_()
    save_file(tensors, tmp_path / "idle" / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "idle"


@torch.no_grad()
def logits_without(model: nn.Module, gone: set[int], tokens: torch.Tensor) -> torch.Tensor:
    """What the model computes when those of its blocks are left out."""
    inner = model.get_submodule("model")
    blocks = inner.layers
    inner.layers = nn.ModuleList(block for index, block in enumerate(blocks) if index not in gone)
    inner.config.num_hidden_layers = len(inner.layers)
    logits = model(input_ids=tokens, use_cache=False).logits
    inner.layers, inner.config.num_hidden_layers = blocks, len(blocks)
    return logits


def origins(artifact: Path, source: Path) -> list[int]:
    """Which of the source's blocks each of the artifact's was, by its norms."""
    new, old = ([next(iter(m.read_others(i).values())) for i in range(len(m.blocks))] for m in
                (open_skeleton(artifact), open_skeleton(source)))  # fmt: skip
    return [next(index for index, norm in enumerate(old) if norm.equal(own)) for own in new]


def open_skeleton(directory: Path) -> Skeleton:
    return Skeleton(Checkpoint(directory))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1), st.floats(0.01, 100))
def test_influence_is_a_turn(seed, factor):
    x, y = torch.randn(2, 40, 3, 8, generator=torch.Generator().manual_seed(seed)).unbind()
    assert 0 <= influence(x, y) <= 2
    assert influence(x, y * factor) == pytest.approx(influence(x, y), abs=1e-6)
    assert influence(x, x * factor) == pytest.approx(0, abs=1e-6) and influence(x, -x) == pytest.approx(2)


def test_a_block_that_adds_nothing_has_no_influence_and_goes(idle, tokens, tmp_path, run_stages, reload):
    found = ShortGPT().measure(Walk(Skeleton(Checkpoint(idle)), tokens, tmp_path))
    assert found[1] == pytest.approx(0, abs=1e-9) and all(value > 1e-3 for value in found[:1] + found[2:])
    artifact = run_stages(idle, [ShortGPT(blocks=1)])
    with torch.no_grad():
        assert reload(artifact)(tokens).logits.equal(reload(idle)(tokens).logits)


def test_the_least_go_and_the_last_stays():
    assert ShortGPT().removed([0.4, 0.1, 0.3, 0.2, 0.0], 2) == [1, 3]


def test_how_many_go(four):
    model = Skeleton(Checkpoint(four))
    counts = {0.0: 0, 0.1: 1, 0.25: 1, 0.5: 2, 0.74: 2, 0.75: 3, 0.99: 3}
    assert {sparsity: ShortGPT(sparsity=sparsity).n_removed(model) for sparsity in counts} == counts
    assert ShortGPT(blocks=0).n_removed(model) == 0
    with pytest.raises(BadInput, match="4 blocks one must stay"):
        ShortGPT(blocks=4).n_removed(model)


@pytest.mark.parametrize("family", ["gemma2", "qwen2", "qwen3", "gpt2"])
def test_what_is_said_of_each_block_follows_it(family, make_checkpoint, tokens, tmp_path, run_stages, reload):
    """Layers that see a window keep seeing it, also where the file leaves it to a layer's place which do."""
    changes = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2} if family.startswith("qwen") else {}
    source = tmp_path / "model"
    shutil.copytree(make_checkpoint(family, **{"n_layer" if family == "gpt2" else "num_hidden_layers": 5}, **changes), source)
    config = json.loads((source / "config.json").read_text())
    kinds = config.pop("layer_types", None)
    (source / "config.json").write_text(json.dumps(config))
    artifact = run_stages(source, [ShortGPT(blocks=2)])
    kept = origins(artifact, source)
    gone = set(range(5)) - set(kept)
    assert len(kept) == 3 and kept == sorted(kept) and 4 in kept
    after = json.loads((artifact / "config.json").read_text())
    assert after["n_layer" if family == "gpt2" else "num_hidden_layers"] == 3
    assert after.get("layer_types") == (kinds and [kinds[index] for index in kept])
    assert Checkpoint(artifact).config.num_hidden_layers == 3
    if family == "gpt2":
        return
    with torch.no_grad():
        found, model = reload(artifact)(tokens).logits, reload(source)
        model.config.layer_types = after["layer_types"]
        expected = logits_without(model, gone, tokens)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_cached_generation_is_that_without_a_cache(family, make_checkpoint, tokens, run_stages, reload):
    model = reload(run_stages(make_checkpoint(family, num_hidden_layers=4), [ShortGPT(blocks=2)]))
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached, plain = (model.generate(tokens, use_cache=use_cache, **settings) for use_cache in (True, False))
    assert cached.shape[1] == tokens.shape[1] + 12 and cached.equal(plain)
    assert [block.self_attn.layer_idx for block in model.model.layers] == [0, 1]
