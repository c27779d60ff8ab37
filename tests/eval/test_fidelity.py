"""Divergence and perplexity against closed forms and an independent computation."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from compress.eval.fidelity import base_logprobs, compare, divergence, perplexity


@pytest.fixture(scope="module")
def windows() -> torch.Tensor:
    return torch.randint(320, (3, 40), generator=torch.Generator().manual_seed(5))


def test_identity_diverges_by_nothing():
    logits = torch.randn(50, 300, generator=torch.Generator().manual_seed(0)) * 5
    same = divergence(logits, logits + 3.0, torch.arange(50))  # a softmax ignores a constant
    assert same.kl_max == pytest.approx(0, abs=1e-7)
    assert same.top1_agreement == 1
    assert same.mean_delta_nll == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("noise", [1e-3, 1e-1, 3.0, 100.0])
def test_divergence_equals_float64_arithmetic_and_is_not_negative(noise):
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(200, 300, generator=generator) * 5
    other = base + noise * torch.randn(200, 300, generator=generator)
    labels = torch.randint(300, (200,), generator=generator)
    p, q = base.double().log_softmax(-1), other.double().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    result = divergence(base, other, labels)
    assert result.kl_mean == pytest.approx(kl.mean().item(), rel=1e-4, abs=1e-7)
    assert result.kl_median == pytest.approx(kl.median().item(), rel=1e-3, abs=1e-7)
    assert result.kl_p99 == pytest.approx(np.quantile(kl.numpy(), 0.99), rel=1e-3, abs=1e-7)
    assert result.kl_max == pytest.approx(kl.max().item(), rel=1e-3, abs=1e-7)
    assert result.kl_stderr == pytest.approx(kl.std().item() / math.sqrt(200), rel=1e-3, abs=1e-7)
    assert result.kl_mean >= 0
    delta = functional.nll_loss(q, labels) - functional.nll_loss(p, labels)
    assert result.mean_delta_nll == pytest.approx(delta.item(), rel=1e-4, abs=1e-6)
    assert math.log(result.perplexity / result.base_perplexity) == pytest.approx(delta.item(), rel=1e-4, abs=1e-6)
    assert result.top1_agreement == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match="cannot be compared"):
        divergence(torch.zeros(4, 10), torch.zeros(4, 11), torch.zeros(4, dtype=torch.int64))


def test_the_stored_baseline_gives_what_two_resident_models_give(model, windows, tmp_path):
    path = base_logprobs(model, windows, tmp_path / "deep" / "base.npy")
    assert [file.name for file in path.parent.iterdir()] == ["base.npy"]
    stored = np.load(path, mmap_mode="r")
    assert (stored.shape, stored.dtype) == ((3, 39, 320), np.float32)
    identity = compare(model, windows, path)
    assert (identity.kl_max, identity.top1_agreement, identity.mean_delta_nll) == (0, 1, 0)

    disturbed = copy.deepcopy(model)
    with torch.no_grad():
        disturbed.model.layers[0].mlp.up_proj.weight.mul_(0.5)
        base, other = model(input_ids=windows).logits, disturbed(input_ids=windows).logits
    streamed = compare(disturbed, windows, path)
    direct = divergence(base[:, :-1], other[:, :-1], windows[:, 1:])
    assert streamed.n_tokens == direct.n_tokens == 3 * 39
    for name, value in streamed:
        if name.endswith("bits_per_byte"):
            continue
        assert value == pytest.approx(getattr(direct, name), rel=1e-4, abs=1e-6), name
    assert streamed.perplexity == pytest.approx(perplexity(disturbed, windows).token_perplexity, rel=1e-6)
    with pytest.raises(ValueError, match="expected"):
        compare(model, windows[:2], path)


def test_perplexity_equals_an_independent_computation(model, windows):
    with torch.no_grad():
        losses = [model(input_ids=window[None], labels=window[None]).loss.double() for window in windows]
    mean = torch.stack(losses).mean().item()
    measured = perplexity(model, windows, n_bytes=500)
    assert measured.token_perplexity == pytest.approx(math.exp(mean), rel=1e-5)
    assert measured.bits_per_byte == pytest.approx(mean * 3 * 39 / math.log(2) / 500, rel=1e-5)
    assert perplexity(model, windows).bits_per_byte is None


def test_a_uniform_model_has_the_vocabulary_as_its_perplexity(windows):
    class Uniform(nn.Module):
        def __init__(self):
            super().__init__()
            self.level = nn.Parameter(torch.zeros(()))

        def forward(self, input_ids, use_cache):
            return type("Output", (), {"logits": self.level.expand(*input_ids.shape, 320)})

    assert perplexity(Uniform(), windows).token_perplexity == pytest.approx(320, rel=1e-6)


def test_perplexity_is_that_of_a_computation_in_five_lines(model, windows):
    total = 0.0
    for window in windows:
        with torch.no_grad():
            logits = model(window[None]).logits[0].double()
        total -= sum(float(logits[i].log_softmax(-1)[window[i + 1]]) for i in range(len(window) - 1))
    n_tokens = len(windows) * (windows.shape[1] - 1)
    found = perplexity(model, windows, n_bytes=1000)
    assert found.token_perplexity == pytest.approx(math.exp(total / n_tokens), rel=1e-6)
    assert found.bits_per_byte == pytest.approx(total / math.log(2) / 1000, rel=1e-6)
