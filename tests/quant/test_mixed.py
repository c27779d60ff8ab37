"""Mixed precision: the budget is met and never exceeded, and bits go where they matter."""

import json
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.budget import share_out
from compress.checkpoint import Checkpoint
from compress.errors import BadInput
from compress.manifest import Manifest
from compress.quant.mixed import Mixed
from compress.skeleton import Skeleton
from compress.stream import forward

UNITS = st.lists(st.lists(st.tuples(st.integers(1, 60), st.floats(0, 10)), min_size=1, max_size=4), min_size=1, max_size=4)


@given(units=UNITS, extra=st.integers(0, 100))
@settings(deadline=None, max_examples=60)
def test_sharing_out_is_optimal(units, extra):
    costs, losses = [[c for c, _ in unit] for unit in units], [[e for _, e in unit] for unit in units]
    budget = sum(map(min, costs)) + extra
    picked = share_out(costs, losses, budget)
    assert sum(unit[i] for unit, i in zip(costs, picked, strict=True)) <= budget
    reachable = [
        sum(unit[i] for unit, i in zip(losses, choice, strict=True))
        for choice in product(*(range(len(unit)) for unit in units))
        if sum(unit[i] for unit, i in zip(costs, choice, strict=True)) <= budget
    ]
    assert sum(unit[i] for unit, i in zip(losses, picked, strict=True)) == pytest.approx(min(reachable), abs=1e-9)


def test_an_impossible_budget_is_refused():
    with pytest.raises(ValueError, match="below 30"):
        share_out([[10, 20], [20, 30]], [[1, 0], [1, 0]], 29)


@pytest.mark.parametrize("budget", [3.2, 4.7])
def test_the_budget_is_met_and_never_exceeded(budget, make_checkpoint, run_stages, assert_reloads):
    source = make_checkpoint("llama", hidden_size=128, intermediate_size=256, head_dim=32, num_hidden_layers=3)
    artifact = run_stages(source, [f"mixed:bits={budget}"])
    records = Manifest.read(artifact).modules
    bits = 8 * sum(r.nbytes for r in records.values()) / sum(r.shape[0] * r.shape[1] for r in records.values())
    assert 0.97 * budget <= bits <= budget
    for index in range(3):
        prefix = f"model.layers.{index}."
        for group in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
            assert len({(records[prefix + local].bits, records[prefix + local].group_size) for local in group}) == 1
    assert len({record.bits for record in records.values()}) > 1
    assert_reloads(artifact)


def test_it_disturbs_the_model_less_than_uniform_bits_of_its_size(make_checkpoint, run_stages, tokens):
    """Where layers differ in what they matter: here those of the second block write a hundredth of what they did."""
    source = make_checkpoint("llama", hidden_size=128, intermediate_size=256, head_dim=32)
    from safetensors.torch import load_file, save_file

    tensors = load_file(source / "model.safetensors")
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        tensors[f"model.layers.1.{name}.weight"] *= 0.01
    lopsided = source.parent / "lopsided"
    lopsided.mkdir()
    for file in source.iterdir():
        if file.name != "model.safetensors":
            (lopsided / file.name).write_bytes(file.read_bytes())
    save_file(tensors, lopsided / "model.safetensors", {"format": "pt"})
    mixed, uniform = run_stages(lopsided, ["mixed:bits=4.5"]), run_stages(lopsided, ["gptq:bits=4,group_size=32"])
    assert Manifest.read(mixed).nbytes <= Manifest.read(uniform).nbytes
    logits = {path: forward(Skeleton(Checkpoint(path)), tokens) for path in (lopsided, mixed, uniform)}
    errors = {path: float((logits[path] - logits[lopsided]).square().mean()) for path in (mixed, uniform)}
    assert errors[mixed] < errors[uniform]


def test_low_rank_layers_are_sized_as_they_are(make_checkpoint, run_stages, assert_reloads):
    artifact = run_stages(make_checkpoint("llama"), ["svd:ratio=0.6", "mixed:bits=4,group_size=32"])
    assert {record.kind for record in Manifest.read(artifact).modules.values()} == {"low_rank"}
    assert_reloads(artifact)


def test_too_few_bits_say_what_is_possible(make_checkpoint, run_stages):
    with pytest.raises(BadInput, match=r"mixed:bits=2\.0.*at least 2\.\d+ bits"):
        run_stages(make_checkpoint("llama"), ["mixed:bits=2.0"])


def test_the_survey_is_kept_for_a_rerun(make_checkpoint, run_stages, tmp_path):
    step = Mixed(bits=3.5)
    found = {"a": {"n_weights": 800, "nbytes": [100 * n for n in range(1, 13)], "effects": [1 / n for n in range(1, 13)]}}
    chosen = step.allocate(json.loads(json.dumps(found)), [("a",)])
    assert chosen["a"] == step.candidates()[2]  # 300 of the 350 bytes
    assert torch.tensor(found["a"]["nbytes"]).max() == 1200
