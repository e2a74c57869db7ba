"""Latency of one static batch: so many prompts enter together and leave together, again and again."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import Any

from llmq.bench.comparison import ROUNDS, Comparison
from llmq.bench.engine import Run, Setup, Subject
from llmq.bench.load import Progress
from llmq.bench.metrics import percentile
from llmq.bench.peers import check_peer, compare, open_peer
from llmq.bench.workload import Workload
from llmq.engine.options import EngineOptions

PERCENTILES = (10, 25, 50, 75, 90, 99)
"""vLLM's, of its ``bench latency``."""
ITERATIONS, WARM_UPS = 10, 2


@dataclass(frozen=True, slots=True)
class LatencyReport:
    """``runs``: one an iteration. Seconds."""

    setup: Setup
    workload: Workload
    runs: tuple[Run, ...]
    peer: Comparison | None

    @property
    def latencies(self) -> list[float]:
        """Seconds that each batch took, from its first prompt to its last token."""
        return [run.metrics.duration for run in self.runs]

    @property
    def percentiles(self) -> dict[int, float]:
        """Of the seconds a batch."""
        ordered = sorted(self.latencies)
        return {p: percentile(ordered, p) for p in PERCENTILES}

    @property
    def output_throughput(self) -> float:
        """Tokens a second over all batches."""
        return sum(run.metrics.total_output_tokens for run in self.runs) / sum(self.latencies)

    @property
    def joules_per_token(self) -> float | None:
        """Of output, averaged over the batches; None where nobody measures it."""
        found = [run.joules_per_token for run in self.runs if run.joules_per_token is not None]
        return fmean(found) if found else None

    @property
    def failed(self) -> int:
        return sum(run.metrics.failed for run in self.runs)

    def mean(self, name: str) -> float | None:
        """Milliseconds of a latency by its short name, averaged over the batches; None where no request had one."""
        each = [latency.mean for run in self.runs if (latency := run.metrics.latencies[name]) is not None]
        return fmean(each) if each else None

    def as_json(self) -> dict[str, Any]:
        """vLLM's field names."""
        return {
            **self.setup.as_json(),
            **self.workload.as_json(),
            "batch_size": self.workload.num_prompts,
            "avg_latency": fmean(self.latencies),
            "std_latency": pstdev(self.latencies),
            "latencies": self.latencies,
            "percentiles": {str(p): seconds for p, seconds in self.percentiles.items()},
            "output_throughput": self.output_throughput,
            "mean_ttft_ms": self.mean("ttft"),
            "mean_tpot_ms": self.mean("tpot"),
            "failed": self.failed,
            "errors": sorted({error for run in self.runs for error in run.errors}),
            "joules_per_token": self.joules_per_token,
            "peer": None if self.peer is None else self.peer.as_json(),
        }


def bench_latency(
    model: str,
    workload: Workload,
    *,
    iterations: int = ITERATIONS,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    options: EngineOptions | None = None,
    peer: str | None = None,
    progress: Progress | None = None,
) -> LatencyReport:
    """Run the batch that ``workload`` is ``iterations`` times, each with prompts of its own, after WARM_UPS more.

    ``peer``: as of ``bench_throughput``. LlmqError before anything is measured when the batch does not fit.
    """
    if peer is not None:
        check_peer(peer)
    subject = Subject(
        model, [workload], revision=revision, dtype=dtype, device=device, options=options or EngineOptions()
    )
    batches = [subject.items(workload, cell) for cell in range(WARM_UPS + iterations)]
    opponent = None if peer is None else open_peer(peer, subject, workload.seed)
    runs = []
    for number, batch in enumerate(batches):
        runs.append(subject.run(batch))
        if progress is not None:
            progress(number + 1, len(batches))
    comparison = None
    if opponent is not None:
        rounds = [subject.items(workload, len(batches) + number) for number in range(ROUNDS)]
        comparison = compare(subject, opponent, rounds, workload.seed)
    return LatencyReport(subject.setup(), workload, tuple(runs[WARM_UPS:]), comparison)
