"""What a run is judged by, computed from when each token came out. Names and definitions follow vLLM's benchmarks.

    ttft    time to first token: first token − send
    tpot    time per output token: (last token − first token) / (output tokens − 1), one figure a request; requests
            of one output token have none
    itl     inter-token latency: the gap between two tokens, or pieces of a stream, that follow each other, all gaps of
            all requests in one list
    e2el    end-to-end latency: last token − send
    scheduled_ttft, scheduled_e2el   the same from when the request was due, which is what its user waits: a client that
            is held back, by a limit on concurrency say, sends late, and what it waits before shows nowhere else
            (coordinated omission)
    goodput       completed requests a second whose latencies are all within limits, counted from when they were due
    throughputs   of the completed requests, over the duration of the run, from the call to its return

Percentiles interpolate linearly. A failed request counts in ``failed`` and in the duration, nowhere else. No torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from statistics import fmean, pstdev
from typing import Any

from llmq.errors import USAGE, LlmqError

PERCENTILES = (50, 90, 95, 99)
DEFINITIONS = {
    "ttft": "first token - send",
    "tpot": "(last token - first token) / (output tokens - 1) of each request with two tokens or more",
    "itl": "gap between consecutive tokens, or pieces of a stream, all gaps of all requests in one list",
    "e2el": "last token - send",
    "scheduled_*": "the same from when the request was due, waiting in the client included",
    "goodput": "completed requests within all limits, counted from when they were due / duration",
    "throughput": "completed requests and their tokens / duration of the whole run, failures included",
    "percentiles": "linear interpolation",
}


@dataclass(frozen=True, slots=True)
class Timeline:
    """One completed request on a clock of seconds.

    arrival        when it was due
    token_times    when its output came: one time a token, or one a piece of several
    sent           when its client sent it; None: when it was due
    output_tokens  None: one at each of ``token_times``
    cached_tokens  of its input, those that a prefix cache had; None: nobody says
    """

    arrival: float
    token_times: Sequence[float]
    input_tokens: int
    sent: float | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None

    @property
    def send(self) -> float:
        return self.arrival if self.sent is None else self.sent

    @property
    def tokens(self) -> int:
        return len(self.token_times) if self.output_tokens is None else self.output_tokens

    @property
    def ttft(self) -> float:
        return self.token_times[0] - self.send

    @property
    def scheduled_ttft(self) -> float:
        return self.token_times[0] - self.arrival

    @property
    def tpot(self) -> float | None:
        return (self.token_times[-1] - self.token_times[0]) / (self.tokens - 1) if self.tokens > 1 else None

    @property
    def itls(self) -> list[float]:
        return [after - before for before, after in pairwise(self.token_times)]

    @property
    def e2el(self) -> float:
        return self.token_times[-1] - self.send

    @property
    def scheduled_e2el(self) -> float:
        return self.token_times[-1] - self.arrival


@dataclass(frozen=True, slots=True)
class Goodput:
    """Limits in milliseconds that a good request keeps; None: no limit."""

    ttft: float | None = None
    tpot: float | None = None
    e2el: float | None = None

    def met_by(self, timeline: Timeline) -> bool:
        """A request of one token has no time between tokens, and keeps any limit of it."""
        took = {"ttft": timeline.scheduled_ttft, "tpot": timeline.tpot or 0.0, "e2el": timeline.scheduled_e2el}
        limits = {name: getattr(self, name) for name in took}
        return all(limits[name] is None or 1000 * seconds <= limits[name] for name, seconds in took.items())


def parse_goodput(text: str) -> Goodput:
    """``"ttft:200 tpot:50"``, in milliseconds, with spaces or commas between. LlmqError when it says anything else."""
    known = [field.name for field in fields(Goodput)]
    limits: dict[str, float] = {}
    for part in re.split(r"[\s,]+", text.strip()):
        name, _, value = part.partition(":")
        try:
            limits[name] = float(value)
        except ValueError:
            limits[name] = math.nan
        if name not in known or not limits[name] > 0:
            raise LlmqError(
                f"{part!r} is no limit of goodput",
                f"name a latency ({', '.join(known)}) and milliseconds: --goodput 'ttft:200 tpot:50'",
                exit_code=USAGE,
            )
    return Goodput(**limits)


@dataclass(frozen=True, slots=True)
class Distribution:
    """Milliseconds. ``std`` is that of the whole population."""

    mean: float
    std: float
    percentiles: dict[int, float]


@dataclass(frozen=True, slots=True)
class Metrics:
    """Times in seconds; each latency is None when no request had one.

    ``good`` is how many requests kept the limits that were set, ``cached_tokens`` how much of the input a prefix cache
    had: None where nobody asked, or knows.
    """

    duration: float
    completed: int
    failed: int
    total_input_tokens: int
    total_output_tokens: int
    latencies: dict[str, Distribution | None]
    good: int | None = None
    cached_tokens: int | None = None
    max_concurrent_requests: int = 0

    @property
    def request_throughput(self) -> float:
        return self.completed / self.duration

    @property
    def request_goodput(self) -> float | None:
        return None if self.good is None else self.good / self.duration

    @property
    def output_throughput(self) -> float:
        return self.total_output_tokens / self.duration

    @property
    def total_token_throughput(self) -> float:
        return (self.total_input_tokens + self.total_output_tokens) / self.duration

    def as_json(self) -> dict[str, Any]:
        """vLLM's field names."""
        found: dict[str, Any] = {
            "duration": self.duration,
            "completed": self.completed,
            "failed": self.failed,
            "total_input_tokens": self.total_input_tokens,
            "total_output_tokens": self.total_output_tokens,
            "cached_tokens": self.cached_tokens,
            "request_throughput": self.request_throughput,
            "request_goodput": self.request_goodput,
            "output_throughput": self.output_throughput,
            "total_token_throughput": self.total_token_throughput,
            "max_concurrent_requests": self.max_concurrent_requests,
        }
        for name, latency in self.latencies.items():
            found[f"mean_{name}_ms"] = None if latency is None else latency.mean
            found[f"median_{name}_ms"] = None if latency is None else latency.percentiles[50]
            found[f"std_{name}_ms"] = None if latency is None else latency.std
            for p in PERCENTILES:
                found[f"p{p}_{name}_ms"] = None if latency is None else latency.percentiles[p]
        return found


