"""How many units stay: shares, rounding, target shapes, and what is refused before anything is measured."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress import methods
from compress.checkpoint import Checkpoint
from compress.errors import BadInput
from compress.narrow import attention, n_neurons
from compress.prune.width import best, rounded, survivors
from compress.skeleton import Skeleton
from compress.weights import Quantized

WITHOUT_HEADS = ("phi3", "gpt2", "opt", "gpt_neox")


def outlined(directory, text: str) -> Skeleton:
    """The model that a pass will leave, as a plan sees it."""
    model = Skeleton(Checkpoint(directory))
    return Skeleton(methods.parse(text).surgery(model).alter(model))  # type: ignore[attr-defined]


@given(st.integers(1, 5000), st.floats(0, 1), st.integers(1, 128))
def test_rounded(size, share, multiple):
    count = rounded(share * size, size, multiple)
    assert 1 <= count <= size and (count % multiple == 0 or count == size)
    assert abs(count - share * size) <= multiple / 2 or count in (multiple, size)
    assert rounded(size, size, multiple) == size


def test_best_is_sorted_and_takes_the_first_of_equals():
    assert best(torch.tensor([1.0, 3.0, 2.0, 3.0, 1.0]), 4).tolist() == [0, 1, 2, 3]


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=9), min_size=1, max_size=4), st.floats(0, 0.99), st.data())
def test_survivors_meet_the_budget_and_outrank_what_goes(lists, share, data):
    costs = data.draw(st.lists(st.integers(1, 50), min_size=len(lists), max_size=len(lists)))
    counts = survivors([torch.tensor(own, dtype=torch.float64) for own in lists], costs, share)
    gone = [(cost, value) for own, n, cost in zip(lists, counts, costs, strict=True) for value in sorted(own)[: len(own) - n]]
    total = sum(len(own) * cost for own, cost in zip(lists, costs, strict=True))
    removed = sum(cost for cost, _ in gone)
    assert removed <= share * total * (1 + 1e-6) + 1e-9 and removed + max(costs) >= share * total * (1 - 1e-6)
    least = min(value for own, n in zip(lists, counts, strict=True) for value in sorted(own)[len(own) - n :])
    assert all(value <= least for _, value in gone)


def test_a_share_leaves_multiples_and_an_ordinary_model(llama):
    model = outlined(llama, "minitron:sparsity=0.4,units=neurons+heads+hidden,round_to=16")
    config = model.checkpoint.config
    assert (config.intermediate_size, config.hidden_size) == (64, 32)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (2, 2, 16)
    assert not model.checkpoint.structure


@pytest.mark.parametrize("key", ["minitron", "llm_pruner", "flap"])
def test_numbers_give_exactly_that_shape_and_leave_the_rest(key, llama):
    model = outlined(llama, f"{key}:intermediate_size=77" + (",compensate=false" if key == "flap" else ""))
    assert model.checkpoint.config.intermediate_size == 77 and attention(model, 0) == (4, 2, 16)
    assert not model.checkpoint.structure
    model = outlined(llama, f"{key}:num_key_value_heads=1" + (",compensate=false" if key == "flap" else ""))
    assert attention(model, 1) == (2, 1, 16) and n_neurons(model, 1) == 112
    model = outlined(llama, "minitron:num_attention_heads=2,num_key_value_heads=2,hidden_size=40,intermediate_size=96")
    assert attention(model, 1) == (2, 2, 16) and model.checkpoint.config.hidden_size == 40


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("intermediate_size=113", "only 112"),
        ("num_key_value_heads=3", "only 2"),
        ("num_attention_heads=3", "multiple of 2, up to 4"),
        ("num_attention_heads=4,num_key_value_heads=1", "multiple of 1, up to 2"),
        ("hidden_size=65", "only 64"),
        ("hidden_size=30", "not a multiple of the number of attention heads"),
        ("intermediate_size=96,sparsity=0.5", "leave sparsity out"),
        ("units=channels", "units"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_measured(settings, message, llama):
    with pytest.raises(BadInput, match=message):
        outlined(llama, f"minitron:{settings}")


def test_flap_ranks_no_hidden_channels():
    for settings in ({"units": "hidden"}, {"hidden_size": 32}):
        with pytest.raises(BadInput, match="does not rank hidden"):
            methods.build("flap", settings)


@pytest.mark.parametrize("family", WITHOUT_HEADS)
def test_heads_that_are_tied_to_other_shapes_are_refused_and_neurons_are_not(family, make_checkpoint):
    with pytest.raises(BadInput, match="units=neurons"):
        outlined(make_checkpoint(family), "llm_pruner")
    assert n_neurons(outlined(make_checkpoint(family), "llm_pruner:units=neurons"), 1) == 96


def test_blocks_that_are_kept_whole(llama):
    model = outlined(llama, "llm_pruner:keep_first=1,units=neurons")
    assert [n_neurons(model, index) for index in range(2)] == [112, 96] and model.checkpoint.structure
    with pytest.raises(BadInput, match="one must be left"):
        outlined(llama, "llm_pruner:keep_first=1,keep_last=1")


def test_a_plan_foresees_ragged_shapes(llama):
    assert outlined(llama, "minitron:uniform=false,round_to=8").checkpoint.structure


def test_units_are_written_as_they_are_read():
    step = methods.parse("minitron:units=neurons+hidden")
    assert step.label() == "minitron:units=neurons+hidden" and methods.parse(step.label()) == step


def test_groups_of_a_quantizer_divide_what_is_left(llama, run_stages, make_pass, assert_reloads):
    artifact = run_stages(llama, [make_pass("minitron"), make_pass("gptq", group_size=32)])
    assert_reloads(artifact)
    assert json.loads((artifact / "config.json").read_text())["intermediate_size"] == 96
    model = Skeleton(Checkpoint(artifact))
    for weight in model.read_weights(1).values():
        assert isinstance(weight, Quantized) and weight.group_size == 32


def test_a_grid_by_groups_is_not_torn_apart(llama, run_stages, make_pass):
    with pytest.raises(BadInput, match="prune before quantizing"):
        run_stages(llama, [make_pass("rtn", group_size=32), make_pass("minitron")])
