"""LaCo: what merging makes of matrices, masks and biases, and that as many blocks go as were asked for."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.checkpoint import Checkpoint
from compress.errors import BadInput
from compress.prune.depth import mixed
from compress.prune.laco import LaCo, joined
from compress.skeleton import Skeleton
from compress.walk import Walk
from compress.weights import Dense, Masked


@pytest.fixture(scope="module")
def five(make_checkpoint):
    return make_checkpoint("qwen2", num_hidden_layers=5)  # which has biases


def open_skeleton(directory) -> Skeleton:
    return Skeleton(Checkpoint(directory))


def test_merging_adds_differences():
    model = [{index: 1} for index in range(5)]
    once = joined(model, 1, 3)
    assert once == [{0: 1}, {1: -1, 2: 1, 3: 1}, {4: 1}]  # 1 + (2 - 1) + (3 - 1)
    twice = joined(once, 0, 2)
    assert twice == [{0: 0, 1: -1, 2: 1, 3: 1}, {4: 1}]
    assert all(sum(mixture.values()) == 1 for mixture in (*once, *twice))
    assert joined(model, 2, 1) == model


def test_matrices_and_biases_are_mixed_alike_and_norms_are_the_first_ones(five):
    model, mixture = open_skeleton(five), {1: -1, 2: 1, 3: 1}
    weights, others = mixed(model, mixture)
    parts = {index: (model.read_weights(index), model.read_others(index)) for index in mixture}
    for local, weight in weights.items():
        expected = sum(times * parts[index][0][local].dense() for index, times in mixture.items())
        torch.testing.assert_close(weight.dense(), expected)
    bias = "self_attn.k_proj.bias"
    torch.testing.assert_close(others[bias], sum(times * parts[index][1][bias] for index, times in mixture.items()))
    assert others["input_layernorm.weight"].equal(parts[1][1]["input_layernorm.weight"])


def test_a_block_takes_in_its_likeness_without_a_change(five, tmp_path):
    shutil.copytree(five, tmp_path / "same")
    tensors = load_file(tmp_path / "same" / "model.safetensors")
    tensors |= {n.replace(".2.", ".3."): t.clone() for n, t in tensors.items() if n.startswith("model.layers.2.")}
    save_file(tensors, tmp_path / "same" / "model.safetensors", metadata={"format": "pt"})
    model = open_skeleton(tmp_path / "same")
    weights, others = mixed(model, joined([{index: 1} for index in range(5)], 2, 2)[2])
    assert all(weight.dense().equal(model.read_weight(2, local).dense()) for local, weight in weights.items())
    assert all(tensor.equal(model.read_others(2)[name]) for name, tensor in others.items())


def test_a_merged_mask_keeps_what_one_of_its_parts_kept(five, run_stages):
    model = open_skeleton(run_stages(five, ["magnitude"]))
    merged, parts = mixed(model, {1: 0.5, 2: 0.5})[0], [model.read_weights(index) for index in (1, 2)]
    for local, weight in merged.items():
        first, second = parts[0][local].mask, parts[1][local].mask
        assert weight.mask is not None and first is not None and second is not None
        assert weight.mask.equal(first | second) and not weight.dense()[~weight.mask].any()


@pytest.mark.parametrize("similarity", [-1, 0.9, 1])
@pytest.mark.parametrize(("merged", "blocks"), [(2, 1), (2, 3), (3, 2), (4, 4)])
def test_as_many_go_as_were_asked_for(similarity, merged, blocks, five, tokens, tmp_path):
    settings = {"similarity": similarity, "merged": merged, "interval": 1}
    mixtures = [dict(pairs) for pairs in LaCo(blocks=blocks, **settings).measure(Walk(open_skeleton(five), tokens, tmp_path))]
    assert len(mixtures) == 5 - blocks
    assert sorted({index for mixture in mixtures for index in mixture}) == list(range(5))
    assert [next(iter(mixture)) for mixture in mixtures] == sorted(next(iter(mixture)) for mixture in mixtures)


def test_the_artifact_is_the_merged_model(five, tokens, calibration, run_stages, assert_reloads, reload):
    artifact = run_stages(five, [LaCo(blocks=2, merged=3)])
    model = assert_reloads(artifact, atol=1e-5)
    assert model.config.num_hidden_layers == 3
    heads = [open_skeleton(artifact).read_others(index)["input_layernorm.weight"] for index in range(3)]
    norms = [open_skeleton(five).read_others(index)["input_layernorm.weight"] for index in range(5)]
    assert all(any(head.equal(norm) for norm in norms) for head in heads)


def test_grids_factors_and_shared_layers_are_refused_before_anything_is_computed(five, run_stages):
    assert LaCo().outline(Masked(Dense(torch.ones(2, 2)), torch.ones(2, 2, dtype=torch.bool)))
    for first in ("rtn", "svd"):
        with pytest.raises(BadInput, match="only plain matrices"):
            run_stages(five, [first, "laco:blocks=1"])
    with pytest.raises(BadInput, match="share their layers"):
        run_stages(five, ["foldgpt:blocks=1", "laco:blocks=1"])
