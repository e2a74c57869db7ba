"""Offline throughput: all requests are there at the start, and the engine in this process runs them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmq.bench.comparison import ROUNDS, Comparison
from llmq.bench.engine import Run, Setup, Subject
from llmq.bench.load import Progress
from llmq.bench.memory import Line
from llmq.bench.metrics import Goodput
from llmq.bench.peers import check_peer, compare, open_peer
from llmq.bench.workload import Workload, warm_up
from llmq.engine.options import EngineOptions


@dataclass(frozen=True, slots=True)
class ThroughputReport:
    """``peer``: where another engine ran the same."""

    setup: Setup
    workload: Workload
    run: Run
    memory: tuple[Line, ...]
    peer: Comparison | None

    def as_json(self) -> dict[str, Any]:
        return {
            **self.setup.as_json(),
            **self.workload.as_json(),
            **self.run.as_json(),
            "memory": {line.name: {"predicted": line.predicted, "measured": line.measured} for line in self.memory},
            "peer": None if self.peer is None else self.peer.as_json(),
        }


def bench_throughput(
    model: str,
    workload: Workload,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    options: EngineOptions | None = None,
    goodput: Goodput | None = None,
    peer: str | None = None,
    progress: Progress | None = None,
) -> ThroughputReport:
    """Load ``model``, warm it up with other prompts of the same shapes, and measure the workload.

    ``peer``: an engine or the URL of a server that runs it too, ROUNDS times in turns, each time with fresh prompts.
    LlmqError before anything is measured when the workload does not fit, or there is no such peer.
    """
    if peer is not None:
        check_peer(peer)
    subject = Subject(
        model, [workload], revision=revision, dtype=dtype, device=device, options=options or EngineOptions()
    )
    items = subject.items(workload)
    opponent = None if peer is None else open_peer(peer, subject, workload.seed)
    subject.run(warm_up(items, subject.vocabulary, workload.seed))
    run = subject.run(items, goodput, progress)
    memory = tuple(subject.memory(items, run))
    comparison = None
    if opponent is not None:
        rounds = [subject.items(workload, cell) for cell in range(1, ROUNDS + 1)]
        comparison = compare(subject, opponent, rounds, workload.seed)
    return ThroughputReport(subject.setup(), workload, run, memory, comparison)
