"""A model on the hub: of its plan config.json and the headers of its files alone, and of no model its weights twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from known_models import QWEN_25_05B

REPOSITORY, COMMIT = "someone/a-model", "0" * 40
WEIGHT_BYTES = 10 * 2**20


def safetensors() -> bytes:
    """Two tensors that together take all of WEIGHT_BYTES, of zeros."""
    half = WEIGHT_BYTES // 2
    header = {
        name: {"dtype": "BF16", "shape": [half // 2], "data_offsets": [number * half, (number + 1) * half]}
        for number, name in enumerate(("a.weight", "b.weight"))
    }
    encoded = json.dumps(header).encode()
    return len(encoded).to_bytes(8, "little") + encoded + bytes(WEIGHT_BYTES)


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as is asked for: files, also in part, and what a repository holds."""

    files = {
        "config.json": json.dumps(QWEN_25_05B).encode(),
        "model.safetensors": safetensors(),
        "consolidated.safetensors": safetensors(),
    }
    sent: dict[str, int] = {}

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, *arguments: Any) -> None:
        """Nothing on stderr."""

    def _answer(self, *, body: bool) -> None:
        path = self.path.split("?")[0]
        name = path.rpartition("/")[2]
        if path.startswith(f"/api/models/{REPOSITORY}/tree/"):
            tree = [{"type": "file", "path": name, "size": len(self.files[name]), "oid": "0"} for name in self.files]
            self._send(200, json.dumps(tree).encode(), body=body)
        elif path.startswith(f"/api/models/{REPOSITORY}"):
            siblings = [{"rfilename": name} for name in self.files]
            self._send(200, json.dumps({"id": REPOSITORY, "sha": COMMIT, "siblings": siblings}).encode(), body=body)
        elif not path.startswith(f"/{REPOSITORY}/resolve/") or name not in self.files:
            missing = "EntryNotFound" if REPOSITORY in path else "RepoNotFound"
            self._send(404, b"", body=body, headers={"X-Error-Code": missing})
        else:
            content, status = self.files[name], 200
            if "Range" in self.headers:
                first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
                content, status = content[int(first) : int(last) + 1], 206
            if body:
                self.sent[name] = self.sent.get(name, 0) + len(content)
            headers = {"ETag": f'"{name}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            self._send(status, content, body=body, headers=headers)

    def _send(self, status: int, content: bytes, *, body: bool, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def llmq(endpoint: str, home: Path, *arguments: str, offline: bool = False) -> subprocess.CompletedProcess[str]:
    # Without what other tests' libraries say of proxies and caches.
    variables = {
        name: value
        for name, value in os.environ.items()
        if not name.lower().endswith("_proxy") and not name.startswith(("HF_", "HUGGINGFACE_"))
    }
    variables |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": str(int(offline))}
    command = [sys.executable, "-m", "llmq", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=variables)


def test_a_model_on_the_hub_is_planned_by_its_headers(endpoint: str, tmp_path: Path) -> None:
    done = llmq(endpoint, tmp_path, "memplan", REPOSITORY, "--json")
    assert done.returncode == 0, done.stderr
    weights = json.loads(done.stdout)["weights"]
    assert (weights["on_disk"], weights["stored"]) == (WEIGHT_BYTES, True)
    assert Hub.sent["model.safetensors"] < WEIGHT_BYTES // 10


def test_offline_a_config_in_the_cache_will_do(endpoint: str, tmp_path: Path) -> None:
    llmq(endpoint, tmp_path, "memplan", REPOSITORY)
    done = llmq(endpoint, tmp_path, "memplan", REPOSITORY, "--json", offline=True)
    assert done.returncode == 0, done.stderr
    weights = json.loads(done.stdout)["weights"]
    assert (weights["on_disk"], weights["stored"]) == (2 * 494_032_768, False)


def test_a_model_that_is_not_on_the_hub_is_refused(endpoint: str, tmp_path: Path) -> None:
    done = llmq(endpoint, tmp_path, "memplan", "someone/else")
    assert done.returncode == 1
    assert "no such model on the hub" in done.stderr


def test_without_a_network_that_is_said_at_once(tmp_path: Path) -> None:
    nobody_listens = "http://127.0.0.1:9"
    done = llmq(nobody_listens, tmp_path, "memplan", REPOSITORY)
    assert done.returncode == 1
    assert [line.split(":")[0] for line in done.stderr.splitlines()] == ["error", "hint"]  # no talk of further tries


def test_offline_there_is_an_error_and_a_hint(endpoint: str, tmp_path: Path) -> None:
    done = llmq(endpoint, tmp_path, "memplan", REPOSITORY, offline=True)
    assert done.returncode == 1
    assert [line.split(":")[0] for line in done.stderr.splitlines()] == ["error", "hint"]
    assert "the hub cannot be reached" in done.stderr


def test_the_weights_are_fetched_once_though_they_are_there_by_two_names(endpoint: str, tmp_path: Path) -> None:
    Hub.sent.clear()
    llmq(endpoint, tmp_path, "inspect", REPOSITORY)
    assert Hub.sent["model.safetensors"] > WEIGHT_BYTES
    assert "consolidated.safetensors" not in Hub.sent
