"""Sparse storage: what it saves, that nothing else changes, and what becomes of it later."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from compress import Pipeline
from compress.checkpoint import Checkpoint
from compress.errors import BadInput
from compress.export import to as export_to
from compress.manifest import Manifest
from compress.pipeline import plan
from compress.recipe import Recipe
from compress.skeleton import Skeleton
from compress.weights import Bitmask, BitmaskGrid, LowRank, Masked, Weight

MODEL = "model.safetensors"


def weights_of(artifact: Path) -> dict[str, Weight]:
    skeleton = Skeleton(Checkpoint(artifact))
    return {
        skeleton.module_name(index, local): weight
        for index in range(len(skeleton.blocks)) for local, weight in skeleton.read_weights(index).items()
    }  # fmt: skip


def same_matrices(first: Path, second: Path) -> bool:
    ours, theirs = weights_of(first), weights_of(second)
    assert ours.keys() == theirs.keys()
    return all(weight.dense().equal(theirs[name].dense()) for name, weight in ours.items())


def header_bytes(file: Path) -> int:
    return struct.unpack("<Q", file.read_bytes()[:8])[0]


@pytest.fixture(scope="module")
def half(make_checkpoint) -> Path:
    """A 16-bit model most of whose weights are in its blocks."""
    return make_checkpoint("llama", torch.float16, hidden_size=128, intermediate_size=384, num_hidden_layers=4, head_dim=32)


@pytest.fixture(scope="module")
def plain_and_packed(llama, run_stages) -> Callable[[str], tuple[Path, Path]]:
    """The artifacts of a chain without and with pack at its end; made once."""
    made: dict[str, tuple[Path, Path]] = {}

    def make(chain: str) -> tuple[Path, Path]:
        if chain not in made:
            passes = chain.split()
            made[chain] = run_stages(llama, passes), run_stages(llama, [*passes, "pack"])
        return made[chain]

    return make


def test_half_of_the_weights_take_little_more_than_half_of_the_file(half, run_stages, assert_reloads, reload, tokens):
    plain, packed = run_stages(half, ["wanda:sparsity=0.5"]), run_stages(half, ["wanda:sparsity=0.5", "pack"])
    dense_bytes = (half / MODEL).stat().st_size
    assert (packed / MODEL).stat().st_size <= 0.6 * dense_bytes <= 0.6 * (plain / MODEL).stat().st_size + 1000
    assert same_matrices(plain, packed)
    model = assert_reloads(packed)
    with torch.no_grad():
        assert model(tokens).logits.equal(reload(plain)(tokens).logits)
    record = next(iter(Manifest.read(packed).modules.values()))
    assert (record.kind, record.sparsity, record.numel) == ("bitmask", 0.5, record.shape[0] * record.shape[1] // 2)
    assert record.nbytes == record.ideal_nbytes == record.dense_nbytes * 9 // 16


@pytest.mark.parametrize(
    ("chain", "kind"),
    [
        ("wanda:pattern=2:4 gptq:bits=4,group_size=16,symmetric=false", BitmaskGrid),
        ("svd_llm:ratio=0.7 wanda:sparsity=0.5", LowRank),
    ],
)
def test_only_the_storage_changes(chain, kind, plain_and_packed, assert_reloads, llama):
    plain, packed = plain_and_packed(chain)
    assert same_matrices(plain, packed)
    assert_reloads(packed, remote=True)
    before, after = (Manifest.read(artifact) for artifact in (plain, packed))
    assert after.tier == "shim" and after.parameters == before.parameters
    for name, weight in weights_of(packed).items():
        assert isinstance(weight, kind)
        old, new = before.modules[name], after.modules[name]
        assert new.nbytes == weight.nbytes < old.nbytes
        assert (new.sparsity, new.bits, new.group_size, new.rank) == (old.sparsity, old.bits, old.group_size, old.rank)
        factors = [weight.down, weight.up] if isinstance(weight, LowRank) else [weight]
        assert all(isinstance(factor, Bitmask | BitmaskGrid) for factor in factors)
    planned = plan(Recipe.parse({"model": str(llama), "passes": [*chain.split(), "pack"]}))
    assert planned.tier == "shim" and abs(planned.predicted_bytes - after.nbytes) < header_bytes(packed / MODEL)


def test_what_has_no_mask_or_would_not_shrink_is_left_alone(llama, run_stages):
    artifact = run_stages(llama, ["magnitude:targets=q_proj", "magnitude:targets=k_proj,sparsity=0.01", "pack"])
    for name, weight in weights_of(artifact).items():
        assert isinstance(weight, Bitmask) == name.endswith("q_proj")
        assert isinstance(weight, Masked) == name.endswith("k_proj")
    untouched = run_stages(llama, ["pack"])
    assert Checkpoint(untouched).base_model_type == "llama" and Manifest.read(untouched).tier == "native"


@pytest.mark.parametrize("then", ["gptq:group_size=16", "awq:bits=4,group_size=16"])
def test_a_later_pass_finds_a_masked_matrix(then, plain_and_packed, run_stages):
    plain, packed = plain_and_packed("magnitude:sparsity=0.7")
    once, twice = run_stages(plain, [then]), run_stages(packed, [then])
    assert same_matrices(once, twice) and Manifest.read(twice).tier != "shim"
    assert load_file(once / MODEL).keys() == load_file(twice / MODEL).keys()
    assert [step.method for step in Manifest.read(twice).steps] == ["magnitude", "pack", then.partition(":")[0]]


def test_training_keeps_the_mask(plain_and_packed, run_stages, make_pass):
    plain, packed = plain_and_packed("magnitude:sparsity=0.7")
    once, twice = (run_stages(artifact, [make_pass("logit_kd"), "pack"]) for artifact in (plain, packed))
    assert same_matrices(once, twice) and (once / MODEL).read_bytes() == (twice / MODEL).read_bytes()
    assert not same_matrices(packed, twice)
    for name, weight in weights_of(packed).items():
        assert weight.mask.equal(weights_of(twice)[name].mask)


def test_layers_that_a_later_pass_leaves_stay_packed(plain_and_packed, run_stages, assert_reloads):
    _, packed = plain_and_packed("magnitude:sparsity=0.7")
    for passes in (["rtn:group_size=16,targets=q_proj"], ["embeddings:bits=8"]):
        artifact = run_stages(packed, passes)
        assert_reloads(artifact)
        kinds = {name: isinstance(weight, Bitmask) for name, weight in weights_of(artifact).items()}
        assert all(packed != (name.endswith("q_proj") and "rtn" in passes[0]) for name, packed in kinds.items())


def test_a_plan_knows_the_masks_of_an_artifact(plain_and_packed):
    plain, packed = plain_and_packed("magnitude:sparsity=0.7")
    planned = plan(Recipe.parse({"model": str(plain), "passes": ["pack"]}))
    assert abs(planned.predicted_bytes - Manifest.read(packed).nbytes) < header_bytes(packed / MODEL)


class Interrupted(Exception):
    pass


def test_an_interrupted_run_reads_its_blocks_back(llama, calibration, tmp_path):
    def start(out: Path, message: str) -> bytes:
        def progress(done: int, total: int, said: str) -> None:
            if said.startswith(message):
                raise Interrupted

        passes = ["wanda:sparsity=0.6", "gptq:bits=3,group_size=16,targets=*_proj,skip=up_proj", "pack"]
        with pytest.raises(Interrupted):
            Pipeline(passes, calibration=calibration, evaluate=False).run(llama, out, progress=progress)
        file = out.with_name(f"{out.name}.partial") / "stage-0" / "artifact" / MODEL
        return file.read_bytes() if file.exists() else b""

    undisturbed = start(tmp_path / "once", "reloading")
    assert start(tmp_path / "twice", "block 2") == b""
    assert start(tmp_path / "twice", "reloading") == undisturbed


def test_exports(plain_and_packed, tmp_path, reload, tokens):
    plain, packed = plain_and_packed("wanda:pattern=2:4 gptq:bits=4,group_size=16,symmetric=false")
    dense = export_to("dense", packed, tmp_path / "dense")
    assert json.loads((dense / "config.json").read_text())["model_type"] == "llama"
    with torch.no_grad():
        assert reload(dense)(tokens).logits.equal(reload(packed)(tokens).logits)
    with pytest.raises(BadInput, match=r"bitmask_grid has no place in the gptq format.*--to dense"):
        export_to("gptq", packed, tmp_path / "gptq")
    pytest.importorskip("gguf")
    files = [export_to("gguf:q8_0", source, tmp_path / name) for name, source in (("plain", plain), ("packed", packed))]
    assert files[0].read_bytes() == files[1].read_bytes()
