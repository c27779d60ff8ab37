"""Opening: any size in range, at most that and no layer short of what fits; the result is an artifact like any other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from compress.budget import slopes
from compress.checkpoint import Checkpoint, digest_files
from compress.errors import BadInput
from compress.manifest import Manifest
from compress.opening import Opening, _counts, _size, _units, _write, open_stack
from compress.outline import Outline
from compress.progress import silent
from compress.skeleton import Skeleton
from compress.weights import Masked, Quantized, SignedLowRank, prefix

PASSES = {"bitstack": "bitstack:blocks=5", "nested": "nested:group_size=16"}


@pytest.fixture(scope="module")
def store(llama, run_stages) -> Callable[[str], Path]:
    """The artifact of one of ``PASSES``, to be opened."""
    made: dict[str, Path] = {}

    def make(key: str) -> Path:
        if key not in made:
            made[key] = run_stages(llama, [PASSES[key]])
        return made[key]

    return make


@pytest.fixture
def opened(tmp_path) -> Callable[..., Path]:
    """``opened(artifact, size=..., bits=...)``: all of :func:`open_stack` but the reload in a fresh process."""

    def make(source: Path, **wanted: int) -> Path:
        skeleton, step = Skeleton(Checkpoint(source)), Opening(**wanted)
        directory = tmp_path / step.label()
        _write(skeleton, step, _counts(skeleton, step), directory, silent)
        return directory / "artifact"

    return make


def span(source: Path) -> tuple[int, int]:
    """The least and the largest size that an artifact can be opened at."""
    outlined = Outline(Skeleton(Checkpoint(source)))
    units = _units(outlined)
    return _size(outlined, units, [1] * len(units)), _size(outlined, units, [len(unit.costs) for unit in units])


def weights_of(directory: Path) -> dict:
    skeleton = Skeleton(Checkpoint(directory))
    return {
        skeleton.module_name(index, local): weight
        for index in range(2) for local, weight in skeleton.read_weights(index).items()
    }  # fmt: skip


@pytest.mark.parametrize("key", PASSES)
def test_sizes_are_met_and_larger_ones_hold_the_smaller(key, store, opened, assert_reloads):
    source = store(key)
    least, most = span(source)
    before: dict[str, int] = {}
    for share in (0, 0.35, 0.7, 1):
        budget = int(least + share * (most - least))
        artifact = opened(source, size=budget)
        manifest, found = Manifest.read(artifact), weights_of(artifact)
        assert manifest is not None
        assert manifest.nbytes == (artifact / "model.safetensors").stat().st_size <= budget
        assert manifest.nbytes > 0.93 * budget  # the parts of so small a model are large
        assert_reloads(artifact)
        parts = {name: weight.n_parts if isinstance(weight, SignedLowRank) else weight.bits for name, weight in found.items()}
        assert all(parts[name] >= count for name, count in before.items())
        before = parts
        original = weights_of(source)
        least_parts = 1 if key == "bitstack" else 2
        for name, weight in found.items():
            assert weight.dense().equal(prefix(original[name], parts[name] - least_parts + 1).dense())
        if share == 1:
            assert all(weight.dense().equal(original[name].dense()) for name, weight in found.items())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_width_is_a_plain_grid_for_stock_readers(bits, store, opened, assert_reloads):
    artifact = opened(store("nested"), bits=bits)
    config = json.loads((artifact / "config.json").read_text())
    assert config["model_type"] == "llama" and "auto_map" not in config and not list(artifact.glob("*.py"))
    (group,) = config["quantization_config"]["config_groups"].values()
    assert group["weights"]["num_bits"] == bits and group["format"] == "pack-quantized"
    assert all(isinstance(weight, Quantized) and weight.bits == bits for weight in weights_of(artifact).values())
    assert_reloads(artifact, remote=False)


def test_layers_that_share_an_input_share_a_width(store, opened):
    least, most = span(store("nested"))
    found = weights_of(opened(store("nested"), size=(least + most) // 2))
    assert len({weight.bits for weight in found.values()}) > 1
    for layer in (0, 1):
        for group in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
            assert len({found[f"model.layers.{layer}.{local}"].bits for local in group}) == 1


def test_lineage_and_records(store, opened):
    source = store("bitstack")
    artifact = opened(source, size=sum(span(source)) // 2)
    manifest, earlier = Manifest.read(artifact), Manifest.read(source)
    assert manifest is not None and earlier is not None
    assert (manifest.base, manifest.base_digest) == (earlier.base, earlier.base_digest)
    assert (manifest.parent, manifest.parent_digest) == (str(source), Checkpoint(source).digest)
    assert manifest.steps[:-1] == earlier.steps and manifest.steps[-1].method == "open"
    assert manifest.steps[-1].label == f"open:size={sum(span(source)) // 2}"
    assert manifest.weights_digest == digest_files([artifact / "model.safetensors"])
    for name, weight in weights_of(artifact).items():
        record = manifest.modules[name]
        assert record.nbytes == weight.nbytes and record.passes == [PASSES["bitstack"], manifest.steps[-1].label]


def test_an_opened_artifact_can_be_opened_and_compressed_again(store, opened, run_stages, assert_reloads):
    least, most = span(store("bitstack"))
    half = opened(store("bitstack"), size=(least + most) // 2)
    assert span(half)[0] == pytest.approx(least, abs=200)  # lengths of numbers in the header
    again = opened(half, size=least + 500)
    direct = opened(store("bitstack"), size=least + 501)
    assert all(weight.dense().equal(weights_of(direct)[name].dense()) for name, weight in weights_of(again).items())
    assert_reloads(run_stages(half, ["gptq:bits=3,group_size=16"]))
    assert_reloads(run_stages(opened(store("nested"), bits=3), ["wanda"]))


def test_masks_and_factors_are_opened_too(llama, run_stages, opened, assert_reloads):
    source = run_stages(llama, ["wanda:targets=*.q_proj+*.down_proj", "svd:targets=*.up_proj,ratio=0.5", "nested:group_size=16"])
    artifact = opened(source, bits=3)
    assert_reloads(artifact)
    found, original = weights_of(artifact), weights_of(source)
    pruned = found["model.layers.0.self_attn.q_proj"]
    assert isinstance(pruned, Masked) and isinstance(pruned.inner, Quantized)
    assert not (pruned.mask & ~original["model.layers.0.self_attn.q_proj"].mask).any()
    factors = found["model.layers.1.mlp.up_proj"]
    assert [part.bits for part in factors.children().values()] == [3, 3]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({}, "one of them"),
        ({"size": 10**6, "bits": 3}, "one of them"),
        ({"size": "1 furlong"}, "--size: '1 furlong' is no size"),
        ({"size": "9KB"}, r"can be opened at [\d,]+ to [\d,]+ bytes"),
        ({"size": "9GB"}, r"can be opened at [\d,]+ to [\d,]+ bytes"),
        ({"bits": 5}, "can be opened at 2 to 4 bits"),
    ],
    ids=str,
)
def test_what_cannot_be_had(wanted, message, store, tmp_path):
    with pytest.raises(BadInput, match=message):
        open_stack(store("nested"), tmp_path / "out", **wanted)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_opened(llama, store, run_stages, tmp_path):
    with pytest.raises(BadInput, match="bitstack and nested"):
        open_stack(run_stages(llama, ["rtn"]), tmp_path / "out", size="1MB")
    with pytest.raises(BadInput, match="not an artifact"):
        open_stack(llama, tmp_path / "out", size="1MB")
    with pytest.raises(BadInput, match="no bits of codes; give --size"):
        open_stack(store("bitstack"), tmp_path / "out", bits=3)
    with pytest.raises(BadInput, match="replace its own source"):
        open_stack(store("nested"), store("nested"), bits=3, overwrite=True)


def test_the_command(cli, store, tmp_path):
    source = store("nested")
    before, budget = digest_files(sorted(source.rglob("*.*"))), sum(span(source)) // 2
    outcome = cli("open", source, "--size", f"{budget / 1000:.1f}KB", "-o", tmp_path / "out", "--json", "--quiet")
    assert outcome.code == 0, outcome.err
    result = json.loads(outcome.out)
    assert result["bytes"] == (tmp_path / "out" / "model.safetensors").stat().st_size <= budget
    assert result["verification"]["how"] == "stock" and result["verification"]["max_difference"] == 0
    assert result["steps"][0] == PASSES["nested"] and result["steps"][1].startswith("open:size=")
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    assert "open:size=" in (tmp_path / "out" / "README.md").read_text()
    assert digest_files(sorted(source.rglob("*.*"))) == before
    again = cli("open", source, "--bits", 3, "-o", tmp_path / "out")
    assert again.code == 2 and "--overwrite" in again.err
    neither = cli("open", source, "-o", tmp_path / "other")
    assert neither.code == 2 and "--size" in neither.err and "--bits" in neither.err


def test_the_order_is_stored_with_every_layer(store):
    for name, spec in json.loads((store("bitstack") / "config.json").read_text())["compress_modules"].items():
        assert len(spec["priorities"]) == spec["n_blocks"] - 1, name
        assert spec["priorities"] == sorted(spec["priorities"], reverse=True) and spec["priorities"][0] > 0


def test_a_step_that_pays_only_with_the_next_one_counts_with_it():
    assert slopes([10, 20, 30, 50], [9.0, 5.0, 4.0, 0.0]) == pytest.approx([0.4, 5 / 30, 5 / 30])
    assert slopes([10, 20, 30], [1.0, 2.0, 3.0]) == [0.0, 0.0]
    assert slopes([10], [1.0]) == []


def test_levels_need_no_measuring(llama, run_stages, opened):
    source = run_stages(llama, ["bitstack:blocks=3,order=level"])
    assert torch.equal(
        *(load_file(opened(source, size=span(source)[n]) / "model.safetensors")["model.norm.weight"] for n in (0, 1))
    )
    assert {spec["priorities"][0] for spec in Checkpoint(source).reshaped.values()} == {-1.0}
    counts = {weight.n_parts for weight in weights_of(opened(source, size=sum(span(source)) // 2)).values()}
    assert counts == {2} or counts == {1, 2} or counts == {2, 3}
