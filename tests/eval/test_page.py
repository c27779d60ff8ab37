"""The page in a real browser: it opens fast, asks the network for nothing, and its parts work by mouse and by key."""

from __future__ import annotations

import json
import re
import time
from typing import Literal

import pytest

from compress.eval.bit_runs import with_low_bits
from compress.eval.flips import FlipExample, Flips
from compress.eval.report import write_report
from compress.eval.uncertainty import Difference
from compress.passes import Taxon
from tests.eval.browser import Browser, executable
from tests.eval.test_low_bits import swept

pytestmark = [
    pytest.mark.skipif(executable() is None, reason="no Chromium on the path"),
    pytest.mark.xdist_group("browser"),
]
HOSTILE = '</script><script>document.title="owned"</script><img src=x onerror=\'document.title="owned"\'>'


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    running = Browser(tmp_path_factory.mktemp("profile"))
    yield running
    running.close()


def example(index: int, kind: Literal["negative", "positive"]) -> FlipExample:
    before, after = ("yes", HOSTILE) if kind == "negative" else (HOSTILE, "yes")
    return FlipExample(index=index, kind=kind, prompt=f"Is it {HOSTILE} {index}?", choices=("yes", HOSTILE), gold="yes",
                       before=before, after=after)  # fmt: skip


def layers(n_blocks: int) -> tuple[dict, ...]:
    names = [f"model.layers.{block}.{kind}" for block in range(n_blocks) for kind in ("self_attn.q_proj", "mlp.up_proj")]
    return tuple({"name": name, "output_error": 0.001 * (n + 1), "bits": 4, "passes": ["gptq"]} for n, name in enumerate(names))


