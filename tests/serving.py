"""A server as a user starts it: a process of its own, on a free port."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

PATIENCE = 60.0


class Server:
    """``llmq serve``, running at ``url``. ``log`` is what it wrote to stderr so far."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []
        assert process.stdout is not None
        self.url = process.stdout.readline().strip()
        threading.Thread(target=self._read, daemon=True).start()
        if not self.url:
            process.wait(PATIENCE)
        self.http = httpx.Client(base_url=self.url, timeout=PATIENCE)

    @property
    def log(self) -> str:
        return "".join(self.lines)

    def metric(self, name: str, **labels: str) -> float:
        """The value of ``llmq:name`` in /metrics now."""
        for line in self.http.get("/metrics").text.splitlines():
            if line.startswith(f"llmq:{name}{{") and all(f'{key}="{value}"' in line for key, value in labels.items()):
                return float(line.rsplit(" ", 1)[1])
        raise AssertionError(f"no metric {name}")

    def engine_pid(self) -> int:
        """The process in which the engine runs: the only child that is llmq's."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return next(int(child) for child in children if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text())

    def end(self) -> int:
        """The exit code after SIGTERM."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE)

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)


@contextmanager
def served(model: object, *flags: object, **environment: str) -> Iterator[Server]:
    """``llmq serve model flags…`` until the block ends."""
    process = subprocess.Popen(
        [sys.executable, "-m", "llmq", "serve", str(model), "--port", "0", "--device", "cpu", *map(str, flags)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    try:
        yield Server(process)
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