def summarize(
    timelines: Sequence[Timeline], *, failed: int, duration: float, goodput: Goodput | None = None
) -> Metrics:
    """The metrics of a run of ``duration`` seconds with these completed requests.

    Latencies from when requests were due are among them where that was not when they were sent.
    """
    latencies = {
        "ttft": distribution([timeline.ttft for timeline in timelines]),
        "tpot": distribution([timeline.tpot for timeline in timelines if timeline.tpot is not None]),
        "itl": distribution([gap for timeline in timelines for gap in timeline.itls]),
        "e2el": distribution([timeline.e2el for timeline in timelines]),
    }
    if any(timeline.sent is not None for timeline in timelines):
        latencies["scheduled_ttft"] = distribution([timeline.scheduled_ttft for timeline in timelines])
        latencies["scheduled_e2el"] = distribution([timeline.scheduled_e2el for timeline in timelines])
    cached = [timeline.cached_tokens for timeline in timelines if timeline.cached_tokens is not None]
    return Metrics(
        duration=duration,
        completed=len(timelines),
        failed=failed,
        total_input_tokens=sum(timeline.input_tokens for timeline in timelines),
        total_output_tokens=sum(timeline.tokens for timeline in timelines),
        latencies=latencies,
        good=None if goodput is None else sum(map(goodput.met_by, timelines)),
        cached_tokens=sum(cached) if cached else None,
        max_concurrent_requests=_most_at_once(timelines),
    )


def distribution(seconds: Sequence[float]) -> Distribution | None:
    """Mean, deviation and percentiles in milliseconds, or None of nothing."""
    if not seconds:
        return None
    ordered = sorted(1000 * value for value in seconds)
    return Distribution(fmean(ordered), pstdev(ordered), {p: percentile(ordered, p) for p in PERCENTILES})


def percentile(ordered: Sequence[float], p: float) -> float:
    """The ``p``-th percentile of values in ascending order, linear between the two nearest."""
    position = (len(ordered) - 1) * p / 100
    below, above = math.floor(position), math.ceil(position)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def _most_at_once(timelines: Sequence[Timeline]) -> int:
    """Requests that were sent and not over, when these were most. One that ends makes room for one that begins."""
    changes = [(timeline.send, 1) for timeline in timelines] + [
        (timeline.token_times[-1], -1) for timeline in timelines
    ]
    running = most = 0
    for _, change in sorted(changes):
        running += change
        most = max(most, running)
    return most
