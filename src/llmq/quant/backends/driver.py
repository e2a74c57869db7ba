"""Start a backend's worker, listen to it, and end it, whatever becomes of either side.

llmq ──request──▶ worker ──stdout, stderr──▶ a log file, whose last lines say why when it dies
     ◀──events───
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmq.errors import LlmqError
from llmq.quant.backends import Backend

WORKER = Path(__file__).with_name("worker.py")
SILENCE_SECONDS = 900.0
"""A worker that neither tells anything nor prints anything for so long is taken to hang."""
GRACE_SECONDS = 5.0
"""Between asking a worker to end and ending it."""
POLL_SECONDS = 1.0
LAST_LINES = 6


def run_worker(
    backend: Backend,
    python: Path,
    request: dict[str, Any],
    log: Path,
    on_stage: Callable[[str], None],
    *,
    worker: Path = WORKER,
    silence: float = SILENCE_SECONDS,
) -> None:
    """Have ``backend``, in the environment of ``python``, carry out ``request`` (see ``worker``). ``on_stage`` is
    called with what it is at.

    Raises LlmqError, with its last lines, when it dies, hangs, or says on its pipe what nobody can read. Whatever ends
    this call, the worker and the processes that it has started end with it.
    """
    request_out, request_in = os.pipe()
    events_out, events_in = os.pipe()
    # Nothing that llmq's own environment is made of may be found from there.
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(python), str(worker), str(request_out), str(events_in)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=(request_out, events_in),
            cwd=log.parent,  # where some of them write logs of their own
            start_new_session=True,
            env=clean | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        )
    os.close(request_out)
    os.close(events_in)
    try:
        with os.fdopen(request_in, "w", encoding="utf-8") as requests:
            requests.write(json.dumps(request) + "\n")
    except BrokenPipeError:
        pass  # it died before it read; its exit says so below
    try:
        with os.fdopen(events_out, "rb", buffering=0) as events:
            done = _listen(backend, events.fileno(), log, on_stage, silence)
        code = process.wait(GRACE_SECONDS) if done else process.wait()
    except subprocess.TimeoutExpired:
        code = 0  # all is written; what it still does is not waited for
    finally:
        _end(process)
    if code or not done:
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        raise LlmqError(f"{backend.name} ended with {how}: {_last_lines(log)}", _hint(log))


def _listen(backend: Backend, events: int, log: Path, on_stage: Callable[[str], None], silence: float) -> bool:
    """Read events until the worker is done (True) or its pipe is closed (False)."""
    buffer, heard, size, done = b"", time.monotonic(), 0, False
    with selectors.DefaultSelector() as selector:
        selector.register(events, selectors.EVENT_READ)
        while True:
            ready = selector.select(min(POLL_SECONDS, silence))
            printed = log.stat().st_size
            if ready or printed != size:
                heard, size = time.monotonic(), printed
            elif time.monotonic() - heard > silence:
                raise LlmqError(
                    f"{backend.name} has said nothing for {silence:.0f} s, and was ended: {_last_lines(log)}",
                    "try again with fewer --calib-samples, or --backend native",
                )
            if not ready:
                continue
            part = os.read(events, 65536)
            if not part:
                return done
            *lines, buffer = (buffer + part).split(b"\n")
            for line in lines:
                event = _event(backend, line)
                if "stage" in event:
                    on_stage(str(event["stage"]))
                done = done or bool(event.get("done"))


def _event(backend: Backend, line: bytes) -> dict[str, Any]:
    try:
        event = json.loads(line)
    except ValueError:
        event = None
    if not isinstance(event, dict):
        raise LlmqError(
            f"{backend.name} said {line[:80].decode(errors='replace')!r} where an event was expected",
            f"its environment may be damaged: llmq backends install {backend.name}",
        )
    return event


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the worker and all that it has started: the process group is its own."""
    for kind, patience in ((signal.SIGTERM, GRACE_SECONDS), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, kind)
        except ProcessLookupError:
            break
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def _last_lines(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    return " | ".join([line for line in lines if line][-LAST_LINES:]) or "it printed nothing"


def _hint(log: Path) -> str:
    if "No space left on device" in log.read_text(encoding="utf-8", errors="replace"):
        return "free some space on the disk of --output and of $TMPDIR"
    return "--backend native needs none of this"
