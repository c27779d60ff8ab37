"""The report is one valid page that shows every point and runs nothing that a label smuggles in."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from html.parser import HTMLParser
from typing import Literal

from hypothesis import given
from hypothesis import strategies as st

from compress import methods
from compress.eval import table
from compress.eval.flips import FlipExample, Flips
from compress.eval.metrics import Report
from compress.eval.payload import FLIPS_BUDGET, embedded, flip_examples, layer_grid
from compress.eval.report import write_report
from compress.eval.tree import method_tree
from compress.eval.uncertainty import Difference
from compress.passes import Taxon

VOID = {"meta", "br", "link", "img", "input", "wbr"}


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
        if self.texts and self.tags[-1][0] == "wbr":  # a place to break within a text
            self.texts[-1] += data.strip()
        else:
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
    assert source.count("<script") == 2  # the data and the script
    assert "<b>q_proj" not in source


def test_the_page_asks_the_network_for_nothing_and_runs_only_its_own(report, tmp_path):
    source = write_report(report, tmp_path).read_text(encoding="utf-8")
    page = Page()
    page.feed(source)
    local = {"metrics.json", "chart.svg", "chart.png"}
    for tag, attributes in page.tags:
        assert "style" not in attributes and not any(name.startswith("on") for name in attributes), (tag, attributes)
        for name in ("src", "href", "xlink:href", "action"):
            address = attributes.get(name)
            assert address is None or address in local or address.startswith(("#", "data:image/png")), (tag, name, address)
    (policy,) = [attributes["content"] or "" for _, attributes in page.tags if "http-equiv" in attributes]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    for element in ("style", "script"):
        written = re.search(f"<{element}>(.*?)</{element}>", source, re.DOTALL)
        assert written is not None
        digest = base64.b64encode(hashlib.sha256(written[1].encode()).digest()).decode()
        assert f"{element}-src 'sha256-{digest}'" in policy


def test_a_report_without_points_or_tasks_is_still_a_page(report, tmp_path):
    base = report.base.model_copy(update={"tasks": {}})
    path = write_report(Report(title="alone", base=base), tmp_path)
    assert 'id="layers"' not in path.read_text(encoding="utf-8")


@given(st.text(alphabet="</script!->&\u2028'\"\\ é", max_size=30))
def test_embedded_data_cannot_leave_its_element(text):
    written = embedded({text: [text, math.inf, math.nan, 0.1234567891]})
    assert not set("<>&\u2028\u2029") & set(written)
    assert json.loads(written) == {text: [text, None, None, 0.123457]}


def test_layers_become_a_grid_with_experts_pooled():
    rows = [
        {"name": "model.layers.1.mlp.experts.0.up", "error": 0.1, "bits": 4, "kind": "quantized"},
        {"name": "model.layers.1.mlp.experts.1.up", "error": 0.3, "bits": 4, "kind": "dense"},
        {"name": "model.layers.0.attn.q", "error": 0.5, "bits": 4, "kind": "quantized"},
        {"name": "lm_head", "error": None, "bits": 4, "kind": "dense"},
    ]
    grid = layer_grid(rows)
    assert grid["blocks"] == ["0", "1", ""]
    assert grid["kinds"] == ["mlp.experts.*.up", "attn.q", "lm_head"]
    assert grid["n"] == [0, 2, 0, 1, 0, 0, 0, 0, 1]
    assert grid["fields"]["error"] == [None, 0.2, None, 0.5, None, None, None, None, None]
    assert grid["fields"]["kind"][1] == "several"


def test_examples_of_flips_fit_their_budget(make_metrics):
    def example(index: int, kind: Literal["negative", "positive"]) -> FlipExample:
        return FlipExample(index=index, kind=kind, prompt="é" * 600, gold="a", before="a", after="b")

    models = []
    for run in range(200):
        places = range(100 * run, 100 * run + 12)
        examples = (*(example(place, "negative") for place in places), *(example(place, "positive") for place in places))
        flips = Flips(n=9999, negative=20, positive=20, p_value=1.0, examples=examples)
        models.append(make_metrics(f"run {run}", 100, 0.5).model_copy(update={"flips": {"choice": flips}}))
    found = flip_examples(models)
    assert len(json.dumps(found, ensure_ascii=False)) <= FLIPS_BUDGET
    assert 1 <= found["n_examples"] < 12
    assert all(len(found["flips"][run]["choice"][4]) == 2 * found["n_examples"] for run in range(200))


def test_every_method_has_its_place_in_the_tree(report):
    leaves = {}

    def walk(branch, path):
        leaves[" / ".join(path)] = branch
        for child in branch.branches:
            walk(child, (*path, child.name))

    walk(method_tree(report), ())
    assert {taxon.value for taxon in Taxon} <= set(leaves)
    for key, method in methods.available().items():
        assert key in [one.key for one in leaves[method.taxon.value].methods]
    gptq = next(one for one in leaves[Taxon.WEIGHT_ONLY.value].used if one.key == "gptq")
    assert (gptq.best.label, gptq.n_points) == ("gptq", 2)
    assert [one.key for one in leaves["somebody / else"].used] == ["new"]


def test_columns_are_those_with_values(report):
    models = [report.base, *report.points]
    found = table.kept(table.quality, models, report)
    heads = [head for head, _ in found.columns]
    assert "Kept" in heads and "KL" not in heads and "Flips" not in heads
    difference = Difference(mean=-0.01, low=-0.03, high=0.01, differs=False)
    unsure = report.points[0].model_copy(update={"differences": {"choice": difference}})
    cell = table.kept(table.quality, [unsure], report).rows[0][heads.index("choice")]
    assert cell.same and "does not differ" in cell.hint
