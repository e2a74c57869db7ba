"""Benchmark metrics on timelines made by hand, prompts, and what a failure does to a report."""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from command_line import llmq
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import save_tiny

from llmq.bench.engine import Subject, evaluate
from llmq.bench.metrics import (
    PERCENTILES,
    Distribution,
    Goodput,
    Metrics,
    Timeline,
    parse_goodput,
    percentile,
    summarize,
)
from llmq.bench.peers import Vllm
from llmq.bench.workload import Item, Vocabulary, Workload, prompt_len, warm_up
from llmq.engine.options import EngineOptions
from llmq.errors import CHECK_FAILED, FAILED, USAGE, LlmqError

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
        f"{figure}_{name}_ms"
        for figure in ("mean", "median", "std", "p50", "p90", "p95", "p99")
        for name in ("ttft", "tpot", "itl", "e2el")
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
        "cached_tokens",
        "request_goodput",
        "max_concurrent_requests",
    }


def test_deviation_is_numpys() -> None:
    ttft = latency(summarize(TWO_REQUESTS, failed=0, duration=2.0), "ttft")
    assert ttft.std == pytest.approx(np.std([500, 1000]))


def test_a_request_sent_late_has_latencies_from_both_times() -> None:
    late = Timeline(arrival=1.0, sent=3.0, token_times=[3.5, 4.0], input_tokens=1)
    latencies = summarize([late], failed=0, duration=3.0).latencies
    means = {name: found.mean for name, found in latencies.items() if found is not None}
    assert (means["ttft"], means["e2el"]) == (500, 1000)
    assert (means["scheduled_ttft"], means["scheduled_e2el"]) == (2500, 3000)


def test_pieces_of_several_tokens_count_as_many_tokens_as_the_server_says() -> None:
    pieces = Timeline(0.0, [1.0, 2.0], 5, output_tokens=11)
    metrics = summarize([pieces], failed=0, duration=2.0)
    assert metrics.total_output_tokens == 11
    assert latency(metrics, "tpot").mean == pytest.approx(100)
    assert latency(metrics, "itl").mean == 1000, "between pieces"


def test_the_most_requests_at_once_are_counted_from_send_to_end() -> None:
    timelines = [Timeline(0, [ends], 1, sent=begins) for begins, ends in ((0, 2), (1, 4), (2, 3), (4, 5))]
    assert summarize(timelines, failed=0, duration=5).max_concurrent_requests == 2


@pytest.mark.parametrize(
    ("limits", "good"), [({"ttft": 500}, 1), ({"tpot": 499}, 1), ({"e2el": 1500}, 2), ({"ttft": 1000, "tpot": 100}, 0)]
)
def test_goodput_counts_the_requests_that_keep_all_limits(limits: dict[str, float], good: int) -> None:
    metrics = summarize(TWO_REQUESTS, failed=1, duration=2.0, goodput=Goodput(**limits))
    assert (metrics.good, metrics.request_goodput) == (good, good / 2)


def test_a_request_of_one_token_keeps_any_limit_on_the_time_between_tokens() -> None:
    assert Goodput(tpot=1).met_by(Timeline(0.0, [1.0], 3))


def test_limits_are_read_with_spaces_or_commas_between() -> None:
    assert parse_goodput("ttft:200 tpot:50") == parse_goodput("tpot:50,ttft:200") == Goodput(ttft=200, tpot=50)


@pytest.mark.parametrize("text", ["", "ttft", "ttft:fast", "itl:5", "ttft:0", "ttft:nan"])
def test_what_is_no_limit_is_a_usage_error(text: str) -> None:
    with pytest.raises(LlmqError) as caught:
        parse_goodput(text)
    assert caught.value.exit_code == USAGE


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

TEN = Vocabulary(10, frozenset({0, 9}))
THOUSAND = Vocabulary(1000)


def tokens(items: list[Item]) -> list[list[int]]:
    return [list(item.prompt) for item in items]  # type: ignore[arg-type]


