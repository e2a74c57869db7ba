"""Load on servers: what they are asked, what is counted, and what becomes of failures."""

from __future__ import annotations

import asyncio
import json
import socket
from pathlib import Path
from typing import Any

import pytest
from command_line import Result, llmq
from serving import served
from stand_in import StandIn

from llmq.bench.http import parse_url
from llmq.errors import FAILED, USAGE

SMALL = ("--num-prompts", 4, "--input-len", 6, "--output-len", 5)


def bench(url: str, *flags: object) -> Result:
    return llmq("bench", "serve", url, *SMALL, *flags, "--json")


def report(result: Result, code: int = 0) -> dict[str, Any]:
    assert result.code == code, result.err
    return dict(json.loads(result.out))


# What the server is asked


def test_the_server_counts_the_tokens_and_pieces_are_timed() -> None:
    with StandIn(cached=3) as server:
        found = report(bench(server.url))
    assert found["schema"] == "llmq.bench.serve/1"
    assert (found["completed"], found["failed"], found["errors"]) == (4, 0, [])
    assert (found["total_input_tokens"], found["total_output_tokens"], found["cached_tokens"]) == (44, 20, 12)
    assert 0 < found["mean_ttft_ms"] <= found["mean_e2el_ms"] <= found["mean_scheduled_e2el_ms"]
    assert (found["model_id"], found["request_rate"], found["burstiness"]) == ("stand-in", "inf", 1.0)
    assert (found["backend"], found["num_prompts"], found["max_concurrency"]) == ("openai", 4, None)


def test_requests_are_greedy_streams_of_a_fixed_length() -> None:
    with StandIn() as server:
        report(bench(server.url))
    for body in server.bodies:
        assert (body["max_tokens"], body["temperature"], body["ignore_eos"]) == (5, 0.0, True)
        assert body["stream"]
        assert body["stream_options"] == {"include_usage": True}


def test_the_measured_requests_follow_as_many_others_of_the_same_shape() -> None:
    with StandIn() as server:
        report(bench(server.url, "--tokenizer", "demo"))
    others, measured = server.prompts[:4], server.prompts[4:]
    assert [len(prompt) for prompt in others] == [len(prompt) for prompt in measured] == [6] * 4
    assert not [prompt for prompt in others if prompt in measured]


def test_two_runs_with_one_seed_send_the_same_bytes_and_another_seed_sends_others() -> None:
    def sent(seed: int) -> list[str]:
        with StandIn() as server:
            report(bench(server.url, "--seed", seed, "--range-ratio", 0.5, "--max-concurrency", 1))
        return [json.dumps(body) for body in server.bodies]

    assert sent(1) == sent(1) != sent(2)


def test_prompts_are_token_ids_where_the_vocabulary_is_known_and_words_elsewhere() -> None:
    with StandIn(card={"root": "demo"}) as knows, StandIn() as unknown:
        report(bench(knows.url))
        report(bench(unknown.url))
    assert all(isinstance(token, int) for prompt in knows.prompts for token in prompt)
    assert all(len(prompt.split()) == 6 for prompt in unknown.prompts)


def test_chat_is_asked_with_messages() -> None:
    with StandIn() as server:
        found = report(bench(server.url, "--endpoint", "chat"))
    assert found["total_output_tokens"] == 20
    assert [[message["role"] for message in prompt] for prompt in server.prompts] == [["user"]] * 8


def test_files_of_prompts_are_sent_as_they_are(tmp_path: Path) -> None:
    lines = [{"prompt": "one two"}, {"prompt": [5, 6], "output_len": 2}]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with StandIn() as server:
        found = report(bench(server.url, "--dataset", "jsonl", "--dataset-path", tmp_path / "prompts.jsonl"))
    assert found["completed"] == 2
    assert sorted(map(str, server.prompts[2:])) == ["[5, 6]", "one two"]
    assert sorted(body["max_tokens"] for body in server.bodies[2:]) == [2, 5]


# What is counted


def test_without_usage_pieces_are_counted_and_the_prompt_by_its_length() -> None:
    with StandIn(usage=False) as server:
        found = report(bench(server.url))
    assert (found["total_input_tokens"], found["total_output_tokens"], found["cached_tokens"]) == (24, 20, None)


def test_counters_of_the_servers_metrics_say_what_was_cached_and_preempted() -> None:
    pages = [
        f'vllm:prefix_cache_hits_total{{model_name="m"}} {hits}.0\nvllm:num_preemptions_total{{model_name="m"}} {own}\n'
        for hits, own in ((100, 2), (164, 5))
    ]
    with StandIn(metrics=pages) as server:
        found = report(bench(server.url))
    assert (found["cached_tokens"], found["preemptions"]) == (64, 3)


def test_prompts_that_an_earlier_run_left_in_the_prefix_cache_are_warned_of() -> None:
    with StandIn(cached=3) as warm, StandIn(cached=0) as cold:
        assert "12 of 44 prompt tokens" in bench(warm.url).err
        assert "warning" not in bench(cold.url).err
        shared = ("--dataset", "prefix", "--prefix-len", 4)
        assert "warning" not in bench(warm.url, *shared).err, "they are meant to be"


def test_goodput_is_of_the_requests_within_the_limits() -> None:
    with StandIn() as server:
        found = report(bench(server.url, "--goodput", "ttft:60000 tpot:60000"))
        none = report(bench(server.url, "--goodput", "e2el:0.000001"))
    assert found["request_goodput"] == found["request_throughput"]
    assert none["request_goodput"] == 0


