"""The README says what the code does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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
