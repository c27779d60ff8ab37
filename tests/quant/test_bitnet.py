"""BitNet: three levels and a scale, gradients that pass rounding, and codes that later training leaves alone."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from compress.checkpoint import Checkpoint
from compress.latent import Latent, latent, rounded
from compress.manifest import Manifest
from compress.quant.bitnet import BitNet, ternary
from compress.skeleton import Skeleton
from compress.trainable import TrainableLinear
from compress.weights import Columns, Dense, Incoherent, LowRank, Masked, Quantized, Sum, Weight

FEW = {"steps": 3, "batch_size": 2, "length": 16}


def matrix(n_outputs: int = 24, n_inputs: int = 16) -> Tensor:
    return torch.randn(n_outputs, n_inputs, generator=torch.Generator().manual_seed(0)) * 0.05


def grid(values: Tensor, kept: Tensor | None = None, **settings) -> Quantized:
    found = BitNet(**settings).grid(values, kept, values.dtype)
    assert isinstance(found, Quantized)
    return found


def weights_of(artifact: Path) -> dict[str, Weight]:
    skeleton = Skeleton(Checkpoint(artifact))
    return {f"{i}.{name}": weight for i in range(2) for name, weight in skeleton.read_weights(i).items()}


# the grid


@pytest.mark.parametrize("levels", ["absmean", "twn"])
@pytest.mark.parametrize("per_row", [False, True])
def test_there_are_three_levels_and_one_scale(levels, per_row):
    found = grid(matrix(), levels=levels, per_row=per_row)
    assert set(found.codes.unique().tolist()) == {-1, 0, 1} and found.zero_point is None and found.bits == 2
    assert found.scale.shape == (24, 1) and len(found.scale.unique()) == (24 if per_row else 1)


def test_the_scale_is_the_mean_magnitude_and_codes_are_the_nearest():
    values = matrix()
    found = grid(values)
    gamma = values.abs().mean()
    torch.testing.assert_close(found.scale, gamma.expand(24, 1))
    for code in (-1, 0, 1):
        own = (values - found.dense()).abs()
        assert (own <= (values - code * gamma).abs() + 1e-6).all()


def test_twn_scales_by_what_is_above_its_threshold():
    values = matrix()
    found = grid(values, levels="twn", per_row=True)
    for row, codes, scale in zip(values, found.codes, found.scale, strict=True):
        large = row.abs() > 0.7 * row.abs().mean()
        assert torch.equal(codes != 0, large) and float(scale) == pytest.approx(float(row[large].abs().mean()), rel=1e-6)
        assert torch.equal(codes[large].sign().float(), row[large].sign())


@pytest.mark.parametrize(("levels", "share"), [("absmean", 0.3101), ("twn", 0.4232)])
def test_of_gaussian_weights_a_known_share_becomes_zero(levels, share):
    values = torch.randn(1000, 1000, generator=torch.Generator().manual_seed(0))
    assert float((grid(values, levels=levels).codes == 0).float().mean()) == pytest.approx(share, abs=2e-3)
    if levels == "absmean":
        assert share == pytest.approx(math.erf(0.5 * math.sqrt(2 / math.pi) / math.sqrt(2)), abs=1e-4)


@pytest.mark.parametrize("levels", ["absmean", "twn"])
def test_larger_weights_have_a_larger_scale_and_the_same_codes(levels):
    small, large = grid(matrix(), levels=levels), grid(4 * matrix(), levels=levels)
    assert small.codes.equal(large.codes) and large.scale.equal(4 * small.scale)


def test_removed_weights_count_for_nothing():
    values, kept = matrix(), matrix() > 0
    codes, scale = ternary(values * kept, kept, "absmean", False, torch.float32)
    assert float(scale) == pytest.approx(float(values[kept].abs().mean()), rel=1e-6) and not codes[~kept].any()
    nothing = torch.zeros(4, 4)
    assert not grid(nothing, nothing > 0).codes.any() and grid(nothing).dense().isfinite().all()


# training through it


def test_gradients_are_those_of_the_rounded_matrix():
    step, x = BitNet(), torch.randn(5, 16)
    form = step.adapt(Dense(matrix()), torch.Generator())
    layer = TrainableLinear(form, None, torch.device("cpu"))
    layer(x).square().sum().backward()
    hard = grid(matrix()).dense().requires_grad_()
    F.linear(x, hard).square().sum().backward()
    assert layer(x).equal(F.linear(x, hard))  # bit for bit what the grid gives
    torch.testing.assert_close(layer.masters[0].grad, hard.grad)


def test_the_grid_is_fitted_anew_whenever_the_values_have_moved():
    form = BitNet().adapt(Dense(matrix()), torch.Generator())
    moved = form.rebuild({"values": 3 * matrix()[:, :].flip(1)})
    assert moved.dense().equal(grid(3 * matrix().flip(1)).dense())


def test_what_was_removed_takes_no_gradient():
    kept = matrix() > 0
    form = BitNet().adapt(Dense(matrix()).masked(kept), torch.Generator())
    values = form.parameters()["values"].clone().requires_grad_()
    form.rebuild({"values": values}).dense().square().sum().backward()
    assert values.grad is not None and not values.grad[~kept].any() and values.grad[kept].any()
    settled = BitNet().settle(form)
    assert isinstance(settled, Masked) and not settled.dense()[~kept].any()


def test_matrices_inside_others_become_ternary_and_sparse_parts_stay():
    columns = Columns(torch.randn(24, 2), torch.tensor([1, 5], dtype=torch.int32), 16)
    weight = Sum((grid(matrix()), columns, LowRank(Dense(matrix(3, 16)), Dense(matrix(24, 3)))))
    form = BitNet().adapt(weight, torch.Generator())
    assert isinstance(form, Sum) and isinstance(form.parts[0], Latent) and form.parts[1] is columns
    settled = BitNet().settle(form)
    assert isinstance(settled, Sum) and isinstance(settled.parts[2], LowRank)
    assert all(isinstance(part, Quantized) for part in (settled.parts[0], settled.parts[2].down, settled.parts[2].up))
    turned = Incoherent(Dense(matrix()), torch.ones(16, dtype=torch.int8), torch.ones(24, dtype=torch.int8))
    inside = rounded(latent(turned, lambda dtype: lambda values, kept: BitNet().grid(values, kept, dtype)))
    assert isinstance(inside, Incoherent) and isinstance(inside.inner, Quantized)


# runs


@pytest.fixture(scope="module")
def artifact(llama, run_stages) -> Path:
    return run_stages(llama, [BitNet(**FEW, learning_rate=3e-3)])


def test_an_artifact_is_an_ordinary_grid_of_two_bits(artifact, assert_reloads):
    assert_reloads(artifact, atol=1e-5)
    config = json.loads((artifact / "config.json").read_text())
    group = config["quantization_config"]["config_groups"]["group_0"]["weights"]
    assert (config["model_type"], group["num_bits"], group["strategy"]) == ("llama", 2, "channel")
    for weight in weights_of(artifact).values():
        assert isinstance(weight, Quantized) and set(weight.codes.unique().tolist()) == {-1, 0, 1}
        assert len(weight.scale.unique()) == 1


def test_training_moves_codes_and_lowers_the_loss(llama, artifact, run_stages):
    ready = [grid(weight.dense()).codes for weight in weights_of(llama).values()]
    found = [weight.codes for weight in weights_of(artifact).values()]  # type: ignore[attr-defined]
    assert any(not old.equal(new) for old, new in zip(ready, found, strict=True))
    longer = run_stages(llama, [BitNet(steps=40, batch_size=4, length=24, learning_rate=3e-3, hold_out=0)])
    losses = [Manifest.read(path).steps[-1].training["loss"] for path in (artifact, longer)]  # type: ignore[index]
    assert losses[1] < 0.7 * losses[0]


@pytest.mark.parametrize("later", ["logit_kd", "fine_tune"])
def test_later_training_moves_scales_alone(later, artifact, run_stages, make_pass):
    trained = weights_of(run_stages(artifact, [make_pass(later, trains="weights")]))
    for name, weight in weights_of(artifact).items():
        assert isinstance(weight, Quantized) and isinstance(trained[name], Quantized)
        assert trained[name].codes.equal(weight.codes) and not trained[name].scale.equal(weight.scale)


def test_inputs_are_rounded_while_training_and_by_readers(llama, run_stages, assert_reloads):
    with_inputs = run_stages(llama, [BitNet(**FEW, activations="int8")])
    assert_reloads(with_inputs, atol=1e-5)
    assert all(weight.inputs == "int8" for weight in weights_of(with_inputs).values())  # type: ignore[attr-defined]


def test_beside_a_grid_of_another_kind(llama, run_stages, assert_reloads):
    """Zero points stand otherwise in a file that has two schemes than in one that has theirs alone."""
    first = run_stages(llama, ["rtn:symmetric=false,group_size=16,targets=*.up_proj"])
    both = run_stages(first, [BitNet(**FEW, skip="*.up_proj")])
    assert_reloads(both, atol=1e-5)
    before, after = weights_of(first), weights_of(both)
    for name, weight in after.items():
        assert isinstance(weight, Quantized) and weight.bits == (4 if name.endswith("up_proj") else 2)
        if name.endswith("up_proj"):
            assert weight.codes.equal(before[name].codes)  # type: ignore[attr-defined]


def test_a_mask_stays(llama, run_stages, make_pass, assert_reloads):
    pruned = run_stages(llama, [make_pass("wanda", sparsity=0.5)])
    both = run_stages(pruned, [BitNet(**FEW)])
    assert_reloads(both, atol=1e-5)
    before = weights_of(pruned)
    for name, weight in weights_of(both).items():
        assert weight.mask is not None and not (weight.mask & ~before[name].mask).any()  # type: ignore[operator]
