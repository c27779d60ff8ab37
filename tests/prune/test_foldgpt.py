"""FoldGPT: groups, what is shared and stays shared, and how it leaves compress."""

import itertools
import json
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from compress import export
from compress.checkpoint import Checkpoint
from compress.errors import BadInput
from compress.prune.foldgpt import FoldGPT, grouped
from compress.skeleton import Skeleton
from compress.walk import Walk


@pytest.fixture(scope="module")
def four(make_checkpoint):
    return make_checkpoint("qwen2", num_hidden_layers=4)  # which has biases


@pytest.fixture(scope="module")
def folded(four, run_stages):
    return run_stages(four, [FoldGPT(blocks=2)])


def open_skeleton(directory) -> Skeleton:
    return Skeleton(Checkpoint(directory))


def tensors_of(directory) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def shared_with(directory) -> dict[int, int]:
    return open_skeleton(directory).owners


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 7), st.integers(2, 4), st.data())
def test_groups_are_the_cheapest(n_units, size, data):
    count = data.draw(st.integers(0, n_units - -(-n_units // size)))
    draw = torch.rand(n_units, size - 1, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 999)))).tolist()
    costs = [row[:place] for place, row in enumerate(draw)]

    def cost(starts: tuple[int, ...]) -> float:
        return sum(costs[i][i - max(s for s in starts if s <= i) - 1] for i in range(n_units) if i not in starts)

    possible = [
        (0, *starts) for starts in itertools.combinations(range(1, n_units), n_units - count - 1)
        if all(b - a <= size for a, b in itertools.pairwise((0, *starts, n_units)))
    ]  # fmt: skip
    found = grouped(costs, count, size)
    assert [index for group in found for index in group] == list(range(n_units)) and max(map(len, found)) <= size
    assert len(found) == n_units - count
    assert cost(tuple(group[0] for group in found)) == pytest.approx(min(map(cost, possible)))


@pytest.mark.parametrize("weights", ["first", "mean"])
def test_identical_blocks_fold_without_a_change(weights, four, tokens, tmp_path, run_stages, assert_reloads, reload):
    """Each with norms of its own."""
    shutil.copytree(four, tmp_path / "same")
    tensors = tensors_of(four)
    twins = {n.replace(".1.", ".2."): t for n, t in tensors.items() if n.startswith("model.layers.1.") and "norm" not in n}
    save_file(tensors | {n: t.clone() for n, t in twins.items()}, tmp_path / "same" / "model.safetensors", {"format": "pt"})
    artifact = run_stages(tmp_path / "same", [FoldGPT(blocks=1, weights=weights)])
    assert shared_with(artifact) == {2: 1}
    with torch.no_grad():
        assert assert_reloads(artifact, atol=1e-5)(tokens).logits.equal(reload(tmp_path / "same")(tokens).logits)


def test_cost_is_the_change_of_the_outputs(four, tokens, tmp_path):
    found = FoldGPT(size=3).measure(Walk(open_skeleton(four), tokens, tmp_path))
    assert [len(costs) for costs in found] == [0, 1, 2, 2] and all(cost > 0 for costs in found for cost in costs)


@pytest.mark.parametrize(("size", "count"), [(2, 1), (2, 2), (3, 2), (4, 3)])
def test_a_group_is_stored_once(size, count, four, run_stages, assert_reloads):
    artifact = run_stages(four, [FoldGPT(blocks=count, size=size)])
    model, before, after = assert_reloads(artifact, atol=1e-5), tensors_of(four), tensors_of(artifact)
    owners = shared_with(artifact)
    is_shared = lambda name: any(name.startswith(f"model.layers.{i}.") and "norm" not in name for i in owners)  # noqa: E731
    assert len(owners) == count and after.keys() == {name for name in before if not is_shared(name)}
    block = sum(t.numel() for name, t in before.items() if name.startswith("model.layers.0.") and "norm" not in name)
    unique = lambda tensors: sum(tensor.numel() for tensor in tensors.values())  # noqa: E731
    assert unique(before) - unique(after) == count * block
    assert sum(parameter.numel() for parameter in model.parameters()) == unique(after)


def test_the_mean_is_that_of_the_members(four, run_stages):
    artifact = run_stages(four, [FoldGPT(blocks=3, size=4, weights="mean")])
    before, after = tensors_of(four), tensors_of(artifact)
    for name in ("mlp.up_proj.weight", "self_attn.v_proj.bias"):
        expected = torch.stack([before[f"model.layers.{index}.{name}"] for index in range(4)]).mean(0)
        torch.testing.assert_close(after[f"model.layers.0.{name}"], expected)


