"""Recovery, the Pareto front, merging, and JSON both ways."""

from __future__ import annotations

import json
import math
from functools import reduce

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from compress.eval.density import Density
from compress.eval.metrics import Protocol, Report, merge, pareto_front, recovery

numbers = st.integers(0, 12).map(float)  # few values, so that ties happen


@given(st.lists(st.tuples(numbers, numbers), max_size=25))
def test_the_front_is_exactly_what_nothing_dominates(points):
    def dominates(a, b):
        return a != b and a[0] <= b[0] and a[1] >= b[1]

    front = pareto_front(points)
    assert set(front) == {i for i, point in enumerate(points) if not any(dominates(other, point) for other in points)}
    assert [points[i] for i in front] == sorted(points[i] for i in front)


def test_recovery_is_a_share_kept_whichever_way_the_metric_runs(make_metrics):
    base = make_metrics("base", 100, 0.8, bits_per_byte=1.0)
    point = make_metrics("small", 50, 0.6, bits_per_byte=1.25).recovered(base)
    assert point.recovery == {"choice": pytest.approx(0.75), "text": pytest.approx(0.8)}
    assert point.mean_recovery == pytest.approx(0.75)  # of the accuracies alone
    assert point.recovery_error(base) == pytest.approx(0.02 / 0.8)
    only_text = point.model_copy(update={"tasks": {"text": point.tasks["text"]}}).recovered(base)
    assert only_text.mean_recovery == pytest.approx(0.8)
    assert only_text.recovery_error(base) is None
    assert base.recovered(base).mean_recovery == 1


def test_undefined_recoveries_are_left_out(make_metrics):
    base, point = make_metrics("base", 100, 0.0), make_metrics("small", 50, 0.5, bits_per_byte=math.inf)
    assert recovery(point.tasks, base.tasks) == {"text": 0.0}
    assert recovery({}, base.tasks) == {}
    assert point.recovered(point.model_copy(update={"tasks": {}})).mean_recovery is None


def test_a_score_that_is_no_number_keeps_nothing(make_metrics):
    base, broken = make_metrics("base", 100, 0.8), make_metrics("small", 50, math.nan, bits_per_byte=math.nan)
    assert recovery(broken.tasks, base.tasks) == {"choice": 0.0, "text": 0.0}
    assert recovery(base.tasks, broken.tasks) == {}


@pytest.mark.parametrize(
    ("place", "value", "told"),
    [
        (("base", "cost", "bytes_on_disk"), 0, "greater than 0"),
        (("points", 0, "cost", "bytes_on_disk"), 10**400, "base.cost|points.0.cost|too large|out of range|less than"),
        (("points", 0, "cost", "compressed_bits_per_weight"), "NaN", "finite|greater"),
        (("points", 0, "tasks", "choice", "primary"), "acc_best", "'acc_best' is none of acc, acc_norm"),
        (("points", 1, "label"), "gptq", "several models have the label 'gptq'"),
        (("$schema",), "urn:compress-lm:metrics:2", "another release"),
        (("schema_version",), 2, "should be 1"),
    ],
)
def test_files_that_contradict_themselves_are_refused(report, tmp_path, place, value, told):
    content = json.loads(report.dump())
    *way, last = place
    reduce(lambda node, key: node[key], way, content)[last] = value
    (tmp_path / "metrics.json").write_text(json.dumps(content))
    with pytest.raises(ValidationError, match=told):
        Report.load(tmp_path / "metrics.json")


def test_json_both_ways(report, tmp_path, make_metrics):
    report = report.add(make_metrics("broken", 10, 0.5, bits_per_byte=math.inf))
    path = report.save(tmp_path / "new" / "metrics.json")
    assert Report.load(path) == report
    assert [file.name for file in path.parent.iterdir()] == ["metrics.json"]
    path.write_text('{"title": "no base"}')
    with pytest.raises(ValidationError):
        Report.load(path)


def test_labels_are_unique_in_a_report(report, make_metrics):
    with pytest.raises(ValueError, match="already"):
        report.add(make_metrics("gptq", 1, 0.5))
    with pytest.raises(ValueError, match="already"):
        report.add(make_metrics("base", 1, 0.5))


def test_the_front_of_a_report_has_the_base(report):
    assert [point.label for point in report.front()][-1] == "base"
    assert "wanda+gptq" not in [point.label for point in report.front()]


def test_merge_keeps_each_point_once_and_its_lineage(report, make_metrics):
    other = Report(title="other", base=report.base)
    other = other.add(report.points[0])  # measured in both
    other = other.add(make_metrics("wanda", 70, 0.5).model_copy(update={"digest": "another"}))
    other = other.add(make_metrics("wanda+svd", 60, 0.5, parent="wanda"))
    merged = merge([report, other], title="both")
    labels = [point.label for point in merged.points]
    assert labels == [*(point.label for point in report.points), "wanda (2)", "wanda+svd"]
    assert merged.points[-1].parent == "wanda (2)"
    assert merge([merged, merged]).points == merged.points


def test_merge_keeps_densities_of_one_family_only(report):
    def placed(label: str, exponent: float) -> Report:
        family = Density(task="text", members=(), exponent=exponent, critical=1e9, residual=0.0)
        points = tuple(one.model_copy(update={"label": label, "digest": label, "density": 0.5}) for one in report.points[:1])
        return report.model_copy(update={"points": points, "density": family})

    same = merge([placed("a", 0.1), placed("b", 0.1), report])
    assert same.density is not None and [point.density for point in same.points[:3]] == [0.5, 0.5, None]
    mixed = merge([placed("a", 0.1), placed("b", 0.2)])
    assert mixed.density is None and [point.density for point in mixed.points] == [None, None]


def test_merge_refuses_what_does_not_compare(report, make_metrics):
    with pytest.raises(ValueError, match="no report"):
        merge([])
    with pytest.raises(ValueError, match="different base"):
        merge([report, Report(title="other", base=make_metrics("other", 1, 0.5))])
    longer = report.base.model_copy(update={"protocol": Protocol(limit=5, versions={"torch": "1"})})
    with pytest.raises(ValueError, match=r"differently \(limit\)"):
        merge([report, Report(title="other", base=longer)])
