"""Angular: its distances, and the run that goes."""

import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.checkpoint import Checkpoint
from compress.prune.angular import Angular, angle
from compress.skeleton import Skeleton
from compress.walk import Walk


@pytest.fixture(scope="module")
def five(make_checkpoint):
    return make_checkpoint("llama", num_hidden_layers=5)


def test_angles():
    x, y = torch.eye(4).double(), torch.eye(4).double().roll(1, 0)
    assert angle(x, x) == 0 and angle(x, -x) == 1
    assert angle(x, y) == pytest.approx(0.5) and angle(x, 3 * (x + y)) == pytest.approx(0.25)


def test_distances_are_those_of_the_last_tokens(five, tokens, tmp_path, reload):
    found = Angular(blocks=2).measure(Walk(Skeleton(Checkpoint(five)), tokens, tmp_path))
    with torch.no_grad():
        states = [state[:, -1] for state in reload(five)(tokens, output_hidden_states=True).hidden_states[:5]]
    expected = [
        torch.cosine_similarity(states[start], states[start + 2], dim=-1).arccos().mean().item() / math.pi for start in range(3)
    ]
    assert found == pytest.approx(expected, abs=1e-5)


def test_a_run_that_does_nothing_goes(five, tokens, tmp_path, run_stages, reload):
    shutil.copytree(five, tmp_path / "idle")
    tensors = load_file(tmp_path / "idle" / "model.safetensors")
    for index in (1, 2):
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            tensors[f"model.layers.{index}.{name}.weight"].zero_()
    save_file(tensors, tmp_path / "idle" / "model.safetensors", metadata={"format": "pt"})
    artifact = run_stages(tmp_path / "idle", [Angular(blocks=2)])
    with torch.no_grad():
        assert reload(artifact)(tokens).logits.equal(reload(tmp_path / "idle")(tokens).logits)


def test_a_run_is_removed_and_the_last_block_stays(five, tokens, tmp_path):
    assert Angular().removed([0.3, 0.1, 0.2], 2) == [1, 2]
    for count in (1, 4):
        found = Angular(blocks=count).measure(Walk(Skeleton(Checkpoint(five)), tokens, tmp_path))
        assert len(found) == 5 - count and 4 not in Angular().removed(found, count)