def test_gradients_add_up_over_the_blocks_that_share(folded, tokens, tmp_path, reload):
    export.to("dense", folded, tmp_path / "dense")
    shared, apart = reload(folded), reload(tmp_path / "dense")
    for model in (shared, apart):
        model(tokens, labels=tokens).loss.backward()
    owners = shared_with(folded)
    gradients = dict(apart.named_parameters())
    for owner in set(owners.values()):
        name = "mlp.gate_proj.weight"
        aliases = [owner, *(index for index in owners if owners[index] == owner)]
        expected = sum(gradients[f"model.layers.{index}.{name}"].grad for index in aliases)
        found = shared.get_parameter(f"model.layers.{owner}.{name}").grad
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("second", ["wanda", "gptq", "svd", "logit_kd", "shortgpt", "foldgpt", "pack"])
def test_what_follows_keeps_the_sharing(second, folded, make_pass, run_stages, assert_reloads):
    settings = {"shortgpt": {"blocks": 1}, "foldgpt": {"blocks": 1}}.get(second, {})
    artifact = run_stages(folded, [*["wanda"] * (second == "pack"), make_pass(second, **settings)])
    assert_reloads(artifact, atol=1e-5)
    before, after = shared_with(folded), shared_with(artifact)
    if second == "shortgpt":  # which takes a block: a group of one is no longer one
        assert len(open_skeleton(artifact).blocks) == 3 and len(after) == 1
    elif second == "foldgpt":  # two groups of two become one of four
        assert len(before) == 2 and after == {1: 0, 2: 0, 3: 0}
    else:
        assert after == before
        owners = "|".join(f"model.layers.{index}." for index in set(before.values()))
        names = {name for name in tensors_of(artifact) if "norm" not in name and name.startswith("model.layers.")}
        assert all(name.startswith(tuple(owners.split("|"))) for name in names)


def test_limits(four, run_stages):
    model = open_skeleton(four)
    assert FoldGPT(blocks=2).n_removed(model) == 2 and FoldGPT(sparsity=0.0).n_removed(model) == 0
    with pytest.raises(BadInput, match="groups of 2, 2 of 4 blocks"):
        FoldGPT(blocks=3).n_removed(model)
    with pytest.raises(BadInput, match="only plain matrices"):
        run_stages(four, ["rtn", "foldgpt:weights=mean"])
    assert shared_with(run_stages(four, ["rtn", "foldgpt:blocks=1"]))


def test_dense_export_gives_every_block_its_layers(folded, tokens, tmp_path, reload):
    model = reload(export.to("dense", folded, tmp_path / "dense"))
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert config["model_type"] == "qwen2" and not any(key.startswith("compress") for key in config)
    with torch.no_grad():
        assert model(tokens).logits.equal(reload(folded)(tokens).logits)


@pytest.mark.parametrize("target", ["gptq", "awq"])
def test_packed_exports_give_every_block_its_layers(target, run_stages, tmp_path, make_checkpoint):
    source = make_checkpoint("qwen2", torch.float16, num_hidden_layers=4, intermediate_size=128)
    artifact = run_stages(source, ["foldgpt:blocks=2", "rtn:bits=4,group_size=32,symmetric=false"])
    written, owners = tensors_of(export.to(target, artifact, tmp_path / "out")), shared_with(artifact)
    assert "compress_structure" not in json.loads((tmp_path / "out" / "config.json").read_text())
    for index, owner in owners.items():
        own = {name: t for name, t in written.items() if name.startswith(f"model.layers.{index}.") and "norm" not in name}
        assert len(own) >= 3 * 7 + 3  # packed codes, scales and zeros, and the biases
        assert all(tensor.equal(written[name.replace(f".{index}.", f".{owner}.", 1)]) for name, tensor in own.items())


def test_gguf_export_is_that_of_the_model_written_out(folded, tmp_path):
    gguf = pytest.importorskip("gguf")
    export.to("dense", folded, tmp_path / "dense")
    files = [export.to("gguf:f16", source, tmp_path / name) for source, name in ((folded, "a"), (tmp_path / "dense", "b"))]
    one, other = ({tensor.name: tensor.data for tensor in gguf.GGUFReader(file).tensors} for file in files)
    assert one.keys() == other.keys() and all((data == other[name]).all() for name, data in one.items())
