"""A base model is measured once, and again as soon as anything that its numbers depend on has changed."""

from __future__ import annotations

import logging
import os

from compress.eval import baselines
from compress.eval.baselines import baseline_directory, baseline_key, cached_baseline


def test_a_hit_measures_nothing(make_metrics):
    calls = []

    def measure():
        calls.append(1)
        return make_metrics("base", 100, 0.5)

    first = cached_baseline("key", measure)
    assert cached_baseline("key", measure) == first
    assert len(calls) == 1
    cached_baseline("another", measure)
    assert len(calls) == 2


def test_a_damaged_entry_is_measured_again(make_metrics, caplog):
    whole = make_metrics("base", 100, 0.5)
    cached_baseline("key", lambda: whole)
    entry = baseline_directory() / "key.json"
    entry.write_bytes(entry.read_bytes()[:50])
    with caplog.at_level(logging.WARNING):
        assert cached_baseline("key", lambda: whole) == whole
    assert "unreadable" in caplog.text
    assert cached_baseline("key", lambda: make_metrics("never", 1, 0.1)) == whole


def test_a_cache_that_cannot_be_written_costs_a_warning(make_metrics, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "file"))
    assert cached_baseline("key", lambda: make_metrics("base", 100, 0.5)).label == "base"
    assert "could not be kept" in caplog.text


def test_the_key_follows_everything_that_matters(tmp_path, monkeypatch):
    task = tmp_path / "task.yaml"
    task.write_text("task: a")
    key = baseline_key("digest", {"limit": 5, "tasks": ["a"]}, [tmp_path])
    assert key == baseline_key("digest", {"tasks": ["a"], "limit": 5}, [task])
    others = {baseline_key("other", {"limit": 5, "tasks": ["a"]}, [tmp_path])}
    others.add(baseline_key("digest", {"limit": 6, "tasks": ["a"]}, [tmp_path]))
    task.write_text("task: a, changed")
    others.add(baseline_key("digest", {"limit": 5, "tasks": ["a"]}, [tmp_path]))
    os.utime(task, ns=(1, 1))
    monkeypatch.setattr(baselines, "versions", lambda: {"torch": "0"})
    others.add(baseline_key("digest", {"limit": 5, "tasks": ["a"]}, [tmp_path]))
    assert len(others) == 4
    assert key not in others


def test_the_directory_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("COMPRESS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert baseline_directory() == tmp_path / "compress" / "baselines"
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "own"))
    assert baseline_directory() == tmp_path / "own" / "baselines"
