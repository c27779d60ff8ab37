"""Laws of low bits: constants come back, noise and mixed recipes are refused, the words say what the numbers do."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.eval.bit_runs import with_low_bits
from compress.eval.cost import Cost
from compress.eval.density import FamilyMember
from compress.eval.density import fit as fit_family
from compress.eval.fidelity import Fidelity
from compress.eval.harness import TaskScore
from compress.eval.low_bits import BitLaw, QuantizedRun, fit, published_law
from compress.eval.metrics import Metrics, Report, merge

WIDTHS = (2.25, 3.125, 4.125, 8.125)
STEEP = BitLaw(scale=20, exponent=5)


def runs(law: BitLaw, widths=WIDTHS, error: float | None = None) -> list[QuantizedRun]:
    return [QuantizedRun(label=f"{bits}", recipe="rtn", bits=bits, loss=law.loss(bits), error=error) for bits in widths]


def measured(label: str, bits: float | None, loss: float, *passes: str, size: int = 10**9) -> Metrics:
    text = {"metrics": {"bits_per_byte": 1.0 + loss}, "stderr": {}, "primary": "bits_per_byte", "higher_is_better": False}
    nbytes = round(size * (bits or 16) / 8)
    cost = Cost(bytes_on_disk=nbytes, weight_bytes=nbytes, compressed_bits_per_weight=bits, non_embedding_parameters=size)
    fidelity = Fidelity(
        mean_delta_nll=loss, delta_nll_stderr=1e-6, kl_mean=abs(loss), kl_stderr=0, kl_median=0, kl_p99=0, kl_max=0,
        top1_agreement=1, perplexity=7.0, base_perplexity=7.0, n_tokens=1000,
    )  # fmt: skip
    return Metrics(
        label=label, model=label, digest=label, cost=cost, fidelity=fidelity if passes else None, passes=passes,
        tasks={"text": TaskScore(n_samples=9, **text)},
    )  # fmt: skip


def swept(*methods: str, law: BitLaw = STEEP, widths=WIDTHS, size: int = 10**9) -> Report:
    report = Report(title="swept", base=measured("base", None, 0.0, size=size))
    for method in methods:
        for bits in widths:
            report = report.add(measured(f"{method} {bits}", bits, law.loss(bits), f"{method}:bits={int(bits)}", size=size))
    return report


@given(st.floats(0.01, 100), st.floats(0.5, 9))
def test_a_law_comes_back_from_its_own_points(scale: float, exponent: float) -> None:
    found = fit("rtn", runs(BitLaw(scale=scale, exponent=exponent)))
    assert found.scale == pytest.approx(scale, rel=1e-9) and found.exponent == pytest.approx(exponent, rel=1e-9)
    assert found.residual < 1e-12 and found.labels == tuple(map(str, WIDTHS))
    assert found.loss(found.bits(0.3)) == pytest.approx(0.3)


def test_the_published_law_is_the_formula_and_moves_as_the_paper_says() -> None:
    law = published_law(7e9, 2e11)
    assert law.loss(3) == pytest.approx(0.017 * (2e11) ** 0.5251 / ((7e9) ** 0.2261 * 3**5.4967), rel=1e-12)
    assert published_law(7e9, 2e12).loss(3) / law.loss(3) == pytest.approx(10**0.5251)  # more tokens, more to lose
    assert law.loss(3) / published_law(7e10, 2e11).loss(3) == pytest.approx(10**0.2261)  # more parameters, less
    # The 12-billion model of the fitted range, trained to its end: little at 4 bits, ruin at 2.
    assert published_law(12e9, 206e9).loss(4) == pytest.approx(0.038, abs=0.002)
    assert published_law(12e9, 206e9).loss(2) > 1


def test_what_gives_no_law_is_refused() -> None:
    law = STEEP
    with pytest.raises(ValueError, match="takes 3 widths that cost something, and there are 2"):
        fit("rtn", runs(law, (2.25, 2.26, 3.125)))
    lost = runs(law, (8.1,), error=1.0)
    with pytest.raises(ValueError, match="there are 2, and 1 whose loss is not told from none"):
        fit("rtn", runs(law, (2.25, 3.125)) + lost)
    assert fit("rtn", runs(law) + lost).labels == tuple(map(str, WIDTHS))  # noise takes no part
    with pytest.raises(ValueError, match="does not fall"):
        fit("rtn", [QuantizedRun(label=f"{bits}", recipe="rtn", bits=bits, loss=bits) for bits in WIDTHS])


def test_recipes_are_kept_apart() -> None:
    found = with_low_bits(swept("rtn", "gptq")).low_bits
    assert found is not None and [curve.recipe for curve in found.curves] == ["rtn", "gptq"] and found.published is None
    assert all(curve.exponent == pytest.approx(5) for curve in found.curves)

    mixed = swept("rtn", "gptq", "hqq", widths=(2.25, 3.125))
    found = with_low_bits(mixed).low_bits
    assert found is not None and not found.curves
    said = " ".join(found.words())
    assert "No curve for rtn, gptq, hqq: it takes 3 widths" in said and "different recipes would mean nothing" in said


def test_only_what_quantizes_takes_part() -> None:
    report = swept("rtn")
    for label, *passes in (
        ("pruned", "wanda:sparsity=0.5", "rtn:bits=3"),
        ("unknown", "somebodys:bits=3"),
        ("values only", "kv_cache:bits=4"),
        ("rotated", "quarot", "rtn:bits=3"),
        ("rounded too", "quarot:activation_bits=8", "rtn:bits=3"),
    ):
        report = report.add(measured(label, 3.125, 0.1, *passes))
    report = report.add(measured("not a number", 3.125, math.nan, "rtn:bits=3"))
    found = with_low_bits(report).low_bits
    assert found is not None
    assert {run.recipe for run in found.runs} == {"rtn", "quarot > rtn", "quarot:activation_bits=8 > rtn"}
    assert len(found.runs) == len(WIDTHS) + 2


def test_a_report_of_single_runs_says_nothing_until_training_is_known() -> None:
    report = swept("rtn", "gptq", widths=(3.125,))
    assert with_low_bits(report).low_bits is None
    found = with_low_bits(report, 15 * 10**12).low_bits
    assert found is not None and found.published == published_law(1e9, 15e12)


def test_words_say_what_training_makes_of_low_bits() -> None:
    told = with_low_bits(swept("rtn"), 15 * 10**12)
    assert told.low_bits is not None and told.low_bits.published is not None
    said = " ".join(told.low_bits.words())
    law = told.low_bits.published
    assert "15T tokens, 15,000 for each of its 1B parameters" in said and "about 20 spend compute best" in said
    assert f"{law.loss(4):.2g} at 4 bits" in said and f"at {law.bits():.1f} bits" in said
    assert f"20 tokens a parameter would at {published_law(1e9, 20e9).bits():.1f} bits" in said
    assert f"fewer than {law.bits():.1f} a bad bargain, by that law" in said
    assert f"rtn loses {STEEP.loss(3):.2g} at 3 bits, where the published law says {law.loss(3):.2g}" in said
    assert "an extrapolation, as 15T tokens is outside" in said
    assert "rtn: by its own 4 runs of 2.25 to 8.12 bits per weight" in said
    assert f"at {STEEP.bits():.1f} bits" in said
    assert told.lines()[-1] == told.low_bits.words()[-1]

    little = " ".join(with_low_bits(swept("rtn", size=10**10), 10**11).low_bits.words())
    assert "gives up bits cheaply" in little and "here too it is an extrapolation" in little
    tiny = " ".join(with_low_bits(swept("rtn", size=10**6), 10**13).low_bits.words())
    assert "more than 5 at 2 bits" in tiny and "as 1M parameters and 10T tokens are outside" in tiny
    unsized = swept("rtn").base.model_copy(update={"cost": Cost(bytes_on_disk=1, weight_bytes=1)})
    unsized = with_low_bits(swept("rtn").model_copy(update={"base": unsized}), 10**12)
    assert "do not hold" in unsized.low_bits.words()[-1]


@pytest.mark.parametrize(("law", "verdict"), [(STEEP, "lose less"), (BitLaw(scale=0.2, exponent=5), "not lose less")])
def test_a_smaller_model_in_as_many_bits_is_judged_where_a_family_says_its_loss(law: BitLaw, verdict: str) -> None:
    report = swept("rtn", law=law)
    members = [FamilyMember(label=f"{n:g}", parameters=n, loss=(1e9 / n) ** 0.1) for n in (1e8, 5e8, 1e9)]
    report = with_low_bits(report.model_copy(update={"density": fit_family("text", members)}))
    assert report.low_bits is not None and report.low_bits.smaller is not None
    other = report.low_bits.smaller
    assert (other.label, other.bits) == ("rtn 2.25", 4.125)
    assert other.parameters == pytest.approx(1e9 * 2.25 / 4.125)
    assert other.loss == pytest.approx((4.125 / 2.25) ** 0.1 + law.loss(4.125)) and other.run_loss == 1 + law.loss(2.25)
    assert report.low_bits.words()[-1].endswith(f"a smaller model at more bits would {verdict}.")
    beyond = fit_family("text", [member.model_copy(update={"parameters": member.parameters * 10}) for member in members])
    assert with_low_bits(report.model_copy(update={"density": beyond})).low_bits.smaller is None


def test_merged_reports_are_fitted_anew() -> None:
    halves = [swept("rtn", widths=WIDTHS[:2]), swept("rtn", widths=WIDTHS[2:])]
    whole = merge([with_low_bits(half, 10**12) for half in halves])
    assert whole.low_bits is None
    assert [curve.recipe for curve in with_low_bits(whole).low_bits.curves] == ["rtn"]
