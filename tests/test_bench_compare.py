"""Schemes side by side: the figures by hand, the sentence by its rules, and the whole on a tiny model."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from command_line import llmq
from hypothesis import given
from hypothesis import strategies as st
from stand_in import StandIn
from tiny_models import save_tiny

from llmq.bench.candidates import WORKLOADS, workload_of
from llmq.bench.compare import bench_compare
from llmq.bench.compare_report import CompareReport, Row, Speeds, crossover
from llmq.bench.engine import Run, Setup
from llmq.bench.metrics import Timeline, summarize
from llmq.bench.staircase import STEPS, decode_speeds, output_lengths
from llmq.bench.workload import Workload
from llmq.engine.options import EngineOptions
from llmq.engine.scheduler import EngineStats
from llmq.errors import CHECK_FAILED, FAILED, USAGE, LlmqError
from llmq.evals.divergence import Comparison, Figure
from llmq.evals.perplexity import Perplexity

# Decode speed at many sizes from one batch


def test_sequences_end_in_turns_so_that_each_size_has_its_steps() -> None:
    assert output_lengths([1, 2, 4], lead=3) == [3 + STEPS] * 2 + [3 + 2 * STEPS] + [3 + 3 * STEPS]


@given(st.sets(st.integers(1, 64), min_size=1, max_size=6), st.integers(0, 5))
def test_at_every_moment_one_of_the_sizes_runs(sizes: set[int], lead: int) -> None:
    lengths = output_lengths(sorted(sizes), lead)
    assert {sum(length > step for length in lengths) for step in range(max(lengths))} == sizes


def test_a_size_is_as_fast_as_its_median_step() -> None:
    """Two sequences for four steps of 1 s, one of them for three more of 0.5 s, one of which was held up."""
    both = [0.0, 1.0, 2.0, 3.0, 4.0]
    alone = [*both, 4.5, 5.0, 9.0]
    assert decode_speeds([both, alone], [1, 2]) == pytest.approx({2: 2 / 1.0, 1: 1 / 2.25})


def test_steps_before_all_prompts_are_computed_count_for_no_size() -> None:
    first, second = [0.0, 7.0, 8.0, 9.0], [7.0, 8.0, 9.0]
    assert decode_speeds([first, second], [2]) == {2: 2.0}


def test_a_batch_that_never_ran_whole_is_an_error() -> None:
    with pytest.raises(LlmqError, match="2 sequences never ran at once"):
        decode_speeds([[0.0, 1.0, 2.0], [5.0, 6.0]], [1, 2])


# Crossovers


def test_a_crossover_lies_between_two_batches_on_a_line_of_logarithms() -> None:
    assert crossover([1, 4, 16], [0.5, 0.5, 2.0]) == pytest.approx(8.0)
    assert crossover([1, 4, 16], [0.8, 1.0, 1.2]) == pytest.approx(4.0)


def test_it_is_the_last_one_after_which_nothing_changes() -> None:
    assert crossover([1, 2, 4, 8], [1.1, 0.9, 0.5, 2.0]) == pytest.approx(4 * 2**0.5)


def test_who_is_behind_at_the_end_never_overtook_and_who_never_was_did_from_the_start() -> None:
    assert crossover([1, 2, 4], [0.5, 1.5, 0.9]) is None
    assert crossover([1, 2, 4], [1.5, 1.0, 1.2]) == 1


@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=7))
def test_a_crossover_is_among_the_measured_batches(ratios: list[float]) -> None:
    batches = [2**power for power in range(len(ratios))]
    found = crossover(batches, ratios)
    if found is not None:
        assert batches[0] <= found <= batches[-1]
        for (before, one), (after, two) in pairwise(zip(batches, ratios, strict=True)):
            if one < 1 <= two and before <= found <= after:
                break
        else:
            assert found == 1


# The report


def perplexity(value: float) -> Perplexity:
    return Perplexity(value, (value, value), 100, 1, 101, 1.0, "m", "t", "cpu", "float32")


def quality(increase: float, kl: float) -> Comparison:
    figures = (Figure(value, (value, value)) for value in (increase, kl, kl, 0.9))
    return Comparison(perplexity(6.0), *figures)


def run(duration: float) -> Run:
    """100 tokens in so many seconds."""
    metrics = summarize(
        [Timeline(0.0, [duration * step / 100 for step in range(1, 101)], 5)], failed=0, duration=duration
    )
    return Run(metrics, EngineStats(total_blocks=1), (), None)


def report(*rows: tuple[str, int, list[float], float, Comparison | None]) -> CompareReport:
    """(scheme, weights, decode speed at 1, 4, 16, seconds that the workload took, quality)"""
    made = tuple(
        Row(name, weights, None, (Speeds(1.0, dict(zip((1, 4, 16), decode, strict=True)), run(seconds)),), judged)
        for name, weights, decode, seconds, judged in rows
    )
    setup = Setup("m", 0, "bfloat16", "cpu", {"device_name": "a CPU"}, EngineOptions())
    return CompareReport(setup, "chat", Workload(), True, made)


BF16 = ("bf16", 2**34, [100.0, 400.0, 1600.0], 10.0, None)


def test_the_fastest_that_keeps_its_quality_is_recommended_and_reasons_are_given() -> None:
    found = report(
        BF16,
        ("w8a8", 2**33, [150.0, 620.0, 2600.0], 6.0, quality(0.005, 0.004)),
        ("w4a16", 2**32, [200.0, 640.0, 1500.0], 5.0, quality(0.2, 0.3)),
    )
    sentence = found.recommendation
    assert sentence.startswith("take w8a8 on chat: 1.67 × the output tokens/s of bf16, with weights of 8.00 GiB")
    assert "perplexity +0.5%, KL 0.0040" in sentence
    assert "w4a16 costs +20.0% perplexity at 1.20 × its speed" in sentence
    assert "w4a16 is the smallest, 4.00 GiB, and faster below 4 sequences at once" in sentence
    assert found.crossovers["w8a8", "w4a16"] == pytest.approx(4 * 4 ** (0.03175 / 0.58173), rel=1e-3)


def test_nothing_faster_that_keeps_its_quality_is_no_reason_to_change() -> None:
    found = report(BF16, ("w4a16", 2**32, [200.0, 640.0, 1500.0], 5.0, quality(0.2, 0.3)))
    assert found.recommendation.startswith("stay with bf16 on chat")


def test_without_quality_speed_decides_and_the_sentence_says_so() -> None:
    found = report(BF16, ("w4a16", 2**32, [200.0, 640.0, 1500.0], 5.0, None))
    assert found.recommendation.startswith("take w4a16")
    assert found.recommendation.endswith("quality was not measured")


def test_ratios_are_medians_of_the_ratios_within_rounds() -> None:
    """A machine that slows down twofold from round to round changes no ratio."""
    slow = [Speeds(speed, {1: speed}, run(1 / speed)) for speed in (4.0, 2.0, 1.0)]
    fast = [Speeds(2 * speed, {1: 2 * speed}, run(1 / (2 * speed))) for speed in (4.0, 2.0, 1.0)]
    rows = (Row("bf16", 1, None, tuple(slow), None), Row("w8a8", 1, None, tuple(fast), None))
    found = CompareReport(report(BF16).setup, "chat", Workload(), True, rows)
    assert found.ratio("w8a8", "bf16", lambda speeds: speeds.prefill) == 2.0
    assert found.decode_ratio("w8a8", "bf16", 1) == 2.0


def test_energy_is_that_of_the_workload_a_token_and_the_median_over_rounds() -> None:
    """Of 100 tokens."""
    rounds = tuple(Speeds(1.0, {1: 1.0}, replace(run(1.0), joules=joules)) for joules in (500.0, 10.0, 20.0))
    assert Row("bf16", 1, None, rounds, None).joules_per_token == pytest.approx(0.2)
    assert Row("bf16", 1, None, (Speeds(1.0, {1: 1.0}, run(1.0)),), None).joules_per_token is None


# The command


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"), dtype="bfloat16")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    (folder / "text.txt").write_text("".join(chr(32 + number * 37 % 90) for number in range(1200)))
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": "a" * length}) + "\n" for length in (20, 30)))
    return folder


def compare(model: Path, texts: Path, *more: object) -> Any:
    arguments = ("--workload", texts / "prompts.jsonl", "--num-prompts", 2, "--batch-sizes", "1,3", "--rounds", 1)
    return llmq("bench", "compare", model, *arguments, "--device", "cpu", *more)


def test_all_schemes_are_made_measured_and_judged(model: Path, texts: Path, tmp_path: Path) -> None:
    result = compare(model, texts, "--data", texts / "text.txt", "--output", tmp_path / "c.json")
    assert result.code == 0, result.err
    assert max(map(len, result.out.splitlines()[1:])) <= 100
    found = json.loads((tmp_path / "c.json").read_text())
    assert found["schema"] == "llmq.bench.compare/1"
    rows = {row["scheme"]: row for row in found["schemes"]}
    assert list(rows) == ["bf16", "w8a8", "fp8", "w4a16"]
    assert rows["w4a16"]["weights_bytes"] < rows["w8a8"]["weights_bytes"] < rows["bf16"]["weights_bytes"]
    assert rows["bf16"]["quality"] is None
    assert 0 < rows["w8a8"]["quality"]["kl"] < rows["w4a16"]["quality"]["kl"]
    for row in rows.values():
        assert row["rounds"][0]["completed"] == 2
        assert min(row["prefill_throughput"], *row["decode_throughput"].values(), row["output_throughput"]) > 0
        assert list(row["decode_throughput"]) == ["1", "3"]


def test_a_file_with_fewer_prompts_than_asked_for_is_counted_as_it_is(model: Path, texts: Path) -> None:
    printed = compare(model, texts, "--num-prompts", 5, "--schemes", "bf16", "--batch-sizes", 1).out
    assert "\n2 requests, all there at the start" in printed


def test_requests_of_every_round_fit_though_their_lengths_are_drawn_anew(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(WORKLOADS, "spread", Workload(input_len=20, output_len=10, range_ratio=0.9))
    sizes = ("--workload", "spread", "--num-prompts", 2, "--batch-sizes", 1, "--rounds", 4, "--schemes", "bf16")
    result = llmq("bench", "compare", model, *sizes, "--device", "cpu", "--json")
    assert result.code == 0, result.err
    assert [one["completed"] for one in json.loads(result.out)["schemes"][0]["rounds"]] == [2] * 4


def test_dummy_weights_have_speed_and_size_but_no_quality(model: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "config.json").write_text((model / "config.json").read_text())
    (tmp_path / "ids.jsonl").write_text('{"prompt": [5, 6, 7], "output_len": 4}\n')
    arguments = ("--workload", tmp_path / "ids.jsonl", "--num-prompts", 1, "--batch-sizes", 1, "--rounds", 1)
    more = ("--schemes", "bf16,w4a16", "--load-format", "dummy", "--device", "cpu", "--json")
    result = llmq("bench", "compare", alone, *arguments, *more)
    assert result.code == 0, result.err
    rows = json.loads(result.out)["schemes"]
    assert [row["quality"] for row in rows] == [None, None]
    assert rows[1]["weights_bytes"] < rows[0]["weights_bytes"]
    judged = llmq("bench", "compare", alone, *arguments, *more, "--data", tmp_path / "text.txt")
    assert (judged.code, judged.out) == (USAGE, "")
    assert "no quality to measure" in judged.err


def test_a_scheme_is_taken_from_its_folder(model: Path, texts: Path, tmp_path: Path) -> None:
    assert llmq("quantize", model, "-o", tmp_path / "w8", "--method", "rtn", "--bits", 8).code == 0
    more = ("--schemes", "bf16,w4a16", "--folder", f"w4a16={tmp_path / 'w8'}", "--data", texts / "text.txt", "--json")
    rows = json.loads(compare(model, texts, *more).out)["schemes"]
    assert rows[1]["quality"]["kl"] < 1e-2


def test_a_peer_runs_the_workload_in_turns_with_the_schemes(model: Path, texts: Path, tmp_path: Path) -> None:
    more = ("--schemes", "bf16,w8a8", "--peer", "transformers", "--rounds", 2, "-o", tmp_path / "c.json")
    result = compare(model, texts, *more)
    assert result.code == 0, result.err
    assert "output_throughput / the peer's" in result.out
    rows = json.loads((tmp_path / "c.json").read_text())["schemes"]
    assert [row["peer"]["name"] for row in rows] == ["transformers"] * 2
    for row in rows:
        pairs = zip(row["rounds"], row["peer"]["rounds"], strict=True)
        ratios = [ours["output_throughput"] / theirs["peer"]["output_throughput"] for ours, theirs in pairs]
        assert row["peer"]["ratios"] == {"output_throughput": pytest.approx(sum(ratios) / 2)}
    theirs = [[pair["peer"] for pair in row["peer"]["rounds"]] for row in rows]
    assert theirs[0] == theirs[1]


def test_a_server_is_sent_what_the_schemes_run(model: Path, texts: Path) -> None:
    with StandIn() as server:
        result = compare(model, texts, "--schemes", "bf16", "--peer", server.url, "--json")
    assert result.code == 0, result.err
    assert {"output_throughput", "mean_ttft_ms"} <= set(json.loads(result.out)["schemes"][0]["peer"]["ratios"])
    assert [body["max_tokens"] for body in server.bodies] == [128, 128] * 2, "to warm up, and in the round"


def test_a_peer_that_is_not_there_is_refused_before_anything_is_made(model: Path) -> None:
    for command in ("compare", "batching"):
        for peer in ("vllm", "http://127.0.0.1:1"):
            result = llmq("bench", command, model, "--peer", peer, "--device", "cpu")
            assert (result.code, result.out) == (FAILED, "")
            assert "hint: " in result.err


def test_a_peer_that_does_not_fit_beside_the_schemes_is_refused(
    model: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmq.bench.compare._Load.fit_together", lambda *_: False)
    result = compare(model, texts, "--schemes", "bf16,w8a8", "--peer", "transformers")
    assert (result.code, result.out) == (CHECK_FAILED, "")
    assert "bf16, w8a8 and transformers do not fit the GPU side by side" in result.err


def test_a_picture_is_drawn(model: Path, texts: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = compare(model, texts, "--schemes", "bf16,w8a8", "--plot", tmp_path / "c.png")
    assert result.code == 0, result.err
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (("--schemes", "bf16,w5"), "no scheme 'w5'"),
        (("--workload", "gossip"), "no workload 'gossip'"),
        (("--workload", "rag"), "and the model's context is 512"),
        (("--batch-sizes", "one"), "no list of whole numbers"),
        (("--batch-sizes", "0,1"), "no list of whole numbers above 0"),
        (("--rounds", "0"), "nothing to measure"),
        (("--folder", "w4a16"), "is no scheme and folder"),
        (("--folder", "w4a16=/nowhere"), "/nowhere is no model folder"),
        (("--plot", "/nowhere/c.png"), "there is no folder /nowhere"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_what_cannot_be_measured_is_refused_before_anything_is_made(
    model: Path, more: tuple[str, ...], reason: str
) -> None:
    result = llmq("bench", "compare", model, "--device", "cpu", *more)
    assert result.code == USAGE
    assert reason in result.err


def test_a_text_that_cannot_be_read_is_found_before_anything_is_made(model: Path, texts: Path) -> None:
    told: list[tuple[int, int]] = []
    prompts, text = str(texts / "prompts.jsonl"), str(texts / "none.txt")
    with pytest.raises(LlmqError, match="none.txt cannot be read"):
        bench_compare(str(model), workload=prompts, data=text, progress=lambda *seen: told.append(seen))
    assert told == []


def test_workloads_by_name_have_the_lengths_that_they_are_known_by() -> None:
    chat = workload_of("chat", 5, 3)
    assert (chat.input_len, chat.output_len, chat.num_prompts, chat.seed) == (512, 256, 5, 3)
    assert set(WORKLOADS) == {"chat", "rag", "batch"}
