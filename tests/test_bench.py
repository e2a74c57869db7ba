"""Benchmark metrics on timelines made by hand, prompts, and what a failure does to a report."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import llmq
from hypothesis import given
from hypothesis import strategies as st
from known_models import LLAMA_2_7B, config_of
from tiny_models import save_tiny

from llmq.bench.metrics import PERCENTILES, Distribution, Metrics, Timeline, percentile, summarize
from llmq.bench.throughput import evaluate, measure
from llmq.bench.workload import Workload
from llmq.engine.options import EngineOptions
from llmq.engine.request import SamplingParams
from llmq.errors import FAILED, USAGE, LlmqError

TIMES = st.lists(st.floats(0, 1e3), min_size=1, max_size=50)


def latency(metrics: Metrics, name: str) -> Distribution:
    found = metrics.latencies[name]
    assert found is not None
    return found


# Metrics

TWO_REQUESTS = [
    Timeline(arrival=10.0, token_times=[10.5, 10.6, 10.9], input_tokens=7),
    Timeline(arrival=10.0, token_times=[11.0, 11.5], input_tokens=5),
]


def test_time_to_first_token_counts_from_arrival() -> None:
    ttft = latency(summarize(TWO_REQUESTS, failed=0, duration=2.0), "ttft")
    assert ttft.mean == pytest.approx(750)
    assert ttft.percentiles[50] == pytest.approx(750)


def test_time_per_output_token_is_one_figure_a_request_without_its_first_token() -> None:
    tpot = latency(summarize(TWO_REQUESTS, failed=0, duration=2.0), "tpot")
    assert tpot.mean == pytest.approx((200 + 500) / 2)


def test_inter_token_latency_weighs_every_gap_alike() -> None:
    itl = latency(summarize(TWO_REQUESTS, failed=0, duration=2.0), "itl")
    assert itl.mean == pytest.approx((100 + 300 + 500) / 3)
    assert itl.percentiles[50] == pytest.approx(300)


def test_end_to_end_latency_ends_with_the_last_token() -> None:
    assert latency(summarize(TWO_REQUESTS, failed=0, duration=2.0), "e2el").mean == pytest.approx((900 + 1500) / 2)


def test_throughputs_are_over_the_duration_of_the_run() -> None:
    metrics = summarize(TWO_REQUESTS, failed=0, duration=2.0)
    assert metrics.request_throughput == 1.0
    assert metrics.output_throughput == 5 / 2
    assert metrics.total_token_throughput == (5 + 12) / 2


def test_a_request_of_one_token_has_no_time_per_output_token() -> None:
    metrics = summarize([Timeline(0.0, [1.0], 3)], failed=0, duration=1.0)
    assert latency(metrics, "ttft").mean == 1000
    assert (metrics.latencies["tpot"], metrics.latencies["itl"]) == (None, None)
    assert metrics.as_json()["mean_tpot_ms"] is None


def test_nothing_completed_is_no_latency_and_no_throughput() -> None:
    fields = summarize([], failed=3, duration=1.0).as_json()
    assert (fields["completed"], fields["failed"], fields["output_throughput"]) == (0, 3, 0.0)
    assert fields["p99_ttft_ms"] is None


def test_json_has_vllms_field_names() -> None:
    latencies = {
        f"{figure}_{name}_ms" for figure in ("mean", "p50", "p90", "p99") for name in ("ttft", "tpot", "itl", "e2el")
    }
    assert set(summarize(TWO_REQUESTS, failed=0, duration=2.0).as_json()) == latencies | {
        "duration",
        "completed",
        "failed",
        "total_input_tokens",
        "total_output_tokens",
        "request_throughput",
        "output_throughput",
        "total_token_throughput",
    }


@given(TIMES, st.sampled_from([0, *PERCENTILES, 100]))
def test_percentiles_are_those_of_numpy(values: list[float], p: int) -> None:
    assert percentile(sorted(values), p) == pytest.approx(np.percentile(values, p))


@given(st.lists(TIMES.map(sorted), min_size=1, max_size=10))
def test_a_request_takes_its_first_token_and_then_its_gaps(requests: list[list[float]]) -> None:
    for times in requests:
        timeline = Timeline(0.0, times, 1)
        assert timeline.ttft + sum(timeline.itls) == pytest.approx(timeline.e2el)
        if timeline.tpot is not None:
            assert timeline.tpot == pytest.approx(statistics.fmean(timeline.itls))


# Workload


def test_prompts_are_of_one_length_and_have_no_excluded_token() -> None:
    prompts = Workload(num_prompts=20, input_len=30).prompts(vocab_size=10, excluded={0, 9})
    assert [len(prompt) for prompt in prompts] == [30] * 20
    assert {token for prompt in prompts for token in prompt} == set(range(1, 9))


def test_the_same_seed_gives_the_same_prompts_and_another_seed_others() -> None:
    first, again, other = (Workload(4, 16, seed=seed).prompts(1000, ()) for seed in (1, 1, 2))
    assert first == again != other


def test_warm_up_prompts_are_none_of_the_measured_ones() -> None:
    workload = Workload(8, 16)
    measured = workload.prompts(1000, ())
    assert not [prompt for prompt in workload.warm_up_prompts(8, 1000, ()) if prompt in measured]


@pytest.mark.parametrize("name", ["num_prompts", "input_len", "output_len"])
def test_nothing_to_do_is_a_usage_error_that_names_the_flag(name: str) -> None:
    with pytest.raises(LlmqError) as caught:
        Workload(**{name: 0})
    assert caught.value.exit_code == USAGE
    assert f"--{name.replace('_', '-')}" in (caught.value.hint or "")


# Running it


@dataclass
class Answer:
    """The part of a RequestOutput that a benchmark reads."""

    prompt_token_ids: list[int]
    completions: list[Any]
    arrival_time: float = 0.0
    error: LlmqError | None = None


@dataclass
class Times:
    token_times: list[float]


def test_a_refused_request_counts_as_failed_and_nowhere_else() -> None:
    outputs: Any = [Answer([1, 2], [Times([1.0, 2.0])]), Answer([1, 2], [], error=LlmqError("no room"))]
    metrics, errors = evaluate(outputs, output_len=2, duration=4.0)
    assert (metrics.completed, metrics.failed) == (1, 1)
    assert (metrics.total_input_tokens, metrics.total_output_tokens) == (2, 2)
    assert metrics.output_throughput == 0.5
    assert errors == ("no room",)


def test_a_request_that_ends_early_has_failed() -> None:
    outputs: Any = [Answer([1], [Times([1.0, 2.0])])]
    metrics, errors = evaluate(outputs, output_len=3, duration=1.0)
    assert (metrics.completed, metrics.failed, metrics.total_output_tokens) == (0, 1, 0)
    assert errors == ("ended after 2 of 3 tokens",)


@dataclass
class RecordingLLM:
    config: Any
    options: EngineOptions = field(default_factory=lambda: EngineOptions(max_num_batched_tokens=32))
    stats: str = "warm-up"
    calls: list[tuple[list[list[int]], SamplingParams]] = field(default_factory=list)

    def generate(self, prompts: list[list[int]], params: SamplingParams) -> list[Answer]:
        assert params.max_tokens is not None
        self.calls.append((prompts, params))
        return [Answer(prompt, [Times([1.0 + step for step in range(params.max_tokens)])]) for prompt in prompts]

    def reset_stats(self) -> None:
        self.stats = "measured"


def test_a_run_is_a_warm_up_on_other_prompts_and_then_fixed_greedy_work(tmp_path: Path) -> None:
    fields = {"vocab_size": 10, "bos_token_id": 1, "eos_token_id": [2, 3]}
    llm: Any = RecordingLLM(config_of(tmp_path, LLAMA_2_7B | fields))
    metrics, stats, errors = measure(llm, Workload(num_prompts=20, input_len=5, output_len=40))
    (warm_up, short), (prompts, params) = llm.calls
    assert len(prompts) == 20
    assert 32 < sum(map(len, warm_up)) < 32 + 2 * 5, "more than one step is filled, and not by a whole prompt"
    assert short.max_tokens < params.max_tokens == 40
    assert params.ignore_eos
    assert params.temperature == 0
    assert not {1, 2, 3} & {token for prompt in prompts + warm_up for token in prompt}
    assert (metrics.completed, metrics.total_output_tokens, errors) == (20, 800, ())
    assert stats == "measured"


# The command


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


SMALL = ("--num-prompts", 3, "--input-len", 20, "--output-len", 5, "--device", "cpu")


def test_json_tells_what_was_measured_on_what_and_by_which_definitions(tiny: Path) -> None:
    result = llmq("bench", "throughput", tiny, *SMALL, "--block-size", 16, "--json")
    report = json.loads(result.out)
    assert result.code == 0, result.err
    assert report["schema"] == "llmq.bench.throughput/1"
    assert (report["completed"], report["failed"], report["errors"]) == (3, 0, [])
    assert (report["total_input_tokens"], report["total_output_tokens"]) == (60, 15)
    assert (report["peak_kv_blocks"], report["preemptions"]) == (6, 0)
    assert report["peak_kv_usage"] == 6 / report["total_kv_blocks"]
    assert (report["model_id"], report["device"], report["dtype"]) == (str(tiny), "cpu", "float32")
    assert report["weights_bytes"] == 4 * (2 * 258 * 128 + 2 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 256 * 128) + 5 * 128)
    assert {"ttft", "tpot", "itl", "e2el"} <= set(report["definitions"])
    assert report["device_name"]
    assert report["torch"]
    assert 0 < report["mean_ttft_ms"] <= report["mean_e2el_ms"]


def test_the_table_opens_with_the_throughput(tiny: Path) -> None:
    result = llmq("bench", "throughput", tiny, *SMALL)
    assert result.code == 0, result.err
    assert "output tokens/s" in result.out.splitlines()[0]
    assert "…" not in result.out


def test_requests_that_fail_are_reported_and_fail_the_command(tiny: Path) -> None:
    """A KV cache of one block holds no request of 25 tokens."""
    result = llmq("bench", "throughput", tiny, *SMALL, "--block-size", 16, "--kv-cache-memory", "32KiB", "--json")
    report = json.loads(result.out)
    assert result.code == FAILED
    assert (report["completed"], report["failed"], report["output_throughput"]) == (0, 3, 0.0)
    assert "3 of 3 requests failed" in result.err


def test_a_workload_longer_than_the_context_is_refused_before_the_model_is_loaded(tiny: Path) -> None:
    result = llmq("bench", "throughput", tiny, "--input-len", 500, "--output-len", 13)
    assert result.code == USAGE
    assert "513" in result.err
    assert "512" in result.err
