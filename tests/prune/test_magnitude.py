"""Magnitude pruning."""

import torch

from compress.prune.magnitude import Magnitude
from compress.stats import LinearStats
from compress.weights import Masked

NO_STATS = LinearStats(32, ())


def test_the_smallest_of_the_matrix_go():
    weight = torch.randn(8, 32)
    result = Magnitude(sparsity=0.3).linear(weight, NO_STATS, None)
    assert isinstance(result, Masked)
    threshold = weight.abs().flatten().sort().values[int(256 * 0.3)]
    assert torch.equal(result.kept, weight.abs() >= threshold)
    assert torch.equal(result.dense()[result.kept], weight[result.kept])


def test_sparsity_zero_is_the_identity():
    weight = torch.randn(8, 32).to(torch.bfloat16)
    assert torch.equal(Magnitude(sparsity=0).linear(weight, NO_STATS, None).dense(), weight)


def test_equal_bfloat16_weights_do_not_change_the_count():
    weight = (torch.randn(8, 32) * 4).round().to(torch.bfloat16)
    result = Magnitude(sparsity=0.5, pattern="row").linear(weight, NO_STATS, None)
    assert result.mask is not None and bool((result.mask.sum(1) == 16).all())


def test_outline():
    weight = torch.randn(8, 32).to(torch.bfloat16)
    step = Magnitude()
    outline, result = step.outline(weight.to("meta"), NO_STATS, None), step.linear(weight, NO_STATS, None)
    assert type(outline) is type(result)
    assert (outline.shape, outline.dtype, outline.nbytes) == (result.shape, result.dtype, result.nbytes)
