"""The published schema is current, and what is written keeps to it."""

from __future__ import annotations

import json
import math

import pytest

from compress.eval.metrics import SCHEMA_ID, Report
from compress.eval.schema import FILE, metrics_schema


def test_the_committed_copy_is_current():
    """`compress schema > eval/metrics.schema.json` brings it up to date."""
    assert json.loads(FILE.read_text()) == json.loads(metrics_schema())


def test_files_name_their_schema_and_keep_to_it(report, tmp_path, make_metrics):
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")
    schema = json.loads(metrics_schema())
    jsonschema.Draft202012Validator.check_schema(schema)
    report = report.add(make_metrics("broken", 10, 0.5, bits_per_byte=math.inf))
    written = json.loads(report.save(tmp_path / "metrics.json").read_text())
    assert written["$schema"] == schema["$id"] == SCHEMA_ID
    validator = jsonschema.Draft202012Validator(schema)
    assert [error.message for error in validator.iter_errors(written)] == []
    assert list(validator.iter_errors(written | {"unknown": 1}))
    written["points"][0]["cost"]["bytes_on_disk"] = "many"
    assert list(validator.iter_errors(written))


def test_files_from_before_the_schema_still_load(report, tmp_path):
    content = json.loads(report.dump())
    del content["$schema"]
    (tmp_path / "metrics.json").write_text(json.dumps(content))
    assert Report.load(tmp_path / "metrics.json") == report
