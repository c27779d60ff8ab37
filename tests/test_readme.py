"""The README says what the code does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from compress import methods
from compress.verify import PROBE

README = Path(__file__).parent.parent / "README.md"


def test_method_table_is_generated():
    """`compress methods --markdown` prints what belongs between the markers."""
    _, _, rest = README.read_text(encoding="utf-8").partition("<!-- methods -->\n")
    table, end, _ = rest.partition("\n<!-- /methods -->")
    assert end
    assert table == methods.markdown()


def test_every_row_of_the_table_has_all_columns():
    lines = methods.markdown().splitlines()
    n_columns = lines[0].replace(r"\|", "").count("|")
    assert all(line.replace(r"\|", "").count("|") == n_columns for line in lines)


def test_import_compress_first(llama: Path, run_stages):
    """A new process opens a low-rank artifact without remote code, in the order of imports that the README shows."""
    artifact = run_stages(llama, ["svd:ratio=0.5"])
    code = f"""
import compress
from transformers import AutoModelForCausalLM
from safetensors.torch import load_file
model, probe = AutoModelForCausalLM.from_pretrained({str(artifact)!r}), load_file({str(artifact / PROBE)!r})
print(float((model(probe["tokens"]).logits - probe["logits"]).abs().max()))
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=README.parent, timeout=250)
    assert process.returncode == 0, process.stderr
    assert float(process.stdout) < 1e-4


def block(language: str, first_line: str) -> str:
    """The README's code block that begins with that comment."""
    _, found, rest = README.read_text(encoding="utf-8").partition(f"```{language}\n{first_line}\n")
    assert found, first_line
    return rest.partition("```")[0]


@pytest.mark.slow
def test_the_pipeline_example_runs(tmp_path: Path):
    """One candidate holds all gates and is taken into use, the other one is kept aside; CI gets both."""
    (tmp_path / "pipeline.py").write_text(block("python", "# pipeline.py"))
    environment = os.environ | {"PYTHONPATH": str(README.parent)}
    process = subprocess.run(
        [sys.executable, "pipeline.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280
    )
    assert process.returncode == 0, process.stderr
    assert "w2: --min-recovery" in process.stdout
    assert {entry.name for entry in (tmp_path / "candidates").iterdir()} == {"w4", "w2.rejected", "w4.xml", "w2.xml"}
    assert (tmp_path / "current" / "model.safetensors").is_file()


@pytest.mark.slow
def test_the_workflow_is_one(tmp_path: Path):
    steps = yaml.safe_load(block("yaml", "# .github/workflows/compress.yml"))["jobs"]["compress"]["steps"]
    assert any("pipeline.py" in step.get("run", "") for step in steps)
    assert any("candidates/*.xml" in str(step.get("with")) for step in steps)
