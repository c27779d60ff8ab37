"""BESA: its probabilities and masks, their gradients, exact counts, and an error that is never above Wanda's."""

import pytest
import torch

from compress.checkpoint import Checkpoint
from compress.prune.besa import Ranked, exact_masks, expected, tilted
from compress.prune.wanda import Wanda
from compress.skeleton import Skeleton
from compress.weights import Dense, Masked
from tests.inputs import stats_of


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9])
def test_the_tilt_meets_the_sparsity_and_carries_its_gradient(sparsity):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 21, generator=generator, dtype=torch.float64).requires_grad_()
    n_weights = torch.tensor([100.0, 50.0, 7.0], dtype=torch.float64)
    value = torch.randn(21, generator=generator, dtype=torch.float64)

    def objective(logits):
        return (tilted(logits, n_weights, sparsity)[0] * value).sum()

    torch.set_default_dtype(torch.float64)
    try:
        chance = tilted(logits, n_weights, sparsity)
        assert float((n_weights @ expected(chance)).detach()) == pytest.approx(sparsity * 157, abs=1e-8)
        torch.testing.assert_close(chance.sum(1), torch.ones(3))
        assert torch.autograd.gradcheck(objective, (logits,), eps=1e-5, atol=1e-6)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_mask_is_wandas_with_the_gradient_of_the_probability_to_stay():
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(6, 40, generator=generator), torch.randn(50, 40, generator=generator)
    ranked, logits = Ranked(Dense(weight), stats_of(x), 20), torch.zeros(1, 21, requires_grad=True)
    chance = tilted(logits, torch.ones(1), 0.6)
    mask = ranked.mask(chance)
    assert set(mask.detach().unique().tolist()) == {0.0, 1.0}
    n_removed = (mask == 0).sum(1)
    assert bool(((n_removed == 24) | (n_removed == 23)).all())  # 0.6 is met to rounding
    assert torch.equal(mask > 0.5, Wanda(sparsity=(int(n_removed[0]) + 0.5) / 40).linear(weight, stats_of(x), None).mask)
    soft = torch.stack([torch.stack([chance[0, : int(r) * 20 // 40 + 1].sum() for r in row]) for row in ranked.rank])
    (found,), (wanted,) = (torch.autograd.grad((m * weight).sum(), logits, retain_graph=True) for m in (mask, soft))
    torch.testing.assert_close(found, wanted)
    by_row = tilted(torch.zeros(6, 21), torch.ones(6), 0.6)
    assert torch.equal(ranked.mask(by_row), ranked.mask(by_row[:1]))


def test_weights_that_are_gone_go_first():
    kept = torch.rand(6, 40, generator=torch.Generator().manual_seed(0)) > 0.3
    weight = torch.randn(6, 40) * kept
    ranked = Ranked(Masked(Dense(weight), kept), stats_of(torch.randn(9, 40)), 100)
    assert bool((ranked.rank[~kept] < (~kept).sum(1).repeat_interleave((~kept).sum(1))).all())


def test_counts_are_exact():
    ranks = [torch.rand(size, 40).argsort(1).argsort(1) for size in (7, 5)]
    masks = exact_masks(ranks, [torch.tensor([0.61]), torch.tensor([0.2, 0.31, 0.5, 0.9, 1.0])])
    wanted = 7 * 40 * 0.61 + 40 * (0.2 + 0.31 + 0.5 + 0.9) + 39  # a weight of each row stays
    assert sum(int((~mask).sum()) for mask in masks) in (int(wanted), int(wanted) + 1)
    assert {int(n) for n in (~masks[0]).sum(1)} == {24, 25}


@pytest.mark.parametrize("settings", ["", ",by_row=true"])
def test_never_a_larger_error_than_wandas(settings, llama, calibration, run_stages, assert_reloads):
    """Of the first block, whose inputs are the same, on the calibration windows."""
    from compress.calibration import load_tokenizer, read_text, windows

    learned = run_stages(llama, [f"besa:sparsity=0.6,iterations=10,learning_rate=0.1{settings}"])
    start = run_stages(llama, [f"besa:sparsity=0.6,iterations=0{settings}"])
    assert_reloads(learned, atol=1e-5)
    text, separator = read_text(calibration.data)
    tokens = windows(load_tokenizer(llama, 256), text, separator, n=10, length=24, seed=0).tokens
    outputs, masks = {}, {}
    for path in (llama, start, learned):
        skeleton = Skeleton(Checkpoint(path))
        weights = skeleton.read_weights(0)
        skeleton.load_block(0, weights)
        with torch.no_grad():
            outputs[path] = skeleton.run_block(0, next(iter(skeleton.embed([tokens]))))
        masks[path] = {name: weight.mask for name, weight in weights.items()}
    errors = [float((outputs[path] - outputs[llama]).square().mean()) for path in (start, learned)]
    assert errors[1] < errors[0]
    total = sum(mask.numel() for mask in masks[learned].values())
    for path in (start, learned):
        assert sum(int((~mask).sum()) for mask in masks[path].values()) == int(0.6 * total + 1e-3)
    assert len({round(float(mask.float().mean()), 2) for mask in masks[learned].values()}) > 1
