"""Minitron: importance is what plain hooks on the whole model see, whatever the order of the windows."""

from __future__ import annotations

import pytest
import torch

from compress.checkpoint import Checkpoint
from compress.prune.minitron import Minitron
from compress.skeleton import Skeleton
from compress.walk import Walk

READERS = {"llama": "mlp.down_proj", "gpt2": "mlp.c_proj", "opt": "fc2", "gpt_neox": "mlp.dense_4h_to_h", "phi3": "mlp.down_proj"}


@pytest.mark.parametrize("family", READERS)
def test_importance_of_neurons(family, make_checkpoint, reload, tokens, tmp_path):
    source = make_checkpoint(family)
    skeleton, model = Skeleton(Checkpoint(source)), reload(source)
    found = Minitron().measure(Walk(skeleton, tokens, tmp_path))
    seen = {}
    for index in range(2):
        module = model.get_submodule(skeleton.module_name(index, READERS[family]))
        module.register_forward_pre_hook(
            lambda _, inputs, index=index: seen.__setitem__(index, inputs[0].view(*tokens.shape, -1))
        )
    with torch.no_grad():
        model(input_ids=tokens)
    for index in range(2):
        expected = seen[index].abs().mean(1).square().sum(0).sqrt()
        torch.testing.assert_close(torch.tensor(found["neurons"][index]), expected, rtol=1e-4, atol=1e-5)


def test_importance_of_heads_and_hidden_channels(llama, reload, tokens, tmp_path):
    found, model = Minitron().measure(Walk(Skeleton(Checkpoint(llama)), tokens, tmp_path)), reload(llama)
    seen = {}
    for index, layer in enumerate(model.model.layers):
        for name in ("self_attn.o_proj", "self_attn.q_proj", "mlp.gate_proj"):
            layer.get_submodule(name).register_forward_pre_hook(
                lambda _, inputs, key=(index, name): seen.__setitem__(key, inputs[0].abs().mean(1).square().sum(0))
            )
    with torch.no_grad():
        model(input_ids=tokens)
    for index in range(2):
        squares = seen[index, "self_attn.o_proj"]
        for kind, count in (("heads", 4), ("groups", 2)):
            expected = squares.view(count, -1).sum(1).sqrt()
            torch.testing.assert_close(torch.tensor(found[kind][index]), expected, rtol=1e-4, atol=1e-5)
    hidden = sum(value.sqrt() for (_, name), value in seen.items() if name != "self_attn.o_proj")
    torch.testing.assert_close(torch.tensor(found["hidden"]), hidden, rtol=1e-4, atol=1e-5)


def test_order_of_windows_does_not_matter(llama, tokens, tmp_path):
    one, other = (
        Minitron().measure(Walk(Skeleton(Checkpoint(llama)), each, tmp_path / str(n)))
        for n, each in enumerate((tokens, tokens.flip(0)))
    )
    for kind in ("neurons", "heads"):
        torch.testing.assert_close(torch.tensor(one[kind]), torch.tensor(other[kind]), rtol=1e-5, atol=1e-6)


def test_heads_are_ranked_inside_their_group(llama):
    model = Skeleton(Checkpoint(llama))
    found = {"heads": [[1.0, 2.0, 9.0, 8.0]] * 2, "groups": [[2.2, 12.0]] * 2, "neurons": [[0.0] * 112] * 2}
    (kept, _) = Minitron(num_attention_heads=2).keep(model, found)
    assert kept.groups is None and kept.queries is not None and kept.queries.tolist() == [1, 2]
    (kept, _) = Minitron(num_attention_heads=2, num_key_value_heads=1).keep(model, found)
    assert kept.groups is not None and kept.groups.tolist() == [1] and kept.queries is None
