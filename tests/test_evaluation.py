"""A run with its evaluation, on the bundled model: files, numbers, cache, and the commands that read them again."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from compress import Calibration, Evaluation, Pipeline
from compress.cli import main
from compress.errors import GateMissed
from compress.eval.baselines import baseline_directory
from compress.gates import Gates
from compress.pipeline import Result, run

CALIBRATION = Calibration(samples=4, length=64)
EVALUATION = Evaluation(tasks=("demo_facts", "demo_text"), limit=6, batch_size=24, windows=3, length=64)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[Result]:
    directory = tmp_path_factory.mktemp("runs")
    found = []
    for number, passes in enumerate((["rtn:bits=8"], ["rtn:bits=2,group_size=64"])):
        pipeline = Pipeline(passes, calibration=CALIBRATION, evaluation=EVALUATION)
        found.append(pipeline.run("demo", directory / str(number)))
    return found


def test_measures_before_and_after(results: list[Result]) -> None:
    mild, harsh = (result.metrics for result in results)
    base = results[0].report.base
    assert base.tasks["demo_facts"].value > 0.9
    assert mild.fidelity.kl_mean < 0.01 < harsh.fidelity.kl_mean
    assert mild.tasks["demo_text"].value < harsh.tasks["demo_text"].value
    assert set(mild.tasks["demo_text"].metrics) >= {"word_perplexity", "byte_perplexity", "bits_per_byte"}
    assert mild.recovery["demo_facts"] == mild.tasks["demo_facts"].value / base.tasks["demo_facts"].value
    assert harsh.cost.bytes_on_disk < mild.cost.bytes_on_disk < base.cost.bytes_on_disk
    assert mild.cost.bytes_on_disk == results[0].bytes == (results[0].path / "model.safetensors").stat().st_size
    assert math.isclose(harsh.cost.compressed_bits_per_weight, 2.25, abs_tol=0.05)
    assert mild.cost.speed.decode_tokens_per_second > 0 and mild.cost.speed.peak_process_bytes > 0
    assert mild.model == results[0].path.name and mild.protocol.context_length == 64 and mild.protocol.limit == 6


def test_the_report_lies_beside_the_artifact(results: list[Result]) -> None:
    for result in results:
        assert result.report_path is not None
        page = result.report_path.read_text()
        assert result.metrics.label in page and "<svg" in page
        for name in ("metrics.json", "chart.svg", "chart.png", "recipe.yaml", "compress_manifest.json", "README.md"):
            assert (result.path / name).stat().st_size > 0
        assert result.metrics.label in (result.path / "README.md").read_text() or "rtn" in (result.path / "README.md").read_text()


def test_the_base_is_measured_once_per_protocol(results: list[Result]) -> None:
    assert results[0].report.base == results[1].report.base
    assert len(list(baseline_directory().glob("*.json"))) == len(list(baseline_directory().glob("*.npy"))) >= 1


def test_a_missed_gate_keeps_the_artifact_aside(results: list[Result], tmp_path: Path) -> None:
    recipe = {
        "model": "demo", "passes": ["rtn:bits=2,group_size=64"], "calibration": CALIBRATION, "evaluation": EVALUATION,
    }  # fmt: skip
    with pytest.raises(GateMissed, match="max-kl"):
        run(recipe, out=tmp_path / "out", gates=Gates(max_kl=0.001))
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.rejected" / "model.safetensors").exists()


def test_eval_and_chart_commands(
    results: list[Result], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def command(*words: str) -> str:
        monkeypatch.setattr("sys.argv", ["compress", *words])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert stopped.value.code == 0
        return capsys.readouterr().out

    command("chart", *(str(result.path) for result in results), "-o", str(tmp_path / "report"))
    charted = json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert [point["label"] for point in charted["points"]] == [result.metrics.label for result in results]
    shown = command("eval", str(results[0].path), "--tasks", "demo_facts", "--limit", "6", "--json")
    assert json.loads(shown)["points"][0]["tasks"]["demo_facts"]["primary"] in ("acc", "acc_norm")


@pytest.mark.slow
def test_the_tour_charts_chains_with_their_lineage(tmp_path: Path) -> None:
    from compress.demo.tour import tour
    from compress.progress import silent

    recipes = (("svd_llm:ratio=0.5",), ("svd_llm:ratio=0.5", "gptq:bits=4"))
    page = tour(tmp_path / "tour", silent, recipes)
    points = json.loads((page.parent / "metrics.json").read_text())["points"]
    assert points[1]["parent"] == points[0]["label"]
    assert points[1]["cost"]["bytes_on_disk"] < points[0]["cost"]["bytes_on_disk"]