def with_everything(metrics, n_blocks: int = 3, n_flips: int = 2):
    examples = [
        *(example(index, "negative") for index in range(n_flips)),
        *(example(index, "positive") for index in range(n_flips)),
    ]
    return metrics.model_copy(
        update={
            "layers": layers(n_blocks),
            "flips": {"choice": Flips(n=100, negative=3, positive=n_flips, p_value=0.5, examples=tuple(examples))},
            "differences": {"choice": Difference(mean=-0.02, low=-0.05, high=0.01, differs=False)},
            "command": f"compress run base '{metrics.passes[0]}' -o OUT",
        }
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Where the module's one page is written, by the first test that needs it."""
    return tmp_path_factory.mktemp("page") / "report.html"


@pytest.fixture
def page(report, browser, written):
    """The page of the hostile report, open in the browser; it must have said nothing and asked for nothing else."""
    report = report.model_copy(update={"points": tuple(map(with_everything, report.points)), "title": HOSTILE})
    path = written if written.exists() else write_report(report, written.parent)
    browser.look()
    browser.open(path)
    yield browser
    assert browser.complaints() == []
    assert browser.requests() == [path.as_uri()]
    assert browser.run("document.title") == HOSTILE


def test_every_model_has_a_point_a_row_and_a_name(page, report):
    labels = [point.label for point in (report.base, *report.points)]
    assert page.run("findAll('.point').length") == len(labels)
    assert sorted(page.run("findAll('#models tbody th').map(head => head.dataset.value)")) == sorted(labels)
    names = page.run("findAll('.point').map(point => point.getAttribute('aria-label'))")
    assert all(any(name.startswith(f"{label}, ") and "bytes on disk" in name for name in names) for label in labels)
    assert page.run("findAll('button, select, input').filter(node => !(node.textContent || node.labels?.length)).length") == 0


def test_points_and_rows_are_selected_together(page):
    page.run("find('.point[data-point=\"3\"]').dispatchEvent(new MouseEvent('click', { bubbles: true }))")
    assert page.run("find('#models tr.chosen').dataset.point") == "3"
    assert page.run("find('#selected').hidden") is False
    assert page.run("find('#layers-model').value + find('#flips-model').value") == "33"
    page.run("find('#model-1 .pick').click()")
    assert page.run("findAll('.point.chosen').map(point => point.dataset.point)") == ["1"]
    page.press("Escape", 27)
    assert page.run("findAll('.chosen').length") == 0


def test_the_chart_can_be_walked_by_keys(page):
    page.run("find('.point[tabindex=\"0\"]').focus()")
    page.press("ArrowRight", 39)
    focused = page.run("document.activeElement.dataset.point")
    assert page.run("findAll('.point[tabindex=\"0\"]').length") == 1
    assert page.run("tip.hidden") is False
    page.press("Enter", 13)
    assert page.run("find('.point.chosen').dataset.point") == focused


def test_series_hide_and_axes_change(page):
    n_points = page.run("findAll('.point').length")
    page.run("find('#legend [data-leaf=\"weight-only-quantization\"]').click()")
    assert page.run("findAll('.point.leaf-weight-only-quantization').length") == 0
    page.run("find('#legend [data-leaf=\"weight-only-quantization\"]').click()")
    n_axes = page.run("[axisX.options.length, axisY.options.length]")
    for x in range(n_axes[0]):
        for y in range(n_axes[1]):
            page.run(f"axisX.value = {x}, axisY.value = {y}, axisY.dispatchEvent(new Event('change'))")
            assert page.run("findAll('.point').length") <= n_points
            assert "NaN" not in page.run("plot.innerHTML")


def test_labels_keep_off_each_other_and_off_the_points(page):
    boxes = page.run(
        "findAll('.plot .label').map(node => node.getBBox())"
        ".map(box => [box.x, box.y + 2, box.x + box.width, box.y + box.height - 2])"
    )
    assert len(boxes) >= 5
    for number, (left, top, right, bottom) in enumerate(boxes):
        for other in boxes[:number]:
            assert min(right, other[2]) <= max(left, other[0]) or min(bottom, other[3]) <= max(top, other[1])


def test_the_table_sorts_and_filters(page):
    def column(number: int) -> list[str]:
        return page.run(f"[...find('#models tbody').rows].map(row => row.cells[{number}].dataset.value)")

    head = "findAll('#models .sort')[2]"
    assert page.run(f"{head}.textContent") == "On disk"
    for direction, reverse in (("descending", True), ("ascending", False)):
        page.run(f"{head}.focus()")
        page.press("Enter", 13)
        page.run(f"{head}.click()") if page.run(f"{head}.parentNode.getAttribute('aria-sort')") != direction else None
        sizes = list(map(float, column(2)))
        assert sizes == sorted(sizes, reverse=reverse)
    page.run("filter.value = 'gptq', filter.dispatchEvent(new Event('input'))")
    assert page.run("modelRows.filter(row => !row.hidden).length") == 2
    assert page.run("find('#n-shown').textContent") == "2 of 7"


def test_flips_and_layers_are_shown_as_text(page):
    assert page.run("findAll('.flip').length") == 4
    assert page.run("findAll('.flip img, .flip script').length") == 0
    page.run("flipKind.value = '1', flipKind.dispatchEvent(new Event('change'))")
    assert page.run("findAll('.flip .negative').length") == page.run("findAll('.flip').length") == 2
    assert page.run("findAll('.heat td').length") == 6
    assert page.run("find('.heat td').getAttribute('aria-label')").startswith("block 0, self_attn.q_proj")


def test_it_fits_narrow_screens_and_paper_opens_everything(page):
    page.look(width=360, height=700)
    page.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    assert page.run("document.documentElement.scrollWidth <= innerWidth")
    page.look(media="")
    assert page.pdf().startswith(b"%PDF")
    page.run("dispatchEvent(new Event('beforeprint'))")
    assert page.run("findAll('details:not([open])').length") == 0
    page.run("dispatchEvent(new Event('afterprint'))")
    assert page.run("findAll('details[open]').length") == 0


@pytest.mark.parametrize("dark", [False, True])
def test_text_and_signs_stand_out(page, dark):
    page.look(dark=dark)
    colors = page.run(
        "[getComputedStyle(document.body).backgroundColor,"
        " ...['body', '.muted', 'nav a', 'tbody small'].map(one => getComputedStyle(find(one)).color)]"
    )
    paper, *inks = [[int(part) for part in re.findall(r"\d+", color)[:3]] for color in colors]
    assert all(contrast(ink, paper) >= 4.5 for ink in inks)


def contrast(one: list[int], other: list[int]) -> float:
    """The ratio of relative luminances that WCAG defines."""

    def luminance(color: list[int]) -> float:
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in (c / 255 for c in color)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_the_laws_of_low_bits_are_drawn_and_walked(browser, tmp_path):
    low = with_low_bits(swept("rtn", "gptq"), 10**12)
    browser.look()
    browser.open(write_report(low, tmp_path))
    assert browser.run("findAll('#bits-plot .point').length") == len(low.points) == 8
    assert (
        browser.run("findAll('#bits-plot .curve-line').length") == 2
        and browser.run("findAll('#bits-plot .law-line').length") == 1
    )
    assert "NaN" not in browser.run("bitPlot.innerHTML")
    assert browser.run("findAll('#low-bits tbody tr').length") == 8
    assert browser.run("findAll('.findings li').map(item => item.textContent)") == low.low_bits.words()
    browser.run("find('#bits-plot .point[tabindex=\"0\"]').focus()")
    browser.press("ArrowLeft", 37)  # from the first there is nothing before
    browser.press("ArrowRight", 39)
    browser.press("Enter", 13)
    chosen = browser.run("findAll('.point.chosen').map(point => point.dataset.point)")
    assert len(chosen) == 2 and len(set(chosen)) == 1  # in both charts
    assert "Law of its recipe" in browser.run("tip.textContent")
    assert browser.run("find('#low-bits tr.chosen').dataset.point") == chosen[0]
    browser.look(width=360, height=700)
    browser.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")
    assert browser.complaints() == []


def test_a_page_without_laws_has_no_place_for_them(page):
    assert page.run("find('#low-bits')") is None and page.run("data.bits") is None


@pytest.mark.slow
def test_sixty_runs_open_fast_and_weigh_little(report, browser, make_metrics, tmp_path):
    taxa = [taxon.value for taxon in Taxon]
    for number in range(54):
        size = 20_000_000 + 1_300_000 * number
        passes = (f"method{number}:bits=4",)
        metrics = make_metrics(f"run {number}", size, 0.5 + 0.005 * number, taxon=taxa[number % len(taxa)], passes=passes)
        report = report.add(metrics)
    report = report.model_copy(update={"points": tuple(with_everything(one, 80, 12) for one in report.points)})
    path = write_report(report, tmp_path)
    assert path.stat().st_size < 3_000_000
    seconds = []
    for _ in range(3):  # the best of them: other processes may hold the cores
        started = time.perf_counter()
        browser.open(path)
        seconds.append(time.perf_counter() - started)
    print(json.dumps({"bytes": path.stat().st_size, "opened in seconds": seconds}))
    assert min(seconds) < 2
    assert browser.run("findAll('.point').length") == 61
