"""One line a step of what the scheduler decided, for LLMQ_TRACE=file.jsonl; ``scripts/show_trace.py`` draws it."""

from __future__ import annotations

import json
import os
from collections.abc import Hashable
from dataclasses import asdict, dataclass
from pathlib import Path

from llmq.errors import LlmqError

TRACE = "LLMQ_TRACE"
"""The environment variable that names the file."""


@dataclass(frozen=True, slots=True)
class StepTrace:
    """rows         (sequence id, tokens computed, tokens in the cache afterwards, request id) of each row
    running …    requests in each queue
    blocks_free  after the step was planned, of ``blocks_total``; those the prefix cache knows are free
    admitted …   request ids
    swap_out …   blocks
    rejected     requests refused since the last step
    head, wait   the first in line, and why it was not let in: blocks, tokens, sequences (no seat), swapped (others come
                 back first), preempted (a step that preempts lets nobody in), delay, turn (decoding has its turn)
    """

    step: int
    rows: list[tuple[int, int, int, Hashable]]
    running: int
    waiting: int
    swapped: int
    blocks_free: int
    blocks_total: int
    admitted: list[Hashable]
    preempted: list[Hashable]
    resumed: list[Hashable]
    swap_out: int
    swap_in: int
    copies: int
    rejected: int
    head: Hashable
    wait: str


class TraceFile:
    """Appends a JSON line for each step."""

    def __init__(self, path: str) -> None:
        try:
            self._stream = Path(path).open("a", encoding="utf-8")  # noqa: SIM115 (open as long as the engine is)
        except OSError as error:
            raise LlmqError(f"{path} cannot be written: {error.strerror}", f"check {TRACE}") from None

    def __call__(self, step: StepTrace) -> None:
        self._stream.write(json.dumps(asdict(step), default=str) + "\n")
        self._stream.flush()


def open_trace() -> TraceFile | None:
    """The file that the environment asks for."""
    path = os.environ.get(TRACE)
    return TraceFile(path) if path else None
