"""What a run is judged by, computed from when each token came out. Names and definitions follow vLLM's benchmarks.

    ttft   time to first token: first token − arrival; what the request waits for in the queue is part of it
    tpot   time per output token: (last token − first token) / (output tokens − 1), one figure a request; requests
           of one output token have none
    itl    inter-token latency: the gap between two tokens that follow each other, all gaps of all requests in one list
    e2el   end-to-end latency: last token − arrival
    throughputs   of the completed requests, over the duration of the run, from the call to its return

Percentiles interpolate linearly. A failed request counts in ``failed`` and in the duration, nowhere else. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import Any

PERCENTILES = (50, 90, 99)
DEFINITIONS = {
    "ttft": "first token - arrival, queueing included",
    "tpot": "(last token - first token) / (output tokens - 1) of each request with two tokens or more",
    "itl": "gap between consecutive tokens, all gaps of all requests in one list",
    "e2el": "last token - arrival",
    "throughput": "completed requests and their tokens / duration of the whole run, failures included",
    "percentiles": "linear interpolation",
}


@dataclass(frozen=True, slots=True)
class Timeline:
    """One completed request on a clock of seconds: when it arrived, and when each of its output tokens came out."""

    arrival: float
    token_times: Sequence[float]
    input_tokens: int

    @property
    def ttft(self) -> float:
        return self.token_times[0] - self.arrival

    @property
    def tpot(self) -> float | None:
        gaps = len(self.token_times) - 1
        return (self.token_times[-1] - self.token_times[0]) / gaps if gaps else None

    @property
    def itls(self) -> list[float]:
        return [after - before for before, after in pairwise(self.token_times)]

    @property
    def e2el(self) -> float:
        return self.token_times[-1] - self.arrival


@dataclass(frozen=True, slots=True)
class Distribution:
    """Milliseconds."""

    mean: float
    percentiles: dict[int, float]


@dataclass(frozen=True, slots=True)
class Metrics:
    """Times in seconds; each latency is None when no request had one."""

    duration: float
    completed: int
    failed: int
    total_input_tokens: int
    total_output_tokens: int
    latencies: dict[str, Distribution | None]

    @property
    def request_throughput(self) -> float:
        return self.completed / self.duration

    @property
    def output_throughput(self) -> float:
        return self.total_output_tokens / self.duration

    @property
    def total_token_throughput(self) -> float:
        return (self.total_input_tokens + self.total_output_tokens) / self.duration

    def as_json(self) -> dict[str, Any]:
        """vLLM's field names."""
        fields: dict[str, Any] = {
            "duration": self.duration,
            "completed": self.completed,
            "failed": self.failed,
            "total_input_tokens": self.total_input_tokens,
            "total_output_tokens": self.total_output_tokens,
            "request_throughput": self.request_throughput,
            "output_throughput": self.output_throughput,
            "total_token_throughput": self.total_token_throughput,
        }
        for name, latency in self.latencies.items():
            fields[f"mean_{name}_ms"] = None if latency is None else latency.mean
            for p in PERCENTILES:
                fields[f"p{p}_{name}_ms"] = None if latency is None else latency.percentiles[p]
        return fields


def summarize(timelines: Sequence[Timeline], *, failed: int, duration: float) -> Metrics:
    """The metrics of a run of ``duration`` seconds with these completed requests."""
    return Metrics(
        duration=duration,
        completed=len(timelines),
        failed=failed,
        total_input_tokens=sum(timeline.input_tokens for timeline in timelines),
        total_output_tokens=sum(len(timeline.token_times) for timeline in timelines),
        latencies={
            "ttft": distribution([timeline.ttft for timeline in timelines]),
            "tpot": distribution([timeline.tpot for timeline in timelines if timeline.tpot is not None]),
            "itl": distribution([gap for timeline in timelines for gap in timeline.itls]),
            "e2el": distribution([timeline.e2el for timeline in timelines]),
        },
    )


def distribution(seconds: Sequence[float]) -> Distribution | None:
    """Mean and percentiles in milliseconds, or None of nothing."""
    if not seconds:
        return None
    ordered = sorted(1000 * value for value in seconds)
    return Distribution(fmean(ordered), {p: percentile(ordered, p) for p in PERCENTILES})


def percentile(ordered: Sequence[float], p: float) -> float:
    """The ``p``-th percentile of values in ascending order, linear between the two nearest."""
    position = (len(ordered) - 1) * p / 100
    below, above = math.floor(position), math.ceil(position)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)