def test_prompts_are_of_one_length_and_have_no_special_token() -> None:
    prompts = tokens(Workload(num_prompts=20, input_len=30).drawn(TEN))
    assert [len(prompt) for prompt in prompts] == [30] * 20
    assert {token for prompt in prompts for token in prompt} == set(range(1, 9))


def test_the_same_seed_gives_the_same_prompts_and_another_seed_others() -> None:
    first, again, other = (Workload(4, 16, seed=seed).drawn(THOUSAND) for seed in (1, 1, 2))
    assert first == again != other


def test_no_two_measurements_have_a_prompt_in_common() -> None:
    workload = Workload(8, 16)
    drawn = [prompt for cell in range(4) for prompt in tokens(workload.drawn(THOUSAND, cell))]
    assert len(set(map(tuple, drawn))) == 8 * 4


@pytest.mark.parametrize("vocabulary", [THOUSAND, None])
def test_warm_up_prompts_are_others_of_the_same_lengths(vocabulary: Vocabulary | None) -> None:
    measured = Workload(8, 16, range_ratio=0.5).drawn(vocabulary)
    others = warm_up(measured, vocabulary, seed=0)
    assert [prompt_len(item, vocabulary) for item in others] == [prompt_len(item, vocabulary) for item in measured]
    assert [item.output_len for item in others] == [item.output_len for item in measured]
    assert others != warm_up(measured, vocabulary, seed=0, cell=1)
    assert not {str(item.prompt) for item in others} & {str(item.prompt) for item in measured}


@given(st.integers(1, 50), st.floats(0, 0.99), st.integers(0, 99))
def test_lengths_stay_within_the_ratio(length: int, ratio: float, seed: int) -> None:
    drawn = Workload(20, length, length, seed, range_ratio=ratio).drawn(THOUSAND)
    bounds = length * (1 - ratio) - 1e-9, length * (1 + ratio) + 1e-9
    for item in drawn:
        assert bounds[0] <= item.output_len <= bounds[1]
        assert bounds[0] <= prompt_len(item, THOUSAND) <= bounds[1]


def test_prefixes_are_shared_within_a_measurement_and_with_no_other() -> None:
    workload = Workload(12, 20, dataset="prefix", num_prefixes=3, prefix_len=15)
    first, second = ({tuple(prompt[:15]) for prompt in tokens(workload.drawn(THOUSAND, cell))} for cell in (0, 1))
    assert (len(first), len(second)) == (3, 3)
    assert not first & second
    assert len({tuple(prompt) for prompt in tokens(workload.drawn(THOUSAND))}) == 12


def test_without_a_vocabulary_prompts_are_words() -> None:
    (item,) = Workload(1, 30).drawn(None)
    assert isinstance(item.prompt, str)
    assert prompt_len(item, None) == len(item.prompt.split()) == 30


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

    index: int
    prompt_token_ids: list[int]
    completions: list[Any]
    arrival_time: float = 0.0
    error: LlmqError | None = None


@dataclass
class Times:
    token_times: list[float]


def test_a_refused_request_counts_as_failed_and_nowhere_else() -> None:
    outputs: Any = [Answer(0, [1, 2], [Times([1.0, 2.0])]), Answer(1, [1, 2], [], error=LlmqError("no room"))]
    metrics, errors = evaluate(outputs, [Item([1, 2], 2)] * 2, duration=4.0)
    assert (metrics.completed, metrics.failed) == (1, 1)
    assert (metrics.total_input_tokens, metrics.total_output_tokens) == (2, 2)
    assert metrics.output_throughput == 0.5
    assert errors == ("no room",)


def test_a_request_that_ends_early_has_failed() -> None:
    outputs: Any = [Answer(0, [1], [Times([1.0, 2.0])])]
    metrics, errors = evaluate(outputs, [Item([1], 3)], duration=1.0)
    assert (metrics.completed, metrics.failed, metrics.total_output_tokens) == (0, 1, 0)
    assert errors == ("ended after 2 of 3 tokens",)


# The command


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


SMALL = ("--num-prompts", 3, "--input-len", 20, "--output-len", 5, "--device", "cpu")


