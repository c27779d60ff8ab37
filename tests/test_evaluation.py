"""A run with its evaluation, on a tiny model: files, numbers, cache, gates, and the commands that read them again."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest

from compress import Calibration, Evaluation, Recipe
from compress.amounts import parse_tokens
from compress.card import write_card
from compress.errors import GateMissed
from compress.eval.baselines import baseline_directory
from compress.eval.metrics import Report
from compress.evaluation import evaluate_artifact
from compress.gates import Gates
from compress.handover import Handover
from compress.manifest import Manifest
from compress.pipeline import Result, run
from compress.progress import silent

EVALUATION = Evaluation(tasks=("demo_facts", "demo_text"), limit=3, batch_size=24, windows=3, length=32, log_samples=True)


@pytest.fixture(scope="module")
def recipe(llama: Path, text_file: Path) -> Recipe:
    chosen = Calibration(data=str(text_file), samples=4, length=24)
    return Recipe.parse(
        {"model": str(llama), "passes": ["rtn:bits=2,group_size=64"], "calibration": chosen, "evaluation": EVALUATION}
    )


@pytest.fixture(scope="module")
def harsh(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """A run that misses one of its gates."""
    out = tmp_path_factory.mktemp("runs") / "out"
    with pytest.raises(GateMissed, match=r"--max-kl: KL to the base .* is above 0.001.*kept as .*out\.rejected") as raised:
        run(recipe, out=out, gates=Gates(max_kl=0.001, max_bytes=10**9))
    assert not out.exists()
    return raised.value.result


@pytest.fixture(scope="module")
def mild(llama: Path, run_stages: Callable[..., Path]) -> Path:
    """An artifact that nobody has measured."""
    return run_stages(llama, ["rtn:bits=8"])


@pytest.fixture(scope="module")
def measured(mild: Path, harsh: Result, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    """(directory, report) of measuring it, on the protocol of the run before."""
    out = tmp_path_factory.mktemp("measured")
    return out, evaluate_artifact(str(mild), None, EVALUATION, "cpu", "auto", out, silent)


def test_measures_before_and_after(harsh: Result, measured: tuple[Path, Report]) -> None:
    low, high, base = harsh.metrics, measured[1].points[0], harsh.report.base
    assert high.fidelity.kl_mean < 0.01 < low.fidelity.kl_mean
    assert high.tasks["demo_text"].value != low.tasks["demo_text"].value
    assert set(high.tasks["demo_text"].metrics) >= {"word_perplexity", "byte_perplexity", "bits_per_byte"}
    assert high.recovery["demo_text"] == base.tasks["demo_text"].value / high.tasks["demo_text"].value
    assert low.cost.bytes_on_disk < high.cost.bytes_on_disk < base.cost.bytes_on_disk
    assert low.cost.bytes_on_disk == harsh.bytes == (harsh.path / "model.safetensors").stat().st_size
    assert 2.25 < low.cost.compressed_bits_per_weight < 3  # with groups that end before they are full
    assert low.cost.speed.decode_tokens_per_second > 0 and low.cost.speed.peak_process_bytes > 0
    assert low.protocol.context_length == 32 and low.protocol.limit == 3
    assert low.flips["demo_facts"].n == 3 and len(low.outcomes["demo_text"]) == 3


def test_a_missed_gate_keeps_the_artifact_aside(harsh: Result) -> None:
    assert harsh.path.name == "out.rejected" and [each.held for each in harsh.checked] == [True, False]
    page = harsh.report_path.read_text()
    assert harsh.metrics.label in page and "<svg" in page
    for name in ("metrics.json", "chart.svg", "chart.png", "recipe.yaml", "compress_manifest.json", "README.md"):
        assert (harsh.path / name).stat().st_size > 0
    assert harsh.summary()["gates"]["max-kl"].endswith("above 0.001")
    assert len((harsh.path / "samples" / "compressed" / "demo_facts.jsonl").read_text().splitlines()) == 3


def test_the_base_is_measured_once_per_protocol(harsh: Result, measured: tuple[Path, Report], llama: Path) -> None:
    again = evaluate_artifact(str(llama), None, EVALUATION.model_copy(update={"log_samples": False}), "cpu", "auto", None, silent)
    assert again.base == measured[1].base
    assert len(list(baseline_directory().glob("*.json"))) == len(list(baseline_directory().glob("*.npy"))) >= 1


def test_the_card_is_one_that_the_hub_reads(harsh: Result, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard
    from huggingface_hub.repocard_data import model_index_to_eval_results

    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: [en]\ntags: [own]\n---\n# Base\n")
    manifest = harsh.manifest.model_copy(update={"base": "somebody/model-1B"})
    hostile = harsh.metrics.model_copy(update={"tasks": harsh.metrics.tasks | {
        "a: b#\n- c": harsh.metrics.tasks["demo_text"].model_copy(update={"metrics": {"bits_per_byte": math.inf}}),
        "gsm8k": harsh.metrics.tasks["demo_text"].model_copy(
            update={"metrics": {"exact_match,strict": 0.5}, "primary": "exact_match,strict"}
        ),
    }})  # fmt: skip
    base = harsh.report.base.model_copy(update={"tasks": hostile.tasks})
    write_card(tmp_path, manifest, tmp_path, hostile, harsh.report.model_copy(update={"base": base}))
    card = ModelCard.load(tmp_path / "README.md")  # refuses metadata that is malformed
    data = card.data
    assert (data.base_model, data.base_model_relation, data.license) == ("somebody/model-1B", "quantized", "apache-2.0")
    assert (data.library_name, data.pipeline_tag, data.language) == ("transformers", "text-generation", ["en"])
    assert data.tags == ["compress", "rtn"] and data.metrics == sorted({"exact_match", "acc_norm", "bits_per_byte"})
    name, results = model_index_to_eval_results(data.to_dict()["model-index"])
    assert name == "model-1B, compressed"
    assert {each.dataset_name: each.metric_value for each in results} == {
        task: harsh.metrics.tasks[task].value for task in ("demo_facts", "demo_text")
    } | {"gsm8k": 0.5}  # fmt: skip
    assert "from_pretrained" in card.text and "| gsm8k (exact_match,strict) |" in card.text


def test_a_card_of_a_local_model_names_no_base(harsh: Result) -> None:
    from huggingface_hub import ModelCard

    data = ModelCard.load(harsh.path / "README.md").data
    assert data.base_model is None and data.eval_results


def test_runs_are_tracked(
    harsh: Result, measured: tuple[Path, Report], mild: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real store: SQLite, and a directory of artifacts."""
    mlflow = pytest.importorskip("mlflow", reason="MLflow is not installed")
    pytest.importorskip("sqlalchemy", reason="MLflow's SQLite store needs SQLAlchemy")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/store.db")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "ours")
    handover = Handover(junit=tmp_path / "junit.xml", track="mlflow")
    (said,) = handover.made(recipe, harsh)
    (_,) = handover.measured(mild, EVALUATION, measured[1], [], measured[0])

    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("ours").experiment_id
    later, first = client.search_runs([experiment])
    assert said == f"MLflow run {first.info.run_id}"
    assert (first.info.status, later.info.status) == ("FAILED", "FINISHED")
    numbers, parameters, tags = first.data.metrics, first.data.params, first.data.tags
    assert numbers["cost.bytes_on_disk"] == harsh.bytes and numbers["fidelity.kl_mean"] == harsh.metrics.fidelity.kl_mean
    assert numbers["tasks.demo_text.bits_per_byte"] == harsh.metrics.tasks["demo_text"].value
    assert numbers["base.tasks.demo_text.bits_per_byte"] == harsh.report.base.tasks["demo_text"].value
    assert {"flips.demo_facts.negative", "differences.demo_text.low", "recovery.demo_text"} <= set(numbers)
    assert (parameters["passes"], parameters["rtn.bits"], parameters["calibration.samples"]) == (
        "rtn:bits=2,group_size=64",
        "2",
        "4",
    )
    assert (parameters["evaluation.limit"], later.data.params["evaluation.limit"]) == ("3", "3")
    assert tags["compress.parent_digest"] == tags["compress.base_digest"] == harsh.manifest.base_digest
    assert tags["compress.weights_digest"] == Manifest.read(harsh.path).weights_digest and "above" in tags["compress.gate.max-kl"]
    kept = {file.path for file in client.list_artifacts(first.info.run_id)}
    assert kept >= {"metrics.json", "report.html", "recipe.yaml", "README.md"} and "model.safetensors" not in kept
    assert {file.path for file in client.list_artifacts(later.info.run_id)} >= {"metrics.json", "report.html"}
    assert ElementTree.parse(tmp_path / "junit.xml").getroot().get("failures") == "0"  # of the later one


