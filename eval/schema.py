"""The published schema of ``metrics.json``: what `compress schema` prints, and ``metrics.schema.json`` beside this file holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue

from compress.eval.metrics import SCHEMA_ID, Report

FILE = Path(__file__).with_name("metrics.schema.json")


class _Generator(GenerateJsonSchema):
    """Numbers that JSON cannot write are the strings that pydantic writes for them."""

    def float_schema(self, schema: Any) -> JsonSchemaValue:
        return {"anyOf": [super().float_schema(schema), {"enum": ["NaN", "Infinity", "-Infinity"]}]}


def metrics_schema() -> str:
    """JSON Schema (2020-12) of a :class:`compress.eval.metrics.Report`, as text."""
    found = Report.model_json_schema(mode="serialization", schema_generator=_Generator)
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": SCHEMA_ID}
    return json.dumps(head | found, indent=2) + "\n"
