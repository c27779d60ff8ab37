"""Gates: units, several at once, messages with value and limit; what was not measured does not hold."""

from __future__ import annotations

import math

import pytest

from compress.amounts import parse_bytes
from compress.errors import BadInput
from compress.eval.fidelity import Fidelity
from compress.eval.flips import Flips
from compress.eval.metrics import Metrics
from compress.gates import Gates, gate_cases, missed


def metrics(recovery: float | None, kl: float | None, flips: tuple[int, int] | None = None) -> Metrics:
    """Measurements with no more than what gates read. flips: (documents, negative ones)."""
    counted = {"task": Flips(n=flips[0], negative=flips[1], positive=0, p_value=1.0)} if flips else {}
    fidelity = Fidelity.model_construct(kl_mean=kl) if kl is not None else None
    return Metrics.model_construct(mean_recovery=recovery, fidelity=fidelity, flips=counted)


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [("2.5GB", 2_500_000_000), ("800MiB", 800 << 20), ("1 gib", 1 << 30), (".5k", 500), ("7", 7), ("3TB", 3 * 10**12), ("9b", 9)],
)
def test_units(text: str, n_bytes: int):
    assert parse_bytes(text, "--max-bytes") == n_bytes


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "2.5 XB", "1,000", "5i", "1e9", "nan"])
def test_no_sizes(text: str):
    with pytest.raises(BadInput, match="--max-bytes"):
        parse_bytes(text, "--max-bytes")


@pytest.mark.parametrize(
    "limits", [(97, None, None, None), (None, None, -1, None), (None, None, math.nan, None), (None, None, None, 2)]
)
def test_no_limits(limits):
    with pytest.raises(BadInput, match="--m"):
        Gates.typed(*limits)


def test_all_that_is_missed_is_said_with_value_and_limit():
    gates = Gates.typed(0.97, "1KB", 0.05, 0.01)
    found = missed(gates.checked(2000, metrics(0.9123456, 0.25, (100, 3))))
    assert found == (
        "--min-recovery: recovery 0.91235 is below 0.97; --max-bytes: 2,000 bytes are more than 1,000; "
        "--max-kl: KL to the base 0.25 is above 0.05; --max-flips: share of flips to wrong 0.03 is above 0.01"
    )
    assert [case.failed for case in gate_cases(gates.checked(500, metrics(0.98, 0.25, (100, 1))))] == [False, False, True, False]
    assert missed(gates.checked(1000, metrics(0.97, 0.05, (100, 1)))) == ""
    assert Gates().checked(1, None) == []


@pytest.mark.parametrize("found", [None, metrics(None, None), metrics(math.nan, math.nan)])
def test_what_was_not_measured_does_not_hold(found):
    checked = Gates(min_recovery=0.0, max_kl=100, max_flips=1).checked(1, found)
    assert [each.held for each in checked] == [False, False, False]


def test_gates_on_behaviour_need_the_evaluation():
    Gates(max_bytes=1).check_measurable(False)
    with pytest.raises(BadInput, match="--max-kl and --max-flips need the evaluation"):
        Gates(max_kl=1, max_flips=1).check_measurable(False)