def test_json_tells_what_was_measured_on_what_and_by_which_definitions(tiny: Path) -> None:
    result = llmq("bench", "throughput", tiny, *SMALL, "--block-size", 16, "--json")
    report = json.loads(result.out)
    assert result.code == 0, result.err
    assert report["schema"] == "llmq.bench.throughput/2"
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


def test_a_workload_that_the_kv_cache_cannot_hold_is_refused_before_it_is_measured(tiny: Path) -> None:
    """A KV cache of one block holds no request of 25 tokens."""
    result = llmq("bench", "throughput", tiny, *SMALL, "--block-size", 16, "--kv-cache-memory", "32KiB", "--json")
    assert (result.code, result.out) == (CHECK_FAILED, "")
    assert "--kv-cache-memory" in result.err


def test_memory_is_told_as_planned_and_as_measured(tiny: Path) -> None:
    """Three sequences of 25 tokens take two blocks of 16 each, and nothing else is in the cache."""
    memory = json.loads(llmq("bench", "throughput", tiny, *SMALL, "--block-size", 16, "--json").out)["memory"]
    assert memory["weights"]["predicted"] == memory["weights"]["measured"] > 0
    assert memory["KV cache, at most"]["predicted"] == memory["KV cache, at most"]["measured"] > 0


def test_preempted_requests_are_told_with_those_of_them_that_were_swapped_out(tiny: Path, tmp_path: Path) -> None:
    """Three sequences grow to three blocks each, and there are eight. Requests are swapped out, each of many blocks."""
    flags = ("--output-len", 20, "--block-size", 16, "--kv-cache-memory", "128KiB", "--swap-space", 0.1)
    file = tmp_path / "report.json"
    result = llmq("bench", "throughput", tiny, *SMALL, *flags, "--preemption", "swap", "--output", file)
    report = json.loads(file.read_text())
    assert report["preemptions"] >= report["swapped_out"] > 0
    told = next(line for line in result.out.splitlines() if line.startswith("preemptions"))
    assert told.split(maxsplit=1)[1] == f"{report['preemptions']}, {report['swapped_out']} of them swapped out"


def test_every_line_of_memory_is_told_with_what_it_is_off_by(tiny: Path) -> None:
    lines = llmq("bench", "throughput", tiny, *SMALL).out.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("memory"))
    assert lines[start].split() == ["memory", "predicted", "measured", "off", "by"]
    assert [line.split()[-1] for line in lines[start + 1 :]] == ["exact", "exact"]


def test_what_the_prefix_cache_had_is_told(tiny: Path) -> None:
    flags = ("--dataset", "prefix", "--num-prefixes", 1, "--input-len", 40, "--prefix-len", 32, "--max-num-seqs", 1)
    report = json.loads(llmq("bench", "throughput", tiny, *SMALL, *flags, "--block-size", 16, "--json").out)
    assert report["cached_tokens"] == 2 * 32, "of the second and the third prompt"


def test_every_measured_prompt_is_new_to_the_prefix_cache(tiny: Path) -> None:
    report = json.loads(llmq("bench", "throughput", tiny, *SMALL, "--block-size", 16, "--json").out)
    assert report["cached_tokens"] == 0


def test_transformers_runs_the_same_in_turns(tiny: Path) -> None:
    result = llmq("bench", "throughput", tiny, *SMALL, "--peer", "transformers", "--json")
    peer = json.loads(result.out)["peer"]
    assert peer["name"] == "transformers"
    assert peer["version"]
    for ours, theirs in ((one["llmq"], one["peer"]) for one in peer["rounds"]):
        assert ours["output_throughput"] > 0
        assert theirs["output_throughput"] > 0
    ratios = [one["llmq"]["output_throughput"] / one["peer"]["output_throughput"] for one in peer["rounds"]]
    assert peer["ratios"]["output_throughput"] == statistics.median(ratios)


@pytest.mark.parametrize(("peer", "code"), [("vllm", FAILED), ("tgi", USAGE), ("http://127.0.0.1:1", FAILED)])
def test_a_peer_that_is_not_there_is_an_error_with_a_hint(tiny: Path, peer: str, code: int) -> None:
    result = llmq("bench", "throughput", tiny, *SMALL, "--peer", peer)
    assert (result.code, result.out) == (code, "")
    assert "hint: " in result.err