def test_chart_and_compare(cli, harsh: Result, measured: tuple[Path, Report], tmp_path: Path) -> None:
    assert cli("chart", harsh.path, measured[0], "-o", tmp_path / "report").code == 0
    charted = json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert [point["label"] for point in charted["points"]] == ["rtn:bits=2,group_size=64", "rtn:bits=8"]

    junit = tmp_path / "junit.xml"
    outcome = cli("compare", measured[0], harsh.path, "--json", "--junit", junit)
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    assert set(found["tasks"]) == {"demo_facts", "demo_text"} and found["tasks"]["demo_facts"]["flips"]["n"] == 3
    assert found["b"]["bytes_on_disk"] < found["a"]["bytes_on_disk"] and found["b"]["kl"] > found["a"]["kl"]
    assert [case.get("name") for case in ElementTree.parse(junit).iter("testcase")] == ["demo_facts", "demo_text"]
    itself = cli("compare", f"{tmp_path / 'report'}#rtn:bits=8", measured[0], "--not-worse")
    assert itself.code == 0 and itself.out.count("does not differ") == 2
    base = cli("compare", f"{harsh.path}#base", harsh.path)
    assert base.code == 0 and f"A: {harsh.report.base.label}" in base.out

    for words, said in (
        ((tmp_path / "report", harsh.path), "several models"),
        ((f"{tmp_path / 'report'}#rtn:bits=9", harsh.path), "did you mean 'rtn:bits=8'"),
        ((tmp_path / "none", harsh.path), "compress eval"),
    ):
        refused = cli("compare", *words)
        assert refused.code == 2 and said in refused.err, refused


