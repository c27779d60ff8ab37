"""Uploads: refused before any compute where they cannot work, and carried out against a local server that speaks the hub's
protocol."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from compress.errors import BadInput, CompressError
from compress.hub import Destination

TOKEN = "hf_local"


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client may use the network; there is nobody but the local server to talk to."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)


@pytest.fixture
def hub() -> Iterator[ThreadingHTTPServer]:
    """A hub of one user; ``files`` has what was committed, ``asked`` the paths that were called."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._reply()

        def do_POST(self) -> None:
            self._reply()

        def _reply(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = self.path.partition("?")[0]
            server.asked.append(path)
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return self._send({"error": "Invalid credentials"}, 401)
            if path == "/api/whoami-v2":
                return self._send({"name": "me", "type": "user"})
            if path == "/api/repos/create":
                server.created = json.loads(body)
                return self._send({"url": f"{server.url}/me/small", "id": "me/small", "name": "me/small"})
            if path.endswith("/preupload/main"):
                files = [
                    {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]
                ]
                return self._send({"files": files})
            if path.endswith("/commit/main"):
                for line in body.splitlines():
                    entry = json.loads(line)
                    if entry["key"] == "file":
                        server.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                return self._send({"commitUrl": f"{server.url}/me/small/commit/1", "commitOid": "1", "success": True})
            return self._send({"error": f"no such path: {path}"}, 404)

        def _send(self, content: dict, status: int = 200) -> None:
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url, server.files, server.asked, server.created = f"http://127.0.0.1:{server.server_port}", {}, [], None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_an_artifact_is_uploaded_to_a_new_private_repository(hub, online, tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "samples" / "base").mkdir(parents=True)
    (tmp_path / "samples" / "base" / "task.jsonl").write_text("{}")
    address = Destination("me/small", hub.url).push(tmp_path)
    assert address.endswith("/me/small")
    assert hub.files == {"config.json": b"{}", "model.safetensors": b"weights"}
    assert (
        hub.created["name"] == "small"
        and hub.created.get("visibility", "private" if hub.created.get("private") else "") == "private"
    )


def test_a_failed_upload_says_that_the_artifact_is_complete(hub, online, tmp_path: Path):
    destination = Destination("me/small", hub.url)
    hub.shutdown()
    hub.server_close()
    with pytest.raises(CompressError, match="is complete, but was not uploaded"):
        destination.push(tmp_path)


def test_a_wrong_token_is_refused_at_once(hub, online, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(BadInput, match="does not let this token in"):
        Destination("me/small", hub.url)


@pytest.mark.parametrize("name", ["a/b/c", "-dash", "two..dots", "sp ace/x", ""])
def test_names_that_no_repository_has(online, name: str):
    with pytest.raises(BadInput, match="no name of a repository"):
        Destination(name)


def test_nothing_is_computed_without_a_token(cli, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    words = ["run", llama, "rtn", "-o", tmp_path / "out", "--no-eval", "--quiet", "--push-to", "me/small"]
    offline = cli(*words)
    assert offline.code == 2 and "HF_HUB_OFFLINE" in offline.err
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    without = cli(*words)
    assert without.code == 2 and "hf auth login" in without.err and "HF_TOKEN" in without.err
    assert list(tmp_path.iterdir()) == []