# What fails


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ({"refuse": {4, 5}}, "429: try later"),
        ({"cut": {4, 5}}, "the connection failed"),
    ],
    ids=["refused", "cut off"],
)
def test_failures_are_counted_and_named_and_fail_the_command(fault: dict[str, Any], reason: str) -> None:
    with StandIn(**fault) as server:
        result = bench(server.url)
    found = report(result, FAILED)
    assert (found["completed"], found["failed"], found["total_output_tokens"]) == (2, 2, 10)
    assert "2 of 4 requests failed" in result.err
    assert reason in result.err


def test_answers_that_end_early_fail_where_they_were_asked_not_to() -> None:
    with StandIn(short=2) as server:
        assert "ended after 3 of 5 tokens" in bench(server.url).err
        found = report(bench(server.url, "--no-ignore-eos"))
    assert (found["completed"], found["total_output_tokens"]) == (4, 12)
    assert "ignore_eos" not in server.bodies[-1]


def test_a_url_that_does_not_answer_is_an_error_with_a_hint() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        result = bench(f"http://127.0.0.1:{taken.getsockname()[1]}")
    assert (result.code, result.out) == (FAILED, "")
    assert "does not answer" in result.err
    assert "hint: " in result.err


def test_an_address_of_ipv6_is_told_in_brackets() -> None:
    with socket.socket(socket.AF_INET6) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:
            pytest.skip("no IPv6 here")
    heads = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        writer.close()

    async def ask() -> str:
        async with await asyncio.start_server(answer, "::1", 0) as server:
            address = f"[::1]:{server.sockets[0].getsockname()[1]}"
            async with parse_url(f"http://{address}").request("/") as response:
                await response.whole()
        return address

    address = asyncio.run(ask())
    assert f"Host: {address}\r\n".encode() in heads[0]


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host", "http://host:port", "http://"])
def test_what_is_no_url_is_a_usage_error(url: str) -> None:
    assert bench(url).code == USAGE


def test_tokens_are_nothing_to_chat_with() -> None:
    with StandIn() as server:
        assert bench(server.url, "--endpoint", "chat", "--tokenizer", "demo").code == USAGE
    assert not server.bodies


def test_a_model_that_is_not_served_is_named() -> None:
    with StandIn() as server:
        result = bench(server.url, "--model", "other")
    assert result.code == FAILED
    assert "other" in result.err
    assert "stand-in" in result.err
    assert not server.bodies


def test_what_does_not_fit_the_context_is_refused_before_anything_is_sent() -> None:
    with StandIn(card={"root": "demo", "max_model_len": 10}) as server:
        result = bench(server.url)
    assert result.code == USAGE
    assert "6 tokens in and 5 out" in result.err
    assert not server.bodies


def test_zero_prompts_are_a_usage_error() -> None:
    assert llmq("bench", "serve", "http://127.0.0.1:1", "--num-prompts", 0).code == USAGE


# Beside another server, and at many rates


def test_a_peer_has_its_turn_after_ours_with_the_same_requests() -> None:
    with StandIn() as ours, StandIn() as theirs:
        found = report(bench(ours.url, "--peer", theirs.url))
    assert [len(server.bodies) for server in (ours, theirs)] == [4 + 4 + 3 * 4, 4 + 3 * 4]
    assert sorted(map(str, ours.prompts[8:])) == sorted(map(str, theirs.prompts[4:]))
    assert len(set(map(str, theirs.prompts))) == 16, "fresh prompts each time"
    assert {"output_throughput", "mean_ttft_ms"} <= set(found["peer"]["ratios"])
    assert len(found["peer"]["rounds"]) == 3


def test_a_sweep_of_rates_gives_every_one_fresh_prompts_and_marks_the_knee() -> None:
    with StandIn() as server:
        flags = ("--request-rates", "400,20,200", *SMALL, "--burstiness", "inf", "--json")
        found = report(llmq("bench", "sweep", server.url, *flags))
    assert [cell["request_rate"] for cell in found["cells"]] == [20, 200, 400]
    assert len(set(map(str, server.prompts))) == 3 * (4 + 4), "and others to warm up"
    assert found["knee"] in (None, 20, 200, 400)
    assert (found["axis"], found["cells"][0]["completed"]) == ("request_rate", 4)


def test_our_own_server_under_load(tmp_path: Path) -> None:
    """The whole way: prompts of the model's own tokens, counted by its usage, its metrics, its table."""
    with served("demo") as server:
        result = llmq("bench", "serve", server.url, *SMALL, "--request-rate", 50, "-o", tmp_path / "report.json")
        shared = ("--dataset", "prefix", "--num-prefixes", 1, "--input-len", 70, "--prefix-len", 64)
        cached = report(bench(server.url, *shared, "--max-concurrency", 1))
    assert result.code == 0, result.err
    assert "output tokens/s" in result.out.splitlines()[0]
    assert max(map(len, result.out.splitlines())) <= 100
    found = json.loads((tmp_path / "report.json").read_text())
    assert (found["completed"], found["total_input_tokens"], found["total_output_tokens"]) == (4, 24, 20)
    assert (found["cached_tokens"], found["preemptions"]) == (0, 0)
    assert cached["cached_tokens"] == 3 * 64, "what the second to the fourth share with the first"
