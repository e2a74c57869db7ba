"""An open loop: requests are sent when they are due, whether earlier ones are answered or not.

A limit on how many may be under way holds requests back in the client. That wait belongs to what a user sees, so each
request keeps both times: when it was due and when it was sent.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any, Protocol

from llmq.bench.metrics import Goodput, Metrics, Timeline, summarize
from llmq.bench.workload import Item
from llmq.errors import USAGE, LlmqError

LEAST_SUM = 1e-300
"""Of gaps between requests, for a number to scale them by."""
Progress = Callable[[int, int], None]
"""Told how many of how many requests are over."""


@dataclass(frozen=True, slots=True)
class Load:
    """request_rate      requests a second, on the average; inf: all at once. Not for a trace, which has its own times
    burstiness        shape of the gamma distribution of the gaps between requests: 1, a Poisson process; below, in
                      bursts; inf: even
    max_concurrency   requests that may be under way; None: any number
    ramp_up           seconds over which the rate grows from nothing, in a straight line
    """

    request_rate: float = math.inf
    burstiness: float = 1.0
    max_concurrency: int | None = None
    ramp_up: float = 0.0

    def __post_init__(self) -> None:
        checks = (
            (self.request_rate > 0, "request_rate", "above 0"),
            (self.burstiness > 0, "burstiness", "above 0"),
            (self.max_concurrency is None or self.max_concurrency >= 1, "max_concurrency", "1 or more"),
            (0 <= self.ramp_up < math.inf, "ramp_up", "0 seconds or more"),
        )
        for valid, name, rule in checks:
            if not valid:
                raise LlmqError(
                    f"{name} must be {rule}, not {getattr(self, name)}",
                    f"check --{name.replace('_', '-')}",
                    exit_code=USAGE,
                )

    def as_json(self) -> dict[str, Any]:
        """vLLM's field names; it writes inf as a text, which JSON has no number for."""
        return {name: "inf" if value == math.inf else value for name, value in asdict(self).items()}

    def schedule(self, items: Sequence[Item], seed: int) -> list[float]:
        """Seconds after the start at which each request is due, the first at once.

        The gaps are scaled so that together they last exactly what the rate makes of them: whoever offers 10 requests a
        second offers 10, whatever the draw.
        """
        own = [item.due for item in items if item.due is not None]
        if len(own) == len(items):
            if not math.isinf(self.request_rate) or self.ramp_up:
                hint = "leave out --request-rate and --ramp-up"
                raise LlmqError("a trace has times of its own", hint, exit_code=USAGE)
            return own
        if math.isinf(self.request_rate):
            return [0.0] * len(items)
        noise = random.Random(f"arrivals {seed}")
        gaps = [self._gap(noise) for _ in items[1:]]
        if gaps and sum(gaps) < LEAST_SUM:
            raise LlmqError(
                f"with a burstiness of {self.burstiness:g} no request comes after another",
                "raise --burstiness, or leave out --request-rate: all at once",
                exit_code=USAGE,
            )
        scale = len(gaps) / self.request_rate / sum(gaps) if gaps else 0.0
        return [self._ramped(at) for at in accumulate((gap * scale for gap in gaps), initial=0.0)]

    def _gap(self, noise: random.Random) -> float:
        return 1.0 if math.isinf(self.burstiness) else noise.gammavariate(self.burstiness, 1.0)

    def _ramped(self, at: float) -> float:
        """When a request is due that would be at ``at`` if the rate were whole from the start: as many have come before
        it under a rate that grows as t / ramp_up."""
        return math.sqrt(2 * at * self.ramp_up) if at < self.ramp_up / 2 else at + self.ramp_up / 2


@dataclass(frozen=True, slots=True)
class Reply:
    """What came of one request: when each piece did, by the event loop's clock, and how many tokens the server counts;
    None: it does not say."""

    piece_times: Sequence[float]
    input_tokens: int | None
    output_tokens: int | None
    cached_tokens: int | None = None


class Failure(Exception):
    """Why a request failed."""


class Target(Protocol):
    """What a load is put on."""

    async def send(self, item: Item) -> Reply:
        """The answer to one request. Raises Failure."""
        ...


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a load. ``duration`` is seconds from the first request's due time to the last one's end, and
    ``timelines`` are those of the requests that succeeded, ``errors`` the different reasons why others did not."""

    timelines: tuple[Timeline, ...]
    failed: int
    errors: tuple[str, ...]
    duration: float

    def metrics(self, goodput: Goodput | None = None) -> Metrics:
        return summarize(self.timelines, failed=self.failed, duration=self.duration, goodput=goodput)

    @property
    def completion_rate(self) -> float | None:
        """Requests completed a second, between the first to end and the last; None when fewer than two were."""
        ends = sorted(timeline.token_times[-1] for timeline in self.timelines)
        return (len(ends) - 1) / (ends[-1] - ends[0]) if len(ends) > 1 and ends[-1] > ends[0] else None


async def run_load(
    target: Target,
    items: Sequence[Item],
    load: Load,
    *,
    seed: int,
    lengths: Sequence[int],
    progress: Progress | None = None,
) -> Outcome:
    """Send every item when it is due. ``lengths`` are the prompts' tokens, for where the server does not count them."""
    loop = asyncio.get_running_loop()
    seats = asyncio.Semaphore(load.max_concurrency or len(items))
    schedule = load.schedule(items, seed)
    start = loop.time()
    over = 0

    async def one(item: Item, after: float, length: int) -> Timeline | str:
        nonlocal over
        due = start + after
        await _sleep_until(due)
        async with seats:
            sent = loop.time()
            try:
                reply = await target.send(item)
            except Failure as failure:
                return str(failure)
            finally:
                over += 1
                if progress is not None:
                    progress(over, len(items))
        read = length if reply.input_tokens is None else reply.input_tokens
        return Timeline(due, reply.piece_times, read, sent, reply.output_tokens, reply.cached_tokens)

    ends = await asyncio.gather(*map(one, items, schedule, lengths))
    timelines = tuple(end for end in ends if isinstance(end, Timeline))
    errors = [end for end in ends if isinstance(end, str)]
    return Outcome(timelines, len(errors), tuple(dict.fromkeys(errors)), loop.time() - start)


async def _sleep_until(at: float) -> None:
    delay = at - asyncio.get_running_loop().time()
    if delay > 0:
        await asyncio.sleep(delay)
