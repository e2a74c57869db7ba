"""What a KV cache and continuous batching are worth: the older ways, run on the same model and requests.

    no KV cache   one request after another, every token of it computed anew for each new one
    KV cache      one request after another
    static        batches that are full when they start, and run until their slowest member is done
    dynamic       the same, but a batch that is not full starts after a moment
    continuous    who is done leaves, and the next in line takes the seat in the same step

Three measurements, all greedy: all requests there at the start (speed, and seats that nobody used); requests that come
one by one, as fast as static batching could just follow (latency, from when each was due); and one long answer with and
without a cache (how time grows with length).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import correlation, linear_regression, median
from typing import Any

from llmq.bench.engine import Run, Setup, Subject, evaluate, params
from llmq.bench.load import Load, Progress
from llmq.bench.uneven import ROUNDS, Requests, count_steps
from llmq.bench.workload import Item, Workload
from llmq.checkpoint.config import read_config
from llmq.checkpoint.folder import resolve
from llmq.engine.baselines import Batching
from llmq.engine.options import EngineOptions
from llmq.errors import USAGE, LlmqError
from llmq.llm import RequestOutput

ALONE = 8
"""One after another runs this share of the requests, 1/8: it is slow, and every request tells the same."""
UTILIZATION = 0.6
"""Of what static batching can do, the rate at which requests come one by one."""
MOMENT = 0.001
"""Seconds between looks at the clock, while nothing can be done."""


@dataclass(frozen=True, slots=True)
class Way:
    """``alone``: one request after another."""

    name: str
    batching: Batching
    kv_cache: bool = True
    alone: bool = False


NO_CACHE = Way("no KV cache", "continuous", kv_cache=False, alone=True)
CACHE = Way("KV cache", "continuous", alone=True)
STATIC, DYNAMIC, CONTINUOUS = (Way(name, name) for name in ("static", "dynamic", "continuous"))
WAYS = (NO_CACHE, CACHE, STATIC, DYNAMIC, CONTINUOUS)
BATCHED = (STATIC, DYNAMIC, CONTINUOUS)


@dataclass(frozen=True, slots=True)
class Result:
    """How one way did. ``rounds``: all requests there at the start; ``one_by_one``: None where it was not run so."""

    way: Way
    seats: int
    rounds: tuple[Run, ...]
    one_by_one: Run | None

    @property
    def output_throughput(self) -> float:
        return median(run.metrics.output_throughput for run in self.rounds)

    @property
    def steps(self) -> int:
        """One after another, a step for each token."""
        run = self.rounds[0]
        return run.metrics.total_output_tokens if self.way.alone else run.stats.steps

    @property
    def wasted(self) -> float:
        """Share of the seats, of all steps, that brought nobody a token: padded, or idle."""
        seats = self.seats * self.steps
        return 1 - self.rounds[0].metrics.total_output_tokens / seats

    def as_json(self) -> dict[str, Any]:
        return {
            "way": self.way.name,
            "output_throughput": self.output_throughput,
            "steps": self.steps,
            "wasted": self.wasted,
            "rounds": [run.as_json() for run in self.rounds],
            "one_by_one": None if self.one_by_one is None else self.one_by_one.as_json(),
        }


@dataclass(frozen=True, slots=True)
class Growth:
    """One answer. ``seconds``: from the start to each of its tokens."""

    way: Way
    seconds: tuple[float, ...]

    @property
    def doubling(self) -> float:
        """Time of the whole answer over that of its first half: 2 where time is linear in length, 4 where quadratic."""
        return self.seconds[-1] / self.seconds[len(self.seconds) // 2 - 1]

    @property
    def gaps(self) -> list[float]:
        """Seconds that each token but the first took."""
        return [after - before for before, after in zip(self.seconds, self.seconds[1:], strict=False)]

    @property
    def slope(self) -> float:
        """Seconds by which a token takes longer for each token before it: time is linear in length where it is 0, and
        quadratic where not."""
        return linear_regression(range(len(self.gaps)), self.gaps).slope

    @property
    def correlation(self) -> float:
        """Of the time that a token takes with its place: 1 where it lies on a rising line."""
        return correlation(range(len(self.gaps)), self.gaps)

    def as_json(self) -> dict[str, Any]:
        names = ("doubling", "slope", "correlation")
        return {"way": self.way.name, **{name: getattr(self, name) for name in names}, "seconds": list(self.seconds)}


@dataclass(frozen=True, slots=True)
class BatchingReport:
    """``request_rate``: at which they came one by one. ``growth``: without a cache, and with."""

    setup: Setup
    requests: Requests
    seats: int
    request_rate: float
    results: tuple[Result, ...]
    growth: tuple[Growth, Growth] = field(repr=False)

    def result(self, way: Way) -> Result:
        return next(result for result in self.results if result.way is way)

    @property
    def speedup(self) -> float:
        """Continuous over static, in tokens/s: the median of the ratios within rounds."""
        pairs = zip(self.result(CONTINUOUS).rounds, self.result(STATIC).rounds, strict=True)
        return median(one.metrics.output_throughput / two.metrics.output_throughput for one, two in pairs)

    @property
    def counted(self) -> float:
        """The same, if every step took as long as any other."""
        static, continuous = count_steps(self.requests.output_lens, self.seats)
        return static / continuous

    def as_json(self) -> dict[str, Any]:
        asked = self.requests
        return {
            **self.setup.as_json(),
            **{name: getattr(asked, name) for name in asked.__slots__},
            "seats": self.seats,
            "request_rate": self.request_rate,
            "ways": [result.as_json() for result in self.results],
            "continuous_over_static": self.speedup,
            "continuous_over_static_by_steps": self.counted,
            "growth": [one.as_json() for one in self.growth],
        }


def bench_batching(
    model: str,
    requests: Requests | None = None,
    *,
    seats: int = 8,
    rounds: int = ROUNDS,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    progress: Progress | None = None,
) -> BatchingReport:
    """Load ``model``, warm it up, and run the requests in each of WAYS, at most ``seats`` at once; the batched ways in
    turns, ``rounds`` times. LlmqError before loading when the requests do not fit its context."""
    asked = requests or Requests()
    if seats < 1 or rounds < 1:
        raise LlmqError("nothing to measure", "make --max-num-seqs and --rounds 1 or more", exit_code=USAGE)
    context = read_config(resolve(model, revision)).context_length
    needed = asked.input_len + max(asked.longest, asked.growth)
    if needed > context:
        raise LlmqError(
            f"the longest answer makes {needed} tokens with its prompt, and the model's context is {context}",
            "lower --input-len, --longest or --growth",
            exit_code=USAGE,
        )
    # Without a cache, a step computes whole sequences; static batches wait until their longest is sure to fit.
    tokens = max(EngineOptions().max_num_batched_tokens, needed)
    options = EngineOptions(
        max_num_seqs=seats, max_num_batched_tokens=tokens, max_model_len=needed, prefix_caching=False
    )
    workload = Workload(asked.num_prompts, asked.input_len, 1, asked.seed)
    subject = Subject(model, [workload], revision=revision, dtype=dtype, device=device, options=options)
    items = [Item(one.prompt, length) for one, length in zip(subject.items(workload), asked.output_lens, strict=True)]
    alone = items[: max(1, len(items) // ALONE)]
    total = len(BATCHED) * (rounds + 2) + 4
    ticks = iter(range(1, total + 1))

    def tick() -> None:
        if progress is not None:
            progress(next(ticks), total)

    runs: dict[Way, list[Run]] = {way: [] for way in WAYS}
    for round in range(rounds + 1):  # the first is the warm-up
        for way in BATCHED:
            run = _all_at_once(subject, items, way)
            runs[way] += [run] if round else []
            tick()
    for way in (NO_CACHE, CACHE):
        _one_after_another(subject, alone[:1], way)
        runs[way].append(_one_after_another(subject, alone, way))
        tick()
    rate = UTILIZATION * median(run.metrics.request_throughput for run in runs[STATIC])
    trickled = {}
    for way in BATCHED:
        trickled[way] = _one_by_one(subject, items, way, Load(rate).schedule(items, asked.seed))
        tick()
    growth = []
    for way in (NO_CACHE, CACHE):
        growth.append(_grow(subject, Item(items[0].prompt, asked.growth), way))
        tick()
    results = tuple(
        Result(way, 1 if way.alone else seats, tuple(found), trickled.get(way)) for way, found in runs.items()
    )
    return BatchingReport(subject.setup(), asked, seats, rate, results, (growth[0], growth[1]))


def _all_at_once(subject: Subject, items: Sequence[Item], way: Way) -> Run:
    llm = subject.llm
    llm.reset_stats()
    started = time.perf_counter()
    prompts, asked = [item.prompt for item in items], [params(item) for item in items]
    outputs = llm.generate(prompts, asked, batching=way.batching, kv_cache=way.kv_cache)
    return _run(subject, outputs, items, started)


def _one_after_another(subject: Subject, items: Sequence[Item], way: Way) -> Run:
    started = time.perf_counter()
    outputs: list[RequestOutput] = []
    for index, item in enumerate(items):
        (output,) = subject.llm.generate([item.prompt], params(item), batching=way.batching, kv_cache=way.kv_cache)
        output.index = index
        outputs.append(output)
    return _run(subject, outputs, items, started)


def _one_by_one(subject: Subject, items: Sequence[Item], way: Way, due: Sequence[float]) -> Run:
    """Each request is submitted when it is due, and its latency counted from then."""
    llm = subject.llm
    llm.reset_stats()
    outputs: list[RequestOutput] = []
    with llm.scheduled(way.batching):
        started = time.perf_counter()
        waiting: Iterator[int] = iter(range(len(items)))
        upcoming = next(waiting, None)
        while len(outputs) < len(items):
            now = time.perf_counter() - started
            while upcoming is not None and due[upcoming] <= now:
                llm.submit(upcoming, subject.vocabulary.token_ids(items[upcoming].prompt), params(items[upcoming]))
                upcoming = next(waiting, None)
            queues = llm.occupancy
            held = way is STATIC and not queues.running and queues.waiting < llm.options.seats
            if llm.idle or (held and upcoming is not None):
                time.sleep(MOMENT)
                continue
            outputs += [output for output in llm.step() if isinstance(output, RequestOutput)]
        for output in outputs:
            output.arrival_time = started + due[output.index]
        return _run(subject, outputs, items, started)


def _run(subject: Subject, outputs: Sequence[RequestOutput], items: Sequence[Item], started: float) -> Run:
    metrics, errors = evaluate(outputs, items, time.perf_counter() - started)
    return Run(metrics, subject.llm.stats, errors, None)


def _grow(subject: Subject, item: Item, way: Way) -> Growth:
    started = time.perf_counter()
    (output,) = subject.llm.generate([item.prompt], params(item), batching=way.batching, kv_cache=way.kv_cache)
    if output.error is not None:
        raise output.error
    return Growth(way, tuple(at - started for at in output.completions[0].token_times))
