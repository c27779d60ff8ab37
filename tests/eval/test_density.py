"""A family's curve is found exactly in synthetic data, and read backwards exactly."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.eval.cost import Cost
from compress.eval.density import FamilyMember, ScoreCurve, fit
from compress.eval.harness import TaskScore
from compress.eval.metrics import Metrics, Report
from compress.eval.reference import read_references, with_density

EXPONENT, CRITICAL = 0.076, 8.8e13
SIZES = (1e6, 1e7, 3e8, 1e9)


def loss_of(size: float) -> float:
    return (CRITICAL / size) ** EXPONENT


def family(score=lambda loss: None):
    return fit("text", [FamilyMember(label=f"{n:g}", parameters=n, loss=loss_of(n), score=score(loss_of(n))) for n in SIZES])


def test_kaplans_constants_come_back() -> None:
    found = family()
    assert found.exponent == pytest.approx(EXPONENT, rel=1e-10) and found.critical == pytest.approx(CRITICAL, rel=1e-8)
    assert found.residual < 1e-12 and found.scored is None
    assert found.loss(1e9) == pytest.approx(2.3756, abs=1e-4)
    # A loss that is 1 % higher costs 12.3 % of the parameters.
    assert 1 - found.parameters(1.01 * found.loss(1e9)) / 1e9 == pytest.approx(0.123, abs=0.001)


@given(st.floats(1e5, 1e12))
def test_reading_backwards_undoes_reading(size: float) -> None:
    found = family()
    assert found.parameters(found.loss(size)) == pytest.approx(size, rel=1e-9)


def test_scores_are_turned_into_losses() -> None:
    truth = ScoreCurve(floor=0.25, slope=2.0, middle=2.6)
    found = family(truth.score)
    assert found.scored is not None
    for size in SIZES:
        assert found.parameters_of(math.nan, truth.score(loss_of(size))) == pytest.approx(size, rel=0.05)
    assert math.isfinite(found.parameters_of(1.0, 1.0)) and math.isfinite(found.parameters_of(1.0, 0.0))
    assert truth.loss(truth.score(2.0)) == pytest.approx(2.0)


def test_what_is_no_family_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 3 sizes"):
        fit("text", [FamilyMember(label="a", parameters=1, loss=1)] * 3)
    with pytest.raises(ValueError, match="do not fall"):
        fit("text", [FamilyMember(label=str(n), parameters=n, loss=n) for n in (1, 2, 3)])


def measured(label: str, size: int, loss: float, nbytes: int | None = None) -> Metrics:
    text = TaskScore(metrics={"bits_per_byte": loss}, stderr={}, primary="bits_per_byte", higher_is_better=False, n_samples=9)
    nbytes = nbytes or 2 * size
    cost = Cost(bytes_on_disk=nbytes, weight_bytes=nbytes, non_embedding_parameters=size, non_embedding_bytes=nbytes)
    return Metrics(label=label, model=label, digest=label, cost=cost, tasks={"text": text})


def test_points_are_placed_on_the_curve_of_measured_models(tmp_path) -> None:
    files = []
    for size in SIZES:
        whole = Report(title="member", base=measured(f"{size:g}", int(size), loss_of(size)))
        files.append(whole.save(tmp_path / f"{size:g}" / "metrics.json").parent)
    base = measured("base", 10**9, loss_of(1e9))
    quarter = measured("packed", 10**9, loss_of(5e8), nbytes=5 * 10**8)
    report = with_density(Report(title="run", base=base).add(quarter), read_references(files))
    assert report.density is not None and [member.parameters for member in report.density.members] == list(SIZES)
    assert report.base.density == pytest.approx(1) and report.base.bit_density == pytest.approx(1)
    point = report.points[0]
    assert point.effective_parameters == pytest.approx(5e8) and point.density == pytest.approx(0.5)
    assert point.bit_density == pytest.approx(2)  # half the parameters' worth in a quarter of the bits
    with pytest.raises(ValueError, match="in common"):
        with_density(report, [measured("other", 1, 1.0).model_copy(update={"tasks": {}})] * 3)
