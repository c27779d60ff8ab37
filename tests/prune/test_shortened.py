"""Shortened LLaMA and SLEB: losses without a block, measured together, are those of the models measured one by one."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from compress.checkpoint import Checkpoint
from compress.errors import BadInput
from compress.prune.shortened import Shortened, losses_without
from compress.skeleton import Skeleton
from compress.walk import Walk


@pytest.fixture(scope="module")
def five(make_checkpoint):
    return make_checkpoint("gemma2", num_hidden_layers=5)


@pytest.fixture(scope="module")
def loss_without(five, tokens, reload):
    """``loss_without(gone)`` by transformers itself."""
    model = reload(five)
    blocks = list(model.model.layers)
    kinds = list(model.config.layer_types)

    @torch.no_grad()
    def loss(gone) -> float:
        kept = [index for index in range(5) if index not in gone]
        model.model.layers = nn.ModuleList(blocks[index] for index in kept)
        model.config.num_hidden_layers, model.config.layer_types = len(kept), [kinds[index] for index in kept]
        logits = model(tokens, use_cache=False).logits[:, :-1]
        return cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()

    return loss


@pytest.fixture
def walk(five, tokens, tmp_path):
    return Walk(Skeleton(Checkpoint(five)), tokens, tmp_path)


@pytest.mark.parametrize("gone", [[], [2], [0, 3]])
def test_losses(gone, walk, loss_without):
    left = [index for index in range(5) if index not in gone]
    found = losses_without(walk, left, gone)
    assert found == pytest.approx({index: loss_without([*gone, index]) for index in left}, abs=1e-4)


def test_at_once_and_one_by_one(walk, loss_without):
    single = sorted(range(5), key=lambda index: loss_without([index]))
    assert Shortened(blocks=3).measure(walk) == single[:3]
    gone: list[int] = []
    for _ in range(3):
        gone.append(min(set(range(5)) - set(gone), key=lambda index: loss_without([*gone, index])))
    assert Shortened(blocks=3, greedy=True).measure(walk) == gone


def test_greedy_is_no_worse_where_it_looks(walk, loss_without):
    greedy, at_once = (Shortened(blocks=2, greedy=greedy).measure(walk) for greedy in (True, False))
    assert greedy[0] == at_once[0] and loss_without(greedy) <= loss_without(at_once) + 1e-6


def test_both_ends_are_kept_in_deep_models(walk):
    assert Shortened().candidates(32) == list(range(4, 30)) and Shortened().candidates(80) == list(range(4, 78))
    assert Shortened().candidates(16) == list(range(2, 15)) and Shortened().candidates(6) == list(range(6))
    assert set(Shortened(blocks=2, first=2, last=1).measure(walk)) == {2, 3}
    with pytest.raises(BadInput, match="only 2 blocks may go"):
        Shortened(blocks=3, first=2, last=1).n_removed(walk.skeleton)


def test_windows_of_one_token_predict_nothing(five, tokens, tmp_path):
    walk = Walk(Skeleton(Checkpoint(five)), tokens[:, :1], tmp_path)
    assert losses_without(walk, [1, 2], []) == {1: 0, 2: 0}
