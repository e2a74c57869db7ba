"""The same work at a growing load, and the knee: the load beyond which more of it brings little but waiting.

Batches, in process: sequences that run together are added until they hardly make it faster. The knee is the last batch
up to which each added sequence brought at least GAIN of the tokens/s that the first batch has a sequence.

Rates, at a server: requests come faster until it cannot follow. The knee is the last rate up to which it completes
KEPT of each, with no failure. What it completes a second is counted between the first end and the last, so that
neither the first request's nor the last one's latency is taken for slowness.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from llmq.bench.load import Load, Progress
from llmq.bench.metrics import Goodput, Metrics
from llmq.bench.serve import Client, ServeRun, open_client
from llmq.bench.workload import Workload, warm_up
from llmq.engine.options import EngineOptions
from llmq.errors import USAGE, LlmqError

GAIN = 0.5
KEPT = 0.95
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
RATES = (1, 2, 4, 8, 16)


@dataclass(frozen=True, slots=True)
class Cell:
    """One load of a sweep: a batch size, or a rate in requests a second, and what came of it."""

    load: float
    metrics: Metrics
    details: dict[str, Any]


@dataclass(frozen=True, slots=True)
class SweepReport:
    """``axis``: batch_size or request_rate. ``knee``: one of the cells' loads; None when even the least is too much."""

    axis: str
    subject: dict[str, Any]
    cells: tuple[Cell, ...]
    knee: float | None

    @property
    def reason(self) -> str:
        """What the knee is."""
        if self.axis == "batch_size":
            return (
                f"up to here each added sequence brings at least {GAIN:.0%} of the tokens/s that one of the first has"
            )
        return f"up to here at least {KEPT:.0%} of what is offered is completed, with no failure"

    @property
    def failed(self) -> int:
        return sum(cell.metrics.failed for cell in self.cells)

    def as_json(self) -> dict[str, Any]:
        return {
            **self.subject,
            "axis": self.axis,
            "knee": self.knee,
            "knee_is": self.reason,
            "cells": [{self.axis: cell.load, **cell.details} for cell in self.cells],
        }


def batch_knee(speeds: Sequence[tuple[int, float]]) -> int:
    """The knee of (batch size, tokens/s) pairs in ascending order."""
    first, speed = speeds[0]
    knee = first
    for (batch, before), (larger, after) in pairwise(speeds):
        if (after - before) / (larger - batch) < GAIN * speed / first:
            break
        knee = larger
    return knee


def rate_knee(cells: Sequence[tuple[float, float | None, int]]) -> float | None:
    """The knee of (offered rate, completed rate, failures) triples; a rate is None where too few were completed."""
    knee = None
    for offered, completed, failed in cells:
        if failed or completed is None or completed < KEPT * offered:
            break
        knee = offered
    return knee


def sweep_batches(
    model: str,
    workload: Workload,
    batch_sizes: Sequence[float],
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    options: EngineOptions | None = None,
    progress: Progress | None = None,
) -> SweepReport:
    """Run one static batch of each size, of fresh prompts, after one of other prompts to warm up.

    ``workload.num_prompts`` is not looked at. LlmqError before anything is measured when a batch does not fit.
    """
    from llmq.bench.engine import Subject

    sizes = ascending(batch_sizes, "--batch-sizes")
    workloads = [replace(workload, num_prompts=int(size)) for size in sizes]
    options = replace(options or EngineOptions(), max_num_seqs=int(sizes[-1]))
    subject = Subject(model, workloads, revision=revision, dtype=dtype, device=device, options=options)
    batches = [subject.items(one, cell) for cell, one in enumerate(workloads)]
    cells = []
    for cell, (size, batch) in enumerate(zip(sizes, batches, strict=True)):
        subject.run(warm_up(batch, subject.vocabulary, workload.seed, cell))
        run = subject.run(batch)
        cells.append(Cell(size, run.metrics, run.as_json()))
        if progress is not None:
            progress(cell + 1, len(sizes))
    knee = batch_knee([(int(cell.load), cell.metrics.output_throughput) for cell in cells])
    about = {**subject.setup().as_json(), **workload.as_json()}
    return SweepReport("batch_size", about, tuple(cells), knee)


def sweep_rates(
    url: str,
    workload: Workload,
    load: Load,
    rates: Sequence[float],
    *,
    model: str | None = None,
    tokenizer: str | None = None,
    api_key: str | None = None,
    chat: bool = False,
    ignore_eos: bool = True,
    goodput: Goodput | None = None,
    progress: Progress | None = None,
) -> SweepReport:
    """Put the workload on the server at ``url`` at each rate, with fresh prompts, after a warm-up.

    ``load.request_rate`` is not looked at. LlmqError before anything is measured when the server does not answer, or
    the workload does not fit it.
    """

    async def run() -> tuple[Client, list[ServeRun]]:
        client = await open_client(url, workload, model, tokenizer, api_key, chat, ignore_eos)
        every = [client.items(cell) for cell in range(len(loads))]
        loads[0].schedule(every[0], workload.seed)
        runs = []
        for cell, (items, one) in enumerate(zip(every, loads, strict=True)):
            await client.warm_up(items, one, cell)
            runs.append(await client.measure(items, one, goodput, None))
            if progress is not None:
                progress(cell + 1, len(loads))
        return client, runs

    loads = [replace(load, request_rate=rate) for rate in ascending(rates, "--request-rates")]
    client, runs = asyncio.run(run())
    cells = tuple(Cell(run.load.request_rate, run.metrics, run.as_json()) for run in runs)
    knee = rate_knee([(run.load.request_rate, run.outcome.completion_rate, run.metrics.failed) for run in runs])
    return SweepReport("request_rate", client.as_json(), cells, knee)


def ascending(numbers: Sequence[float], flag: str) -> list[float]:
    """``numbers``, each once. LlmqError unless they are two or more, and above 0."""
    found = sorted(set(numbers))
    if len(found) < 2 or found[0] <= 0:
        raise LlmqError("a sweep takes two loads or more, each above 0", f"try {flag} 1,2,4,8", exit_code=USAGE)
    return found
