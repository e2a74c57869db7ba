"""Load on scripted targets in virtual time: when requests are due and sent, and what latencies, by hand, come of it."""

from __future__ import annotations

import asyncio
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from virtual_time import run_virtually

from llmq.bench.load import Failure, Load, Outcome, Reply, run_load
from llmq.bench.metrics import Distribution, Goodput
from llmq.bench.workload import Item
from llmq.errors import USAGE, LlmqError

EVEN = math.inf


def items(number: int) -> list[Item]:
    return [Item([index], 3) for index in range(number)]


@dataclass
class Scripted:
    """Answers request i with pieces after these pauses, in seconds; None: fails at once."""

    scripts: Sequence[Sequence[float] | None]
    under_way: int = 0
    most: int = 0
    sent: list[Any] = field(default_factory=list)

    async def send(self, item: Item) -> Reply:
        self.sent.append(item.prompt)
        script = self.scripts[int(item.prompt[0])]  # type: ignore[call-overload]
        if script is None:
            raise Failure("refused")
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        loop, times = asyncio.get_running_loop(), []
        for pause in script:
            await asyncio.sleep(pause)
            times.append(loop.time())
        self.under_way -= 1
        return Reply(times, input_tokens=7, output_tokens=None)


def load(target: Scripted, how: Load) -> Outcome:
    number = len(target.scripts)
    return run_virtually(run_load(target, items(number), how, seed=0, lengths=[1] * number))


def latency(outcome: Outcome, name: str) -> Distribution:
    found = outcome.metrics().latencies[name]
    assert found is not None
    return found


# When requests are due


def test_an_infinite_rate_is_all_at_once() -> None:
    assert Load().schedule(items(3), 0) == [0, 0, 0]


def test_infinite_burstiness_is_even() -> None:
    assert Load(request_rate=4, burstiness=EVEN).schedule(items(4), 0) == [0, 0.25, 0.5, 0.75]


@given(st.integers(2, 200), st.floats(0.1, 1e3), st.floats(0.2, 50), st.integers(0, 9))
def test_whatever_the_draw_the_offered_rate_is_the_one_asked_for(n: int, rate: float, shape: float, seed: int) -> None:
    times = Load(request_rate=rate, burstiness=shape).schedule(items(n), seed)
    assert times[0] == 0
    assert times[-1] == pytest.approx((n - 1) / rate)
    assert times == sorted(times)


@pytest.mark.parametrize(("burstiness", "variation"), [(0.25, 2.0), (1.0, 1.0), (4.0, 0.5)])
def test_gaps_vary_as_a_gamma_distribution_of_that_shape(burstiness: float, variation: float) -> None:
    """Its coefficient of variation is 1 / √shape; 1 is a Poisson process."""
    times = Load(request_rate=10, burstiness=burstiness).schedule(items(20_000), 0)
    gaps = [after - before for before, after in pairwise(times)]
    assert statistics.pstdev(gaps) / statistics.fmean(gaps) == pytest.approx(variation, rel=0.05)


def test_the_same_seed_gives_the_same_times_and_another_seed_others() -> None:
    first, again, other = (Load(request_rate=2).schedule(items(9), seed) for seed in (1, 1, 2))
    assert first == again != other


def test_a_ramp_offers_as_much_as_the_area_under_a_rate_that_grows_in_a_straight_line() -> None:
    times = Load(request_rate=10, burstiness=EVEN, ramp_up=4).schedule(items(100), 0)
    assert sum(at < 2 for at in times) == pytest.approx(10 * 2**2 / (2 * 4), abs=1)
    assert sum(at < 4 for at in times) == pytest.approx(10 * 4 / 2, abs=1)
    assert times[60] - times[50] == pytest.approx(1), "the whole rate afterwards"


def test_a_trace_keeps_its_own_times_and_takes_no_rate() -> None:
    trace = [Item([1], 1, due) for due in (0.0, 1.5, 1.75)]
    assert Load().schedule(trace, 0) == [0.0, 1.5, 1.75]
    with pytest.raises(LlmqError) as caught:
        Load(request_rate=3).schedule(trace, 0)
    assert "--request-rate" in (caught.value.hint or "")


@pytest.mark.parametrize(
    "wrong", [{"request_rate": 0}, {"burstiness": 0}, {"max_concurrency": 0}, {"ramp_up": -1}], ids=str
)
def test_a_load_that_is_none_is_a_usage_error(wrong: dict[str, Any]) -> None:
    with pytest.raises(LlmqError) as caught:
        Load(**wrong)
    assert caught.value.exit_code == USAGE


def test_bursts_so_close_that_gaps_are_nothing_are_refused() -> None:
    with pytest.raises(LlmqError) as caught:
        Load(request_rate=5, burstiness=1e-9).schedule(items(2), 0)
    assert caught.value.exit_code == USAGE
    assert "--burstiness" in (caught.value.hint or "")


