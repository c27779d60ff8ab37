"""Every bundled recipe runs whole, with few steps, on a small model that its group sizes divide."""

from __future__ import annotations

import pytest

from compress import Pipeline, methods
from compress.passes import Pass
from compress.recipe import Recipe, presets
from compress.train_pass import TrainPass

SMALL = {"iterations": 2, "search_tokens": 64, "rounds": 1}
TRAINED = {"steps": 2, "batch_size": 2, "length": 16}


def small(step: Pass) -> Pass:
    """The same pass with little work."""
    less = {name: value for name, value in SMALL.items() if name in type(step).model_fields}
    return methods.build(step.method(), step.settings() | less | (TRAINED if isinstance(step, TrainPass) else {}))


@pytest.mark.slow
@pytest.mark.parametrize("name", presets())
def test_a_preset_runs_whole(name, make_checkpoint, calibration, tmp_path):
    shape = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 16, "num_attention_heads": 8, "num_key_value_heads": 4}
    recipe = Recipe.load(name)
    passes = [small(step) for step in recipe.passes]
    result = Pipeline(passes, calibration=calibration, evaluate=False).run(make_checkpoint("llama", **shape), tmp_path / "out")
    assert [step.method for step in result.manifest.steps] == [step.method() for step in recipe.passes]
    assert result.verification.max_difference <= 1e-4
    assert all(step.training["steps"] == 2 for step in result.manifest.steps if step.training)