def test_eval_has_gates(cli, mild: Path, tmp_path: Path) -> None:
    shown = (
        "eval",
        mild,
        "--tasks",
        "demo_facts",
        "--limit",
        2,
        "--max-bytes",
        "10KB",
        "--max-kl",
        1,
        "--junit",
        tmp_path / "junit.xml",
    )
    outcome = cli(*shown, "--json")
    assert outcome.code == 3 and "gate missed: --max-bytes:" in outcome.err and "more than 10,000" in outcome.err
    assert json.loads(outcome.out)["points"][0]["tasks"]["demo_facts"]["primary"] in ("acc", "acc_norm")
    cases = {case.get("name"): case.find("failure") for case in ElementTree.parse(tmp_path / "junit.xml").iter("testcase")}
    assert list(cases) == ["max-bytes", "max-kl", "demo_facts"] and cases["max-bytes"] is not None and cases["max-kl"] is None


def test_gates_that_cannot_be_checked_are_refused_at_once(cli, llama: Path, tmp_path: Path) -> None:
    without = cli("eval", llama, "--max-kl", 1)
    assert without.code == 2 and "--max-kl need" in without.err and "--base" in without.err
    unknown = cli("eval", llama, "--track", "mlfow")
    assert unknown.code == 2 and "--track mlfow" in unknown.err
    assert cli("eval", llama, "--min-recovery", 97).code == 2
    assert cli("eval", llama, "--junit", tmp_path).code == 2


@pytest.mark.slow
def test_the_tour_charts_chains_with_their_lineage(tmp_path: Path) -> None:
    from compress.demo.tour import tour

    recipes = (("svd_llm:ratio=0.5",), ("svd_llm:ratio=0.5", "gptq:bits=4"))
    page = tour(tmp_path / "tour", silent, recipes)
    found = json.loads((page.parent / "metrics.json").read_text())
    points = found["points"]
    assert found["base"]["tasks"]["demo_facts"]["metrics"]["acc"] > 0.9
    assert points[1]["parent"] == points[0]["label"]
    assert points[1]["cost"]["bytes_on_disk"] < points[0]["cost"]["bytes_on_disk"]


