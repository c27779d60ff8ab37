"""The chart: deterministic, complete, and with labels that can be read."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.eval.chart import chart, format_bytes, size_ticks
from compress.eval.labels import Box, place_labels
from compress.eval.metrics import Report
from compress.eval.taxonomy import OTHER, STYLES, style_of
from compress.passes import Taxon


def test_the_same_report_gives_the_same_bytes(report, tmp_path):
    svg, png = chart(report, tmp_path / "a")
    again = chart(report, tmp_path / "b")
    assert [path.name for path in (svg, png)] == ["a.svg", "a.png"]
    assert svg.read_bytes() == again[0].read_bytes()
    assert png.read_bytes() == again[1].read_bytes()
    assert len(png.read_bytes()) > 20_000
    text = svg.read_text()
    assert not re.search(r"<dc:date>|\d\d:\d\d:\d\d", text)
    assert "<script" not in text
    for style in (STYLES[Taxon.WEIGHT_ONLY.value], STYLES[Taxon.LOW_RANK.value], OTHER):
        assert style.color.lower() in text


@pytest.mark.parametrize("with_tasks", [True, False])
def test_a_base_alone_can_be_charted(report, with_tasks, tmp_path):
    base = report.base if with_tasks else report.base.model_copy(update={"tasks": {}})
    svg, _ = chart(Report(title="alone", base=base), tmp_path / "alone")
    assert svg.stat().st_size > 5000


def test_every_leaf_has_a_look_of_its_own():
    assert set(STYLES) == {taxon.value for taxon in Taxon}
    assert len({style.color for style in STYLES.values()}) == len(Taxon)
    assert len({style.name for style in STYLES.values()}) == len(Taxon)
    assert style_of("somebody / else") == OTHER


@given(st.floats(1e3, 1e12), st.floats(1.5, 1e4))
def test_ticks_are_few_and_inside(smallest, ratio):
    ticks = size_ticks(smallest, smallest * ratio)
    assert 1 <= len(ticks) <= 10
    assert all(smallest <= tick <= smallest * ratio for tick in ticks)
    assert len({format_bytes(tick) for tick in ticks}) == len(ticks)


@pytest.mark.parametrize(
    ("n_bytes", "text"), [(999, "999 B"), (1500, "1.5 kB"), (999_900, "1 MB"), (2.47e9, "2.47 GB"), (3e12, "3 TB")]
)
def test_bytes_are_written_in_decimal_units(n_bytes, text):
    assert format_bytes(n_bytes) == text


def test_labels_find_room_beside_each_other():
    bounds = Box(0, 0, 400, 300)
    anchors = [(200.0 + 9 * column, 150.0 + 9 * row) for column in range(3) for row in range(3)]
    boxes = place_labels(anchors, [(40, 10)] * 9, bounds, [], gap=8)
    assert boxes == place_labels(anchors, [(40, 10)] * 9, bounds, [], gap=8)
    assert all(box.outside(bounds) == 0 for box in boxes)
    assert sum(box.overlap(other) for i, box in enumerate(boxes) for other in boxes[:i]) == 0


def test_a_label_keeps_off_obstacles_and_edges():
    (box,) = place_labels([(390, 150)], [(60, 10)], Box(0, 0, 400, 300), [Box(300, 140, 385, 160)], gap=8)
    assert box.outside(Box(0, 0, 400, 300)) == 0
    assert box.overlap(Box(300, 140, 385, 160)) == 0
