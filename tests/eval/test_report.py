"""The report is one valid page that shows every point and runs nothing that a label smuggles in."""

from __future__ import annotations

from html.parser import HTMLParser

from compress.eval.metrics import Report
from compress.eval.report import write_report

VOID = {"meta", "br", "link", "img"}


class Page(HTMLParser):
    """Collects text, scripts and addresses, and checks that tags nest."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data.strip())


def test_the_page_shows_everything_and_escapes_it(report, tmp_path):
    layers = [
        {"name": "model.layers.0.<b>q_proj</b>", "error": 0.01234567, "bits": 4},
        {"name": "model.layers.0.mlp.up_proj", "error": None, "rank": 8},
    ]
    path = write_report(report, tmp_path / "out", layers=layers)
    written = sorted(file.name for file in path.parent.iterdir())
    assert written == ["chart.png", "chart.svg", "metrics.json", "report.html"]
    assert Report.load(path.parent / "metrics.json") == report
    source = path.read_text(encoding="utf-8")
    page = Page()
    page.feed(source)
    assert page.open == []
    for point in (report.base, *report.points):
        assert point.label in page.texts
    for text in ("wanda:sparsity=0.5 → gptq:bits=4", report.command, "0.01235", "model.layers.0.<b>q_proj</b>", "rank"):
        assert text in page.texts
    assert report.title in page.texts
    assert source.count("<script") == 1
    assert "<b>q_proj" not in source


def test_the_page_asks_the_network_for_nothing(report, tmp_path):
    page = Page()
    page.feed(write_report(report, tmp_path).read_text(encoding="utf-8"))
    local = {"metrics.json", "chart.svg", "chart.png"}
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "action"):
            address = attributes.get(name)
            assert address is None or address in local or address.startswith("#"), (tag, name, address)


def test_a_report_without_points_or_tasks_is_still_a_page(report, tmp_path):
    base = report.base.model_copy(update={"tasks": {}})
    path = write_report(Report(title="alone", base=base), tmp_path)
    assert "To reproduce" not in path.read_text(encoding="utf-8")
