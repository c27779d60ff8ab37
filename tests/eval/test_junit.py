"""JUnit files that readers of JUnit files take."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from compress.eval.junit import Case, write_junit

CASES = [
    Case("gates", "max-kl", "KL 0.2 is above 0.1", failed=True),
    Case("tasks", "arc <easy> & \"co\"\x00\x1b[0m", "acc: 0.5 -> 0.4\nline"),
]  # fmt: skip


def test_one_suite_with_its_counts(tmp_path):
    path = write_junit(tmp_path / "new" / "junit.xml", "a > b", CASES, {"artifact": "out"})
    root = ElementTree.parse(path).getroot()
    (suite,) = root
    assert root.tag == "testsuites" and suite.get("name") == "a > b"
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("2", "1", "0")
    failed, passed = suite.findall("testcase")
    assert failed.find("failure").get("message") == CASES[0].told and failed.get("classname") == "compress.gates"
    assert passed.find("failure") is None and passed.findtext("system-out") == CASES[1].told
    assert passed.get("name") == 'arc <easy> & "co"\ufffd\ufffd[0m'
    assert suite.find("properties/property").attrib == {"name": "artifact", "value": "out"}


def test_a_junit_reader_takes_it(tmp_path):
    readers = pytest.importorskip("junitparser", reason="junitparser is not installed")
    (suite,) = readers.JUnitXml.fromfile(str(write_junit(tmp_path / "junit.xml", "suite", CASES)))
    assert [case.is_failure for case in suite] == [True, False] and suite.failures == 1


def test_nothing_to_say(tmp_path):
    root = ElementTree.parse(write_junit(tmp_path / "junit.xml", "suite", [])).getroot()
    assert root.get("tests") == "0" and len(root) == 1
