"""LoRA: begins at the layer, trains its change alone, and merges into the form that the layer has."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress.adapted import Corrected
from compress.distill.lora import LoRA
from compress.trainable import outline_trained
from compress.weights import Affine, Dense, LowRank, Quantized, Sum, Weight

DRAW = torch.Generator().manual_seed(0)


def matrix(n_outputs: int = 12, n_inputs: int = 16) -> Tensor:
    return torch.randn(n_outputs, n_inputs, generator=DRAW)


def grid(zero_points: bool = False) -> Quantized:
    codes = torch.randint(-4, 4, (12, 16), generator=DRAW, dtype=torch.int8)
    zeros = torch.randint(-4, 4, (12, 2), generator=DRAW, dtype=torch.int8) if zero_points else None
    return Quantized(codes, torch.rand(12, 2, generator=DRAW) + 0.1, zeros, 3)


FORMS = {
    "dense": lambda: Dense(matrix()),
    "masked": lambda: Dense(matrix()).masked(matrix() > 0),
    "grid": grid,
    "sum": lambda: Sum((grid(), LowRank(Dense(matrix(2, 16)), Dense(matrix(12, 2))))),
}


def moved(weight: Weight) -> Weight:
    """The weight after some training, whatever it trains."""
    return weight.rebuild({name: value + 0.1 * torch.randn_like(value) for name, value in weight.parameters().items()})


@pytest.mark.parametrize("form", FORMS)
def test_a_change_begins_at_nothing_and_merges_to_what_was_trained(form):
    weight, step = FORMS[form](), LoRA(rank=3)
    adapted = step.adapt(weight, DRAW)
    assert torch.equal(adapted.dense(), weight.dense())
    assert {name: value.shape for name, value in adapted.parameters().items()} == {"down": (3, 16), "up": (12, 3)}
    trained = moved(adapted)
    assert not torch.equal(trained.dense(), weight.dense())
    merged = step.settle(trained)
    torch.testing.assert_close(merged.dense(), trained.dense())
    if form in ("dense", "masked"):
        assert type(merged) is type(weight) and merged.nbytes == weight.nbytes
    else:
        assert isinstance(merged, Sum) and merged.nbytes == weight.nbytes + 4 * 3 * (12 + 16)
    if weight.mask is not None:
        assert torch.equal(merged.mask, weight.mask) and not merged.dense()[~weight.mask].any()


def test_a_masked_matrix_changes_under_its_mask_only_and_by_no_more_than_the_rank():
    weight = FORMS["masked"]()
    trained = moved(LoRA(rank=2).adapt(weight, DRAW))
    assert isinstance(trained, Corrected)
    change = trained.up @ trained.down
    assert torch.linalg.matrix_rank(change) == 2
    torch.testing.assert_close(trained.dense() - weight.dense(), change * weight.mask)


@pytest.mark.parametrize("weight", [grid(), grid(zero_points=True)], ids=["symmetric", "zero_points"])
def test_zero_points_take_the_change_of_an_integer_grid(weight):
    step = LoRA(grids="zeros")
    adapted = step.adapt(weight, DRAW)
    assert isinstance(adapted, Affine) and torch.equal(adapted.codes, weight.codes)
    torch.testing.assert_close(adapted.dense(), weight.dense())
    assert "zero" in adapted.parameters() and step.settle(moved(adapted)).nbytes == adapted.nbytes


@pytest.mark.parametrize("weight", [grid(), grid(zero_points=True)], ids=["symmetric", "zero_points"])
def test_a_pooled_change_ends_in_the_zero_points(weight):
    """QA-LoRA: the change is a map of the sums of each group's inputs, of low rank, and merges exactly."""
    step = LoRA(grids="pooled", rank=1)
    adapted = step.adapt(weight, DRAW)
    torch.testing.assert_close(adapted.dense(), weight.dense())
    assert {name: value.shape for name, value in adapted.parameters().items()} == {"down": (1, 2), "up": (12, 1)}
    trained = moved(adapted)
    inputs = torch.randn(5, 16, generator=DRAW)
    pooled = inputs.unflatten(1, (2, 8)).sum(-1) @ trained.down.T @ trained.up.T
    torch.testing.assert_close(inputs @ trained.dense().T, inputs @ weight.dense().T + pooled)
    merged = step.settle(trained)
    assert isinstance(merged, Affine) and torch.equal(merged.codes, weight.codes) and torch.equal(merged.scale, weight.scale)
    torch.testing.assert_close(merged.dense(), trained.dense())
    assert step.outline(weight.map(lambda tensor: tensor.to("meta"))).nbytes == merged.nbytes


def test_a_change_that_is_not_merged_stays_beside_a_dense_matrix():
    step = LoRA(merge=False, rank=2)
    merged = step.settle(moved(step.adapt(Dense(matrix()), DRAW)))
    assert isinstance(merged, Sum) and isinstance(merged.parts[1], LowRank) and merged.parts[1].rank == 2
    with pytest.raises(ValueError, match=r"fill the zeros of its mask; .* \(merge=true\)"):
        step.outline(FORMS["masked"]())


def test_what_can_take_no_change_stays():
    masked = grid().masked(matrix() > 0)
    assert LoRA().adapt(masked, DRAW) is masked
    rounds_inputs = Quantized(grid().codes, grid().scale, None, 8, inputs="int8")  # type: ignore[arg-type]
    assert LoRA().adapt(rounds_inputs, DRAW) is rounds_inputs
    with pytest.raises(ValueError, match="fill the zeros"):
        Corrected.start(masked, 2, DRAW).final()


def test_factors_are_healed_one_by_one_and_a_plan_knows_the_bytes():
    low_rank = LowRank(Dense(matrix(4, 16)), grid().__class__(grid().codes[:, :4], grid().scale[:, :1], None, 3))
    meta = low_rank.map(lambda tensor: tensor.to("meta"))
    planned = outline_trained(LoRA(rank=3), "layer", meta)
    assert isinstance(planned, LowRank) and planned.rank == 4
    assert planned.nbytes == low_rank.nbytes + 4 * 3 * (12 + 4)
    assert outline_trained(LoRA(rank=3, skip="*.up"), "layer", meta).nbytes == low_rank.nbytes  # type: ignore[arg-type]