class FakeVllm:
    """As much of vLLM as is called: this machine has none. Every answer has as many tokens as were asked for."""

    SamplingParams = staticmethod(dict)

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def LLM(self, model: str, **options: Any) -> FakeVllm:
        self.calls.append((model, options))
        return self

    def generate(self, prompts: list[Any], params: list[Any], *, use_tqdm: bool) -> list[Any]:
        self.calls.append((prompts, params))
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=[0] * one["max_tokens"])]) for one in params]


def test_vllm_is_asked_for_the_same_tokens_greedily(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeVllm()
    monkeypatch.setitem(sys.modules, "vllm", fake)
    workload = Workload(2, 4, 3)
    subject = Subject(str(tiny), [workload], revision=None, dtype="auto", device="cpu", options=EngineOptions())
    figures = Vllm(subject).run(subject.items(workload))
    (model, options), (prompts, params) = fake.calls
    assert (model, options["dtype"], options["load_format"]) == (str(tiny), "float32", "auto")
    assert [prompt["prompt_token_ids"] for prompt in prompts] == tokens(subject.items(workload))
    assert [(one["max_tokens"], one["temperature"], one["ignore_eos"]) for one in params] == [(3, 0.0, True)] * 2
    assert figures["output_throughput"] > 0


def test_a_peer_that_finds_no_room_says_so_and_how_to_leave_it_some(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ValueError("Free memory on device is less than desired GPU memory utilization.\nAnd more.")

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=refuse, SamplingParams=dict))
    workload = Workload(2, 4, 3)
    subject = Subject(str(tiny), [workload], revision=None, dtype="auto", device="cpu", options=EngineOptions())
    with pytest.raises(LlmqError, match="vllm cannot run the model: Free memory on device") as caught:
        Vllm(subject)
    assert "--gpu-memory-utilization" in (caught.value.hint or "")


def test_latency_is_that_of_whole_batches(tiny: Path) -> None:
    flags = ("--batch-size", 2, "--input-len", 8, "--output-len", 4, "--iterations", 3, "--device", "cpu")
    report = json.loads(llmq("bench", "latency", tiny, *flags, "--json").out)
    assert (report["schema"], report["batch_size"], len(report["latencies"])) == ("llmq.bench.latency/1", 2, 3)
    assert report["avg_latency"] == pytest.approx(statistics.fmean(report["latencies"]))
    assert report["percentiles"]["50"] == statistics.median(report["latencies"])
    assert report["output_throughput"] == pytest.approx(3 * 2 * 4 / sum(report["latencies"]))
    assert 0 < report["mean_ttft_ms"] < 1000 * report["avg_latency"]


@pytest.mark.parametrize("command", ["latency", "throughput", "sweep"])
def test_a_report_that_cannot_be_written_is_refused_before_anything_is_measured(
    tiny: Path, tmp_path: Path, command: str
) -> None:
    for path in (tmp_path, tmp_path / "none" / "report.json"):
        result = llmq("bench", command, tiny, "-o", path)
        assert (result.code, result.out) == (USAGE, "")
        assert "cannot be written" in result.err


def test_a_disk_that_fills_meanwhile_costs_the_file_and_not_the_report(tiny: Path) -> None:
    result = llmq("bench", "throughput", tiny, *SMALL, "--json", "-o", "/dev/full")
    assert result.code == FAILED
    assert json.loads(result.out)["completed"] == 3
    assert "error: /dev/full cannot be written: No space left on device" in result.err


def test_tables_are_at_most_100_columns_wide(tiny: Path) -> None:
    for command in ("throughput", "latency"):
        flags = SMALL[2:] if command == "latency" else SMALL
        printed = llmq("bench", command, tiny, *flags).out
        assert max(map(len, printed.splitlines())) <= 100


def test_a_workload_longer_than_the_context_is_refused_before_the_model_is_loaded(tiny: Path) -> None:
    result = llmq("bench", "throughput", tiny, "--input-len", 500, "--output-len", 13)
    assert result.code == USAGE
    assert "513" in result.err
    assert "512" in result.err