# What it measures


def test_every_latency_of_a_scripted_target_is_the_one_computed_by_hand() -> None:
    """Two at a time, each waits for its first piece and then twice more: a by 0.2, 0.1, 0.3, b by 0.5, 0.1, 0.1."""
    outcome = load(Scripted([[0.2, 0.1, 0.3], [0.5, 0.1, 0.1]]), Load())
    assert latency(outcome, "ttft").mean == pytest.approx((200 + 500) / 2)
    assert latency(outcome, "ttft").percentiles[90] == pytest.approx(200 + 0.9 * 300)
    assert latency(outcome, "tpot").mean == pytest.approx((200 + 100) / 2)
    assert latency(outcome, "itl").mean == pytest.approx((100 + 300 + 100 + 100) / 4)
    assert latency(outcome, "itl").percentiles[99] == pytest.approx(100 + 0.97 * 200)
    assert latency(outcome, "e2el").mean == pytest.approx((600 + 700) / 2)
    assert latency(outcome, "e2el").std == pytest.approx(50)
    metrics = outcome.metrics()
    assert (metrics.total_input_tokens, metrics.total_output_tokens) == (14, 6)
    assert metrics.duration == pytest.approx(0.7)
    assert metrics.output_throughput == pytest.approx(6 / 0.7)


STALL = [[0.05], [0.05], [1.05], *([0.05] for _ in range(7))]
"""Ten requests, due every 100 ms, one at a time. The third stalls the server for a second."""


def test_a_stalled_server_shows_in_the_tail_from_the_scheduled_time_and_not_in_that_from_the_send() -> None:
    """Coordinated omission. The fourth is sent at 1.25 s, not 0.3, and over at 1.3; each later one waits 50 less."""
    outcome = load(Scripted(STALL), Load(request_rate=10, burstiness=EVEN, max_concurrency=1))
    sent, due = latency(outcome, "e2el"), latency(outcome, "scheduled_e2el")
    assert sent.percentiles[50] == pytest.approx(50)
    by_hand = sorted([50, 50, 1050, 1000, 950, 900, 850, 800, 750, 700])
    assert due.mean == pytest.approx(statistics.fmean(by_hand))
    assert due.percentiles[50] == pytest.approx((800 + 850) / 2)
    assert due.percentiles[99] == pytest.approx(1000 + 0.91 * 50)
    assert sent.mean == pytest.approx((9 * 50 + 1050) / 10)


def test_goodput_counts_from_when_requests_were_due() -> None:
    outcome = load(Scripted(STALL), Load(request_rate=10, burstiness=EVEN, max_concurrency=1))
    metrics = outcome.metrics(Goodput(e2el=725))
    assert metrics.good == 3, "the two before the stall, and the last, which waited 700 ms"
    assert metrics.request_goodput == pytest.approx(3 / 1.6)


def test_no_more_than_the_limit_are_under_way() -> None:
    target = Scripted([[0.3]] * 9)
    outcome = load(target, Load(max_concurrency=2))
    assert target.most == outcome.metrics().max_concurrent_requests == 2
    assert outcome.duration == pytest.approx(5 * 0.3)


def test_without_a_limit_the_loop_is_open() -> None:
    """A request that hangs holds nobody back."""
    target = Scripted([[60.0], *[[0.1]] * 5])
    outcome = load(target, Load(request_rate=10, burstiness=EVEN))
    assert latency(outcome, "scheduled_e2el").percentiles[50] == pytest.approx(100)


def test_failures_improve_no_figure() -> None:
    """They are counted, and in the duration; no latency, token or throughput is theirs."""
    outcome = load(Scripted([[0.2, 0.1], None, None]), Load())
    alone = load(Scripted([[0.2, 0.1]]), Load())
    metrics, other = outcome.metrics(Goodput(ttft=1000)), alone.metrics(Goodput(ttft=1000))
    assert (metrics.completed, metrics.failed, outcome.errors) == (1, 2, ("refused",))
    assert metrics.latencies == other.latencies
    assert (metrics.output_throughput, metrics.good) == (other.output_throughput, 1)


def test_what_is_completed_a_second_is_counted_between_the_first_end_and_the_last() -> None:
    outcome = load(Scripted([[2.0]] * 11), Load(request_rate=5, burstiness=EVEN))
    assert outcome.completion_rate == pytest.approx(5)
    assert outcome.duration == pytest.approx(4)


def test_where_the_server_does_not_count_the_prompt_its_length_does() -> None:
    class Silent(Scripted):
        async def send(self, item: Item) -> Reply:
            return Reply([asyncio.get_running_loop().time() + 1], None, None)

    assert load(Silent([[1.0]] * 3), Load()).metrics().total_input_tokens == 3
