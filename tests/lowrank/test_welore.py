"""WeLore: ranks through the survey, by one threshold."""

import pytest
import torch
from pydantic import ValidationError

from compress.lowrank.svd import SVD
from compress.lowrank.welore import WeLore
from compress.stats import LinearStats
from compress.weights import Dense, LowRank

NO_STATS = LinearStats(60, ())


def no_effect(_):
    raise AssertionError("nothing is to be run")


def allotted(step: WeLore, weights: dict[str, torch.Tensor]) -> dict[str, int | None]:
    found = {name: step.survey(Dense(weight), NO_STATS, no_effect) for name, weight in weights.items()}
    return {name: chosen.rank_of(*weights[name].shape) for name, chosen in step.allocate(found, []).items()}


def matrices() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "layers.0.flat": torch.linalg.qr(torch.randn(60, 60)).Q * torch.linspace(1, 0.8, 60),
        "layers.0.heavy": torch.randn(60, 60) @ torch.diag(torch.logspace(1, -2, 60)) @ torch.randn(60, 60),
        "layers.0.wide": torch.randn(40, 60) * torch.logspace(0, -1, 40).unsqueeze(1),
    }


def test_heavy_tails_are_cut_and_flat_spectra_stay_whole():
    weights = matrices()
    ranks = allotted(WeLore(ratio=0.6), weights)
    assert ranks["layers.0.flat"] is None and ranks["layers.0.heavy"] is not None
    n_kept = sum(w.numel() if (r := ranks[name]) is None else r * sum(w.shape) for name, w in weights.items())
    total = sum(weight.numel() for weight in weights.values())
    assert 0.6 * total - 120 < n_kept <= 0.6 * total


def test_more_parameters_never_lower_a_rank():
    weights, before = matrices(), [0, 0, 0]
    for ratio in (0.2, 0.4, 0.6, 0.8, 0.95):
        ranks = [100 if rank is None else rank for rank in allotted(WeLore(ratio=ratio), weights).values()]
        assert all(new >= old for new, old in zip(ranks, before, strict=True))
        before = ranks


def test_components_are_those_of_plain_svd():
    weight = matrices()["layers.0.heavy"]
    found = {"a.0.b": WeLore(ratio=0.3).survey(Dense(weight), NO_STATS, no_effect)}
    chosen = WeLore(ratio=0.3).allocate(found, [])["a.0.b"]
    result, plain = chosen.linear(weight, NO_STATS, None), SVD(ratio=0.3).linear(weight, NO_STATS, None)
    assert isinstance(result, LowRank) and torch.equal(result.dense(), plain.dense())


def test_there_is_one_rule():
    with pytest.raises(ValidationError):
        WeLore.model_validate({"ranks": "uniform"})
