"""Results as JUnit XML, which every CI system shows: suites of test cases that passed or failed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from compress.eval.files import write_whole

_FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What XML 1.0 cannot hold, not even escaped."""


class Case(NamedTuple):
    """group, name: the class and the name of the test. told: what was found, in words."""

    group: str
    name: str
    told: str
    failed: bool = False


def write_junit(path: Path, suite: str, cases: Sequence[Case], properties: Mapping[str, object] | None = None) -> Path:
    """Write one suite. properties: further facts about it."""
    counts = {"tests": str(len(cases)), "failures": str(sum(case.failed for case in cases)), "errors": "0", "skipped": "0"}
    root = ElementTree.Element("testsuites", counts)
    element = ElementTree.SubElement(root, "testsuite", {"name": _text(suite), **counts, "time": "0"})
    facts = ElementTree.SubElement(element, "properties") if properties else None
    for name, value in (properties or {}).items():
        assert facts is not None
        ElementTree.SubElement(facts, "property", {"name": _text(name), "value": _text(value)})
    for case in cases:
        head = {"classname": _text(f"compress.{case.group}"), "name": _text(case.name), "time": "0"}
        test = ElementTree.SubElement(element, "testcase", head)
        if case.failed:
            failure = ElementTree.SubElement(test, "failure", {"type": _text(case.group), "message": _text(case.told)})
            failure.text = _text(case.told)
        else:
            ElementTree.SubElement(test, "system-out").text = _text(case.told)
    ElementTree.indent(root)
    return write_whole(path, ElementTree.tostring(root, encoding="utf-8", xml_declaration=True) + b"\n")


def _text(value: object) -> str:
    return _FORBIDDEN.sub("\ufffd", str(value))
