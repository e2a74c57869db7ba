"""What a KV cache and continuous batching are worth: the older ways, run on the same model and requests.

    no KV cache   one request after another, every token of it computed anew for each new one
    KV cache      one request after another
    static        batches that are full when they start, and run until their slowest member is done
    dynamic       the same, but a batch that is not full starts after a moment
    continuous    who is done leaves, and the next in line takes the seat in the same step

Three measurements, all greedy: all requests there at the start (speed, and seats that nobody used); requests that come
one by one, as fast as static batching could just follow (latency, from when each was due); and one long answer with and
without a cache (how time grows with length), of each token the quickest of all rounds, the least disturbed. A peer
runs the first, in turns with the batched ways.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from statistics import correlation, linear_regression, median
from typing import Any

from llmq.bench.comparison import Comparison, Figures
from llmq.bench.engine import Run, Setup, Subject, evaluate, params
from llmq.bench.load import Load, Progress
from llmq.bench.nvml import Meter, card_of, start_meter
from llmq.bench.peers import beside, check_peer, open_peer
from llmq.bench.uneven import ROUNDS, Requests, count_steps
from llmq.bench.workload import Item, Workload
from llmq.checkpoint.config import read_config
from llmq.checkpoint.folder import resolve
from llmq.engine.baselines import Batching
from llmq.engine.options import EngineOptions
from llmq.errors import USAGE, LlmqError
from llmq.llm import RequestOutput
from llmq.runtime.device import resolve_device

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
    def joules_per_token(self) -> float | None:
        """Of output; None where nobody measures it."""
        found = [run.joules_per_token for run in self.rounds if run.joules_per_token is not None]
        return median(found) if found else None

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
            "joules_per_token": self.joules_per_token,
            "rounds": [run.as_json() for run in self.rounds],
            "one_by_one": None if self.one_by_one is None else self.one_by_one.as_json(),
        }


@dataclass(frozen=True, slots=True)
class Growth:
    """One answer. ``gaps``: seconds that each of its tokens took."""

    way: Way
    gaps: tuple[float, ...]

    @property
    def seconds(self) -> list[float]:
        """From the start to each token."""
        return list(accumulate(self.gaps))

    @property
    def doubling(self) -> float:
        """Time of the whole answer over that of its first half: 2 where time is linear in length, 4 where quadratic."""
        return sum(self.gaps) / sum(self.gaps[: len(self.gaps) // 2])

    @property
    def line(self) -> tuple[float, float]:
        """Seconds that a token takes with none before it, and by how much longer for each: the least squares of the
        tokens but the first. Time is linear in length where the second is 0, and quadratic where not."""
        slope, base = linear_regression(range(1, len(self.gaps)), self.gaps[1:])
        return base, slope

    @property
    def correlation(self) -> float:
        """Of the time that a token takes with its place: 1 where it lies on a rising line."""
        return correlation(range(1, len(self.gaps)), self.gaps[1:])

    def as_json(self) -> dict[str, Any]:
        base, slope = self.line
        fit = {"base": base, "slope": slope, "correlation": self.correlation}
        return {"way": self.way.name, "doubling": self.doubling, **fit, "seconds": self.seconds}


@dataclass(frozen=True, slots=True)
class BatchingReport:
    """``request_rate``: at which they came one by one. ``growth``: without a cache, and with. ``peer``: continuous
    batching beside another engine, None: nobody asked."""

    setup: Setup
    requests: Requests
    seats: int
    request_rate: float
    results: tuple[Result, ...]
    growth: tuple[Growth, Growth] = field(repr=False)
    peer: Comparison | None

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
            "one_by_one_rate": self.request_rate,
            "ways": [result.as_json() for result in self.results],
            "continuous_over_static": self.speedup,
            "continuous_over_static_by_steps": self.counted,
            "growth": [one.as_json() for one in self.growth],
            "peer": None if self.peer is None else self.peer.as_json(),
        }


def bench_batching(
    model: str,
    requests: Requests | None = None,
    *,
    seats: int = 8,
    rounds: int = ROUNDS,
    gpu_memory_utilization: float = EngineOptions().gpu_memory_utilization,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    peer: str | None = None,
    progress: Progress | None = None,
) -> BatchingReport:
    """Load ``model``, warm it up, and run the requests in each of WAYS, at most ``seats`` at once; the batched ways,
    and ``peer``, an engine or the URL of a server, in turns, ``rounds`` times with fresh prompts. LlmqError before
    loading when the requests do not fit its context, or there is no such peer."""
    if peer is not None:
        check_peer(peer)
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
    device = resolve_device(device)
    # Without a cache, a step computes whole sequences; static batches wait until their longest is sure to fit.
    options = EngineOptions(
        max_num_seqs=seats,
        max_num_batched_tokens=max(EngineOptions().on(device).batched_tokens, needed),
        max_model_len=needed,
        prefix_caching=False,
        gpu_memory_utilization=gpu_memory_utilization,
    )
    workload = Workload(asked.num_prompts, asked.input_len, 1, asked.seed)
    subject = Subject(model, [workload], revision=revision, dtype=dtype, device=device, options=options)
    opponent = None if peer is None else open_peer(peer, subject, asked.seed)

    def draw(cell: int) -> list[Item]:
        prompts = [one.prompt for one in subject.items(workload, cell)]
        return [Item(prompt, length) for prompt, length in zip(prompts, asked.output_lens, strict=True)]

    items = draw(0)
    alone = items[: max(1, len(items) // ALONE)]
    total = len(BATCHED) * (rounds + 2) + 2 + 2 * rounds + (rounds + 1) * (peer is not None)
    ticks = iter(range(1, total + 1))

    def tick() -> None:
        if progress is not None:
            progress(next(ticks), total)

    runs: dict[Way, list[Run]] = {way: [] for way in WAYS}
    theirs: list[Figures] = []
    for round in range(rounds + 1):  # the first is the warm-up
        fresh = draw(round)
        for way in BATCHED:
            run = _all_at_once(subject, fresh, way)
            runs[way] += [run] if round else []
            tick()
        if opponent is not None:
            there = opponent.run(fresh)
            theirs += [there] if round else []
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
    answers: dict[Way, list[list[float]]] = {NO_CACHE: [], CACHE: []}
    for _ in range(rounds):
        for way, found in answers.items():
            found.append(_token_seconds(subject, Item(items[0].prompt, asked.growth), way))
            tick()
    results = tuple(
        Result(way, 1 if way.alone else seats, tuple(found), trickled.get(way)) for way, found in runs.items()
    )
    growth = [Growth(way, tuple(map(min, zip(*found, strict=True)))) for way, found in answers.items()]
    compared = None if opponent is None else beside(opponent, [run.metrics for run in runs[CONTINUOUS]], theirs)
    return BatchingReport(subject.setup(), asked, seats, rate, results, (growth[0], growth[1]), compared)


def _all_at_once(subject: Subject, items: Sequence[Item], way: Way) -> Run:
    prompts, asked = [item.prompt for item in items], [params(item) for item in items]
    started, meter = _begin(subject)
    outputs = subject.llm.generate(prompts, asked, batching=way.batching, kv_cache=way.kv_cache)
    return _run(subject, outputs, items, started, meter)


def _one_after_another(subject: Subject, items: Sequence[Item], way: Way) -> Run:
    started, meter = _begin(subject)
    outputs: list[RequestOutput] = []
    for index, item in enumerate(items):
        (output,) = subject.llm.generate([item.prompt], params(item), batching=way.batching, kv_cache=way.kv_cache)
        output.index = index
        outputs.append(output)
    return _run(subject, outputs, items, started, meter)


def _one_by_one(subject: Subject, items: Sequence[Item], way: Way, due: Sequence[float]) -> Run:
    """Each request is submitted when it is due, and its latency counted from then."""
    llm = subject.llm
    outputs: list[RequestOutput] = []
    with llm.scheduled(way.batching):
        started, meter = _begin(subject)
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
        return _run(subject, outputs, items, started, meter)


def _begin(subject: Subject) -> tuple[float, Meter]:
    """When a run begins, and what the card spends from then on."""
    subject.llm.reset_stats()
    meter = start_meter(card_of(subject.llm.device))
    return time.perf_counter(), meter


def _run(
    subject: Subject, outputs: Sequence[RequestOutput], items: Sequence[Item], started: float, meter: Meter
) -> Run:
    metrics, errors = evaluate(outputs, items, time.perf_counter() - started)
    return Run(metrics, subject.llm.stats, errors, meter.joules)


def _token_seconds(subject: Subject, item: Item, way: Way) -> list[float]:
    """Of each token of the answer, how long it took."""
    started = time.perf_counter()
    (output,) = subject.llm.generate([item.prompt], params(item), batching=way.batching, kv_cache=way.kv_cache)
    if output.error is not None:
        raise output.error
    times = [started, *output.completions[0].token_times]
    return [after - before for before, after in pairwise(times)]
