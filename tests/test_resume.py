"""A run that is killed at any moment and started again ends with the bytes of an undisturbed one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from compress import Pipeline
from compress.errors import BadInput
from compress.recipe import Calibration
from compress.workspace import Workspace

CHAIN = ["wanda", "svd_llm:ratio=0.7", "logit_kd:steps=54,batch_size=2,length=16,learning_rate=0.001", "gptq"]
SHORT = ["svd_llm:ratio=0.7", "logit_kd:steps=2,correct=2,batch_size=2,length=16"]
COMPARED = ("model.safetensors", "config.json", "compress_manifest.json", "probe.safetensors", "modeling_compress.py")


@pytest.fixture(scope="module")
def killing(llama: Path, calibration: Calibration, tmp_path_factory) -> Callable[..., list[dict]]:
    """``killing(passes, jobs)`` -> what became of each job."""

    def start(passes: list[str], jobs: list[dict]) -> list[dict]:
        recipe = {"passes": passes, "calibration": calibration.model_dump(), "evaluation": None}
        order = tmp_path_factory.mktemp("order") / "order.json"
        order.write_text(json.dumps({"recipe": recipe, "model": str(llama), "jobs": jobs}))
        root = Path(__file__).parent.parent
        process = subprocess.run(
            [sys.executable, str(root / "tests" / "killing.py"), str(order)], capture_output=True, text=True, cwd=root,
            env=os.environ | {"PYTHONPATH": str(root)},
        )  # fmt: skip
        assert process.returncode == 0, process.stderr
        results = [json.loads(line) for line in process.stdout.splitlines() if line.startswith("{")]
        for result in results:
            assert result["code"] in (None, 0), process.stderr
        return results

    return start


def content(files: dict[str, list], directory: str) -> dict[str, str]:
    """Digests of the files under ``directory`` that a rerun must reproduce."""
    prefix = directory + "/"
    return {
        path.removeprefix(prefix): digest
        for path, (_, digest) in files.items()
        if path.startswith(prefix) and path.endswith(COMPARED)
    }


def test_killed_again_and_again(killing, tmp_path):
    """Ten kills of one run, the last of them while it cleans up, and it ends as if nothing had happened."""
    (tmp_path / "once").mkdir()
    (tmp_path / "often").mkdir()
    out = str(tmp_path / "often" / "out")
    kills = [
        {"message": "block 2 of 2"},
        {"event": "os.rename", "path": "assembling/model.safetensors"},
        {"event": "os.rename", "path": "stage-0/artifact"},
        {"message": "loss", "done": 52},  # the state is saved after 50 steps
        {"event": "os.rename", "path": "stage-1/blocks/block-00001.safetensors"},
        {"event": "shutil.rmtree", "path": "stage-1/blocks"},
        {"message": "block 2 of 2"},
        {"event": "subprocess.Popen"},
        {"event": "os.rename", "path": "often/out"},
    ]
    jobs = [{"out": str(tmp_path / "once" / "out")}, *({"out": out, **kill} for kill in kills)]
    jobs.append({"out": out, "event": "shutil.rmtree", "path": "out.partial/stage-0"})  # published, but not cleaned up
    jobs.append({"out": out, "overwrite": True})
    undisturbed, *killed, published, last = killing(CHAIN, jobs)
    expected = content(undisturbed["files"], "out")
    assert {"model.safetensors", "config.json", "compress_manifest.json"} <= expected.keys()
    assert not [path for path in undisturbed["files"] if path.startswith("out.partial")]
    for result in killed:
        assert result["killed"], f"never came to {result['job']}"
        assert not [path for path in result["files"] if path.startswith("out/")], f"half an OUT after {result['job']}"
    assert published["killed"] and content(published["files"], "out") == expected
    assert [path for path in published["files"] if path.startswith("out.partial")]
    assert not last["killed"] and content(last["files"], "out") == expected
    assert not [path for path in last["files"] if path.startswith("out.partial")]

    # What was finished was not done again.
    first, second, *_ = (result["files"] for result in killed)
    block = "out.partial/stage-0/blocks/block-00000.safetensors"
    assert first[block] == second[block]
    assert "out.partial/stage-0/blocks/block-00001.safetensors" not in first
    steps = [done for done, _, message, _ in killed[4]["progress"] if message.startswith("loss")]
    assert steps == [51, 52, 53, 54]
    messages = [entry[2] for entry in killed[4]["progress"]]
    assert "resumed" in messages and "block 1 of 2" not in messages
    model = "out.partial/stage-0/artifact/model.safetensors"
    assert len({tuple(result["files"][model]) for result in killed[3:]}) == 1
    finished = [entry[2] for result in killed[7:] for entry in result["progress"]]
    assert not [message for message in finished if message.startswith(("loss", "resumed"))]


def test_killed_at_every_renaming(killing, tmp_path):
    """Every file is written aside and renamed: kill before each renaming in turn, then run on."""
    before_verifying = {"message": "reloading"}
    (tmp_path / "whole").mkdir()
    jobs = [
        {"out": str(tmp_path / "whole" / "out"), **before_verifying},
        {"every": str(tmp_path), "event": "os.rename", **before_verifying, "then": before_verifying},
    ]
    undisturbed, *results = killing(SHORT, jobs)
    expected = {stage: content(undisturbed["files"], f"out.partial/stage-{stage}/artifact") for stage in range(2)}
    assert all("model.safetensors" in files for files in expected.values())
    reruns = [result for result in results if "event" not in result["job"]]
    assert len(reruns) > 15
    for result in reruns:
        for stage, files in expected.items():
            assert content(result["files"], f"out.partial/stage-{stage}/artifact") == files, result["job"]


class Interrupted(Exception):
    pass


def interrupt_at(message: str) -> Callable[[int, int, str], None]:
    def progress(done: int, total: int, said: str) -> None:
        if said.startswith(message):
            raise Interrupted

    return progress


def test_an_interrupted_run_belongs_to_its_settings(llama, calibration, tmp_path):
    """Another recipe, or other calibration text under the same name, does not go on from its blocks."""
    out, text = tmp_path / "out", tmp_path / "calibration.txt"
    text.write_text(Path(calibration.data).read_text())
    chosen = calibration.model_copy(update={"data": str(text)})

    def start(passes: list[str], **settings) -> None:
        pipeline = Pipeline(passes, calibration=chosen, evaluate=False)
        with pytest.raises(Interrupted):
            pipeline.run(llama, out, progress=interrupt_at("reloading"), **settings)

    with pytest.raises(Interrupted):
        Pipeline(["gptq"], calibration=chosen, evaluate=False).run(llama, out, progress=interrupt_at("block 2"))
    with pytest.raises(BadInput, match="other settings"):
        start(["gptq:bits=3"])
    text.write_text("something else. " + text.read_text()[5000:])
    with pytest.raises(BadInput, match="interrupted run"):
        start(["gptq"])
    start(["gptq"], overwrite=True)
    resumed = (tmp_path / "out.partial" / "stage-0" / "artifact" / "model.safetensors").read_bytes()
    out = tmp_path / "other"
    start(["gptq"])
    assert (tmp_path / "other.partial" / "stage-0" / "artifact" / "model.safetensors").read_bytes() == resumed


def test_what_a_half_removed_work_directory_holds_is_not_taken_over(llama, calibration, tmp_path):
    """Killed while it removed its work directory, of which the record went first; another run is given the place."""
    out = tmp_path / "out"

    def start(passes: list[str]) -> bytes:
        with pytest.raises(Interrupted):
            Pipeline(passes, calibration=calibration, evaluate=False).run(llama, out, progress=interrupt_at("reloading"))
        return (tmp_path / "out.partial" / "stage-0" / "artifact" / "config.json").read_bytes()

    first = start(["gptq"])
    (tmp_path / "out.partial" / "run.json").unlink()
    assert start(["wanda"]) != first


def test_replacing_again_what_was_replaced_before(tmp_path):
    """Killed while it removed the artifact that it had replaced, and started again."""
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    for directory in (out, partial / "replaced", partial / "artifact"):
        directory.mkdir(parents=True)
        (directory / "config.json").write_text(directory.name)
    (partial / "lock").touch()
    (partial / "run.json").write_text(json.dumps({"identity": "same"}))
    with Workspace(out, "same", overwrite=True) as workspace:
        workspace.publish(partial / "artifact", out)
    assert (out / "config.json").read_text() == "artifact" and not partial.exists()


def test_a_directory_of_somebody_else_is_left_alone(llama, calibration, tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").touch()
    with pytest.raises(BadInput, match="holds something else"):
        Pipeline(["wanda"], calibration=calibration, evaluate=False).run(llama, tmp_path / "out", overwrite=True)
    assert [file.name for file in (tmp_path / "out.partial").iterdir()] == ["thesis.txt"]


def test_two_runs_do_not_write_the_same_output(llama, calibration, tmp_path):
    out = tmp_path / "out"

    def second(done: int, total: int, message: str) -> None:
        if message.startswith("block 2"):
            with pytest.raises(BadInput, match="another process"):
                Pipeline(["wanda"], calibration=calibration, evaluate=False).run(llama, out)
            raise Interrupted

    with pytest.raises(Interrupted):
        Pipeline(["wanda"], calibration=calibration, evaluate=False).run(llama, out, progress=second)