def test_bad_requests_are_refused_before_compute(
    cli, llama: Path, mild: Path, harsh: Result, tmp_path: Path, make_checkpoint
) -> None:
    file = tmp_path / "file"
    file.write_text("")
    other = make_checkpoint("llama", vocab_size=400)
    for words, said in (
        (("eval", mild, "--out", file), "cannot be a directory"),
        (("eval", mild, "--out", file / "inner"), "cannot be a directory"),
        (("chart", harsh.path, "--out", file), "cannot be a directory"),
        (("eval", mild, "--log-samples"), "say where, with --out"),
        (("eval", mild, "--tasks", " , "), "names no task"),
        (("eval", mild, "--data", tmp_path / "none"), "--data: no such directory"),
        (("eval", mild, "--batch-size", "0"), "batch_size: is a number of at least 1, or auto"),
        (("eval", mild, "--reference", harsh.path, "--limit", "3"), "at least 3 sizes, got 1"),
        (("eval", mild, *(3 * ("--reference", harsh.path))), "at least 3 sizes, got 3"),
        (("eval", mild, "--base", other), "vocabularies of"),
        (("eval", mild, "--training-tokens", "many"), "'many' is no number of tokens; write 15T"),
        (("chart", harsh.path, "--training-tokens", "0"), "--training-tokens: '0' is no number of tokens"),
    ):
        refused = cli(*words)
        assert refused.code == 2 and said in refused.err, refused
        assert "Traceback" not in refused.err and not refused.out


@pytest.mark.slow
def test_a_mistyped_bundled_task_is_known_again(cli, mild: Path) -> None:
    """Slow, as all of lm-eval's tasks are looked through first."""
    refused = cli("eval", mild, "--tasks", "demo_fact")
    assert refused.code == 2 and "did you mean demo_facts" in refused.err


def test_names_do_not_steer_the_terminal(cli, harsh: Result, tmp_path: Path) -> None:
    content = json.loads((harsh.path / "metrics.json").read_text())
    content["points"][0]["label"] = "red \x1b[31m \ud83d\ude00 \x07"
    (tmp_path / "metrics.json").write_text(json.dumps(content))
    shown = cli("compare", tmp_path, harsh.path)
    assert shown.code == 0 and "A: red \ufffd[31m \U0001f600 \ufffd\n" in shown.out
    refused = cli("compare", f"{tmp_path}#\x1b[31m", harsh.path)
    assert refused.code == 2 and "\x1b" not in refused.err


def test_a_base_that_is_gone_or_changed_is_told(mild: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    once = Evaluation(tasks=("demo_facts",), limit=1, windows=1, length=32)
    for name, change, said in (
        ("gone", {"base": str(tmp_path / "none")}, "nothing to compare with"),
        ("changed", {"base_digest": "other"}, "has changed since"),
    ):
        artifact = tmp_path / name
        shutil.copytree(mild, artifact)
        manifest = json.loads((artifact / "compress_manifest.json").read_text()) | change
        (artifact / "compress_manifest.json").write_text(json.dumps(manifest))
        caplog.clear()
        report = evaluate_artifact(str(artifact), None, once, "cpu", "auto", None, silent)
        assert said in caplog.text
        assert len(report.points) == (name == "changed")


def test_training_tokens_are_remembered_and_must_agree(cli, harsh: Result, measured: tuple[Path, Report], tmp_path: Path) -> None:
    assert parse_tokens("15T") == parse_tokens("1.5e13") == parse_tokens("15_000 b") == 15 * 10**12
    assert Evaluation(training_tokens="300B").training_tokens == 300 * 10**9
    assert cli("chart", harsh.path, measured[0], "-o", tmp_path / "one", "--training-tokens", "2T").code == 0
    assert cli("chart", harsh.path, "-o", tmp_path / "two", "--training-tokens", "3T").code == 0
    first = Report.load(tmp_path / "one" / "metrics.json").low_bits
    assert first is not None and first.training_tokens == 2 * 10**12 and first.published is not None
    assert {run.recipe for run in first.runs} == {"rtn"} and "it takes 3 widths" in first.without["rtn"]
    page = (tmp_path / "one" / "report.html").read_text()
    assert 'id="low-bits"' in page and "2T tokens" in page and 'id="low-bits"' not in harsh.report_path.read_text()
    assert cli("chart", tmp_path / "one", harsh.path, "-o", tmp_path / "again").code == 0
    assert Report.load(tmp_path / "again" / "metrics.json").low_bits == first
    disagreeing = cli("chart", tmp_path / "one", tmp_path / "two", "-o", tmp_path / "both")
    assert disagreeing.code == 2 and "different numbers of training tokens" in disagreeing.err
    settled = cli("chart", tmp_path / "one", tmp_path / "two", "-o", tmp_path / "both", "--training-tokens", "2e12")
    assert settled.code == 0, settled.err
