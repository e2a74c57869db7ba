"""The ways to batch: steps counted by hand and by the scheduler, figures by hand, and the whole on a tiny model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
from command_line import llmq
from hypothesis import given
from hypothesis import strategies as st
from stand_in import StandIn
from tiny_models import save_tiny

from llmq.bench.batching import (
    CACHE,
    CONTINUOUS,
    DYNAMIC,
    NO_CACHE,
    STATIC,
    WAYS,
    BatchingReport,
    Growth,
    bench_batching,
)
from llmq.bench.uneven import Requests, count_steps
from llmq.errors import USAGE, LlmqError

ASKED = Requests(num_prompts=16, input_len=3, longest=16, spread=8, growth=8)

# Counting


def test_static_waits_for_its_slowest_and_continuous_fills_each_seat_as_it_is_free() -> None:
    """Seats a and b: 5, 1 | 1, 1 against a: 5, b: 1 1 1."""
    assert count_steps([5, 1, 1, 1], seats=2) == (6, 5)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(1, 9))
def test_neither_can_do_with_fewer_steps_than_there_is_work(lengths: list[int], seats: int) -> None:
    static, continuous = count_steps(lengths, seats)
    assert math.ceil(sum(lengths) / seats) <= continuous <= static
    assert continuous >= max(lengths)


def test_lengths_are_log_uniform_between_the_longest_and_its_sixteenth() -> None:
    lengths = Requests(num_prompts=4000, longest=1600, spread=16).output_lens
    assert (min(lengths), max(lengths)) == (pytest.approx(100, rel=0.02), pytest.approx(1600, rel=0.02))
    assert sum(length < 400 for length in lengths) / 4000 == pytest.approx(0.5, abs=0.03)


def test_with_lengths_spread_1_to_16_continuous_batching_needs_2_2_times_fewer_steps() -> None:
    static, continuous = count_steps(Requests(num_prompts=4000).output_lens, seats=8)
    assert static / continuous == pytest.approx(2.2, abs=0.1)


# Growth


def test_time_that_is_linear_in_length_doubles_and_quadratic_time_grows_fourfold() -> None:
    linear = Growth(CACHE, (0.5,) * 99 + (0.6,))
    quadratic = Growth(NO_CACHE, tuple(0.01 * (token**2 - (token - 1) ** 2) for token in range(1, 101)))
    assert quadratic.seconds[-1] == pytest.approx(0.01 * 100**2)
    assert (linear.doubling, quadratic.doubling) == (pytest.approx(2, rel=0.01), pytest.approx(4))
    assert linear.line == (pytest.approx(0.5, abs=0.01), pytest.approx(0, abs=1e-4))
    assert quadratic.line == (pytest.approx(0.01), pytest.approx(0.02))
    assert quadratic.correlation == pytest.approx(1)


# The whole


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def report(model: Path) -> BatchingReport:
    return bench_batching(str(model), ASKED, seats=4, rounds=2, device="cpu")


def test_the_scheduler_takes_as_many_steps_as_were_counted(report: BatchingReport) -> None:
    static, continuous = count_steps(ASKED.output_lens, 4)
    assert [report.result(way).steps for way in (STATIC, DYNAMIC, CONTINUOUS)] == [static, static, continuous]
    assert report.counted == static / continuous > 1


def test_seats_are_wasted_that_bring_nobody_a_token(report: BatchingReport) -> None:
    static = report.result(STATIC)
    assert static.wasted == pytest.approx(1 - sum(ASKED.output_lens) / (4 * static.steps))
    assert report.result(CONTINUOUS).wasted < static.wasted
    assert (report.result(NO_CACHE).wasted, report.result(CACHE).wasted) == (0.0, 0.0)


def test_static_batches_are_full_though_requests_come_one_by_one(report: BatchingReport) -> None:
    run = report.result(STATIC).one_by_one
    assert run is not None
    assert run.stats.steps == count_steps(ASKED.output_lens, 4)[0]


def test_every_way_answers_every_request_and_only_batches_have_requests_come_one_by_one(
    report: BatchingReport,
) -> None:
    for way in WAYS:
        result = report.result(way)
        wanted = 2 if way.alone else ASKED.num_prompts
        runs = [*result.rounds, *([] if way.alone else [result.one_by_one])]
        assert [(run.metrics.completed, run.metrics.failed) for run in runs if run] == [(wanted, 0)] * len(runs)
    assert [len(growth.seconds) for growth in report.growth] == [ASKED.growth] * 2


def test_the_command_prints_rows_of_at_most_100_columns_and_draws(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With energy, of a card that spends none."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("llmq.bench.batching.card_of", lambda _: SimpleNamespace(joules=1000.0))
    sizes = ("--num-prompts", 8, "--input-len", 3, "--longest", 8, "--spread", 4, "--growth", 8, "--rounds", 1)
    files = ("--plot", tmp_path / "b.png", "--output", tmp_path / "b.json")
    result = llmq("bench", "batching", model, *sizes, *files, "--device", "cpu")
    assert result.code == 0, result.err
    rows = result.out.splitlines()[2 : 3 + len(WAYS)]
    assert max(map(len, rows)) <= 100
    assert rows[0].rstrip().endswith("J a token")
    assert [row.split("  ")[0] for row in rows[1:]] == [way.name for way in WAYS]
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((tmp_path / "b.json").read_text())
    assert found["schema"] == "llmq.bench.batching/1"
    assert [way["joules_per_token"] for way in found["ways"]] == [0.0] * len(WAYS)
    assert {"continuous_over_static", "continuous_over_static_by_steps", "growth", "ways"} <= set(found)


def test_a_peer_runs_the_same_requests_in_turns(model: Path) -> None:
    with StandIn() as server:
        compared = bench_batching(str(model), ASKED, seats=4, rounds=2, device="cpu", peer=server.url).peer
    assert compared is not None
    assert len(compared.rounds) == 2
    assert compared.ratios["output_throughput"] > 0
    asked = [body["max_tokens"] for body in server.bodies]
    assert [sorted(asked[first : first + 16]) for first in (0, 16, 32)] == [sorted(ASKED.output_lens)] * 3
    assert len({str(prompt) for prompt in server.prompts}) == 3 * 16, "no prompt is sent twice"


@pytest.mark.parametrize(
    "fields",
    [{"num_prompts": 0}, {"input_len": 0}, {"longest": 4, "spread": 8}, {"growth": 1}],
    ids=lambda fields: " ".join(fields),
)
def test_requests_that_cannot_be(fields: dict[str, int]) -> None:
    with pytest.raises(LlmqError) as caught:
        Requests(**fields)
    assert caught.value.exit_code == USAGE


def test_an_answer_beyond_the_context_is_refused(model: Path) -> None:
    result = llmq("bench", "batching", model, "--growth", 600, "--device", "cpu")
    assert result.code == USAGE
    assert "the model's context is 512" in result.err


def test_no_seats_is_a_usage_error(model: Path) -> None:
    assert llmq("bench", "batching", model, "--growth", 8, "--max-num-seqs", 0, "--device", "cpu").code == USAGE
