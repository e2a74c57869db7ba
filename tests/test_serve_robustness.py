"""What clients do to a server, and what ends it: the right status, OpenAI's error object, and nothing left behind."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from command_line import llmq
from serving import PATIENCE, Server, served
from tiny_models import save_tiny

from llmq import LLM, SamplingParams
from llmq.errors import LlmqError
from llmq.serve import http, middleware
from llmq.serve.middleware import WholeBody
from llmq.serve.options import ServeOptions
from llmq.serve.streaming import EventStream

CONTEXT = 2**16
SOME: dict[str, Any] = {"prompt": "x", "max_tokens": 1200, "ignore_eos": True, "seed": 1}
ENDLESS: dict[str, Any] = {**SOME, "max_tokens": CONTEXT - 2}
"""Ends long after any test does."""
MAX_QUEUE = 4
FORM = "application/x-www-form-urlencoded"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model", "llama", max_position_embeddings=CONTEXT)


@pytest.fixture(scope="module")
def server(tiny: Path) -> Iterator[Server]:
    flags = ("--host", "0.0.0.0", "--max-queue", MAX_QUEUE, "--max-num-seqs", 2, "--block-size", 16, "--log-prompts")
    with served(tiny, *flags) as running:
        assert running.url, running.log
        yield running


def eventually(holds: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + PATIENCE
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.02)
    return holds()


def is_empty(server: Server) -> bool:
    return all(
        server.metric(name) == 0 for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    )


def is_closed(server: Server) -> bool:
    try:
        httpx.get(f"{server.url}/health", timeout=PATIENCE)
    except httpx.TransportError:
        return True
    return False


# Bad input

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hi"}]
SCHEMA = b'"response_format": {"type": "json_schema", "json_schema": {"schema":'
BAD: list[tuple[str, Any, int, str | None]] = [
    (COMPLETIONS, b"{", 400, None),
    (COMPLETIONS, b"", 400, None),
    (COMPLETIONS, b"[]", 400, None),
    (COMPLETIONS, b"\xff\xfe", 400, None),
    (COMPLETIONS, {}, 400, "prompt"),
    (COMPLETIONS, {"prompt": ""}, 400, "prompt"),
    (COMPLETIONS, {"prompt": []}, 400, "prompt"),
    (COMPLETIONS, {"prompt": ["a", ""]}, 400, "prompt"),
    (COMPLETIONS, {"prompt": [[]]}, 400, "prompt"),
    (COMPLETIONS, {"prompt": [10**6]}, 400, None),
    (COMPLETIONS, {"prompt": [-1]}, 400, None),
    (COMPLETIONS, b'{"prompt": "\\ud800"}', 400, None),
    (COMPLETIONS, {"prompt": "x", "model": "other"}, 404, "model"),
    (COMPLETIONS, b'{"prompt": "x", "model": "\\ud800"}', 404, "model"),
    (CHAT, b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400, None),
    (COMPLETIONS, {"prompt": "x", "max_tokens": "5"}, 400, "max_tokens"),
    (COMPLETIONS, {"prompt": "x", "max_tokens": 0}, 400, "max_tokens"),
    (COMPLETIONS, {"prompt": "x", "temperature": -1}, 400, "temperature"),
    (COMPLETIONS, b'{"prompt": "x", "temperature": NaN}', 400, "temperature"),
    (COMPLETIONS, {"prompt": "x", "seed": 10**30}, 400, "seed"),
    (COMPLETIONS, {"prompt": "x", "n": 0}, 400, "n"),
    (COMPLETIONS, {"prompt": "x", "n": 3}, 400, None),
    (COMPLETIONS, {"prompt": "x", "logprobs": 1000}, 400, "logprobs"),
    (COMPLETIONS, {"prompt": "x", "stop": [""]}, 400, "stop"),
    (COMPLETIONS, {"prompt": "x", "stop_token_ids": [10**9]}, 400, "stop_token_ids"),
    (COMPLETIONS, {"prompt": "x", "suffix": "y"}, 400, "suffix"),
    (COMPLETIONS, {"prompt": "x", "logit_bias": {"1": 2}}, 400, "logit_bias"),
    (COMPLETIONS, {"prompt": "x", "structured_outputs": {"regex": "a"}}, 400, "structured_outputs"),
    (COMPLETIONS, {"prompt": "x", "response_format": {"type": "json_object"}, "min_tokens": 2}, 400, "json_schema"),
    (COMPLETIONS, {"prompt": "x", "response_format": {"type": "json_schema"}}, 400, "response_format"),
    (COMPLETIONS, b'{"prompt": "x", %s {"const": "\\ud800"}}}}' % SCHEMA, 400, "response_format"),
    (COMPLETIONS, {"prompt": "x", "stream_options": {}}, 400, "stream_options"),
    (COMPLETIONS, {"prompt": "x", "stream": True, "best_of": 2}, 400, "best_of"),
    (COMPLETIONS, {"prompt": "x" * CONTEXT}, 400, None),
    (COMPLETIONS, {"prompt": ["x"] * (MAX_QUEUE + 1)}, 400, "prompt"),
    (CHAT, {"messages": []}, 400, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, 400, None),
    (CHAT, {"messages": HELLO, "tools": [{"type": "function"}]}, 400, "tools"),
    (CHAT, {"messages": HELLO, "top_logprobs": 2}, 400, "top_logprobs"),
    (CHAT, {"messages": HELLO, "max_completion_tokens": -1}, 400, "max_tokens"),
    ("/tokenize", {}, 400, "prompt"),
    ("/detokenize", {"tokens": [-1]}, 400, None),
    ("/nothing", {}, 404, None),
    ("/health", {}, 405, None),
]


@pytest.mark.parametrize(("path", "body", "status", "param"), BAD, ids=lambda value: str(value)[:60])
def test_a_bad_request_is_answered_with_the_reason(
    server: Server, path: str, body: Any, status: int, param: str | None
) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = server.http.post(path, content=content, headers={"content-type": "application/json"})
    error = answer.json()["error"]
    assert (answer.status_code, set(error)) == (status, {"message", "type", "param", "code"})
    assert error["message"]
    if param is not None:
        assert error["param"].split(".")[0] == param


def test_a_body_that_is_no_json_is_told_where_and_blames_no_field(server: Server) -> None:
    answer = server.http.post(COMPLETIONS, content=b'{"prompt": x}', headers={"content-type": "application/json"})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, None)
    assert error["message"] == "the body is not JSON: Expecting value at character 11"


def test_a_body_that_is_not_called_json_is_refused_with_the_header_that_mends_it(server: Server) -> None:
    """As ``curl -d`` sends it."""
    answer = server.http.post(COMPLETIONS, content=b'{"prompt": "x"}', headers={"content-type": FORM})
    assert (answer.status_code, answer.json()["error"]["type"]) == (415, "invalid_request_error")
    assert "Content-Type: application/json" in answer.json()["error"]["message"]


@pytest.mark.parametrize("field", ["top_k", "priority", "temperature"])
def test_extreme_but_valid_numbers_are_taken(server: Server, field: str) -> None:
    value = 1e300 if field == "temperature" else 10**18
    answer = server.http.post(COMPLETIONS, json={"prompt": "x", "max_tokens": 8, field: value})
    assert answer.status_code == 200


def test_a_body_that_is_too_large_is_refused(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    size = middleware.MAX_BODY_BYTES + 1
    declared = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % size
    address = server.url.removeprefix("http://").rsplit(":", 1)
    with socket.create_connection((address[0], int(address[1])), PATIENCE) as connection:
        connection.sendall(declared)
        assert connection.recv(4096).startswith(b"HTTP/1.1 413 ")
    monkeypatch.setattr(middleware, "MAX_BODY_BYTES", 1000)
    assert run_whole_body([b"x" * 600, b"x" * 600]) == 413
    assert run_whole_body([b"x" * 600]) == 200


def test_a_body_that_never_comes_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "BODY_SECONDS", 0.05)
    assert run_whole_body([b"{"], ends=False) == 408


def run_whole_body(chunks: list[bytes], *, ends: bool = True) -> int:
    """The status with which a body in ``chunks``, of no declared length, is answered."""
    messages = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]
    statuses: list[int] = []

    async def receive() -> Any:
        if messages:
            return messages.pop(0)
        if not ends:
            await asyncio.Event().wait()
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        statuses.append(message.get("status"))

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert (await receive())["body"] == b"".join(chunks)
        await send({"type": "http.response.start", "status": 200})

    scope = {"type": "http", "method": "POST", "headers": []}
    asyncio.run(WholeBody(app)(scope, receive, send))
    return statuses[0]


def test_a_head_that_never_comes_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slow-loris: a connection that sends a header now and then, for a first request and for a second one."""
    monkeypatch.setattr(http, "HEAD_SECONDS", 1.0)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    async def trickle(address: Any, *, first: bytes) -> bytes:
        """What is answered to ``first``, and to the beginning of a head behind it."""
        reader, writer = await asyncio.open_connection(*address)
        writer.write(first + b"GET / HTTP/1.1\r\nHost: x\r\nA: ")
        answer = await asyncio.wait_for(reader.read(), PATIENCE)  # until the server closes
        writer.close()
        return answer

    async def attack() -> list[bytes]:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            server = http.Server(app, announce=lambda: None, at_once=lambda: None)
            serving = asyncio.ensure_future(server.serve(sockets=[listener]))
            while not server.started:
                await asyncio.sleep(0)
            address = listener.getsockname()
            answers = [await trickle(address, first=first) for first in (b"", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")]
            server.should_exit = True
            await serving
            return answers

    never, once = asyncio.run(attack())
    assert never == b""
    assert once.startswith(b"HTTP/1.1 200 OK")


class Clock(asyncio.SelectorEventLoop):
    """An event loop whose time can be put forward."""

    ahead = 0.0

    def time(self) -> float:
        return super().time() + self.ahead


async def texts(*sizes: int) -> AsyncGenerator[str]:
    for size in sizes:
        yield "x" * size


@asynccontextmanager
async def draining(sizes: tuple[int, ...]) -> AsyncIterator[tuple[asyncio.Task[None], asyncio.Event, socket.socket]]:
    """A server that was told to end while it answers with texts of ``sizes``: its end, the answer's, and the client.
    The system holds little of the answer."""
    closed = asyncio.Event()
    with socket.socket() as listener, socket.socket() as client:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setblocking(False)
        listener.bind(("127.0.0.1", 0))
        server = http.Server(EventStream(texts(*sizes), closed.set), announce=lambda: None, at_once=lambda: None)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        while not server.started:
            await asyncio.sleep(0)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(client, listener.getsockname())
        await loop.sock_sendall(client, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert await loop.sock_recv(client, 1)
        server.should_exit = True
        yield serving, closed, client


STREAM, WHOLE, BELOW_UVICORN_S_LIMIT = (2**16,) * 64, (2**22,), (60_000,)


@pytest.mark.parametrize("sizes", [STREAM, WHOLE, BELOW_UVICORN_S_LIMIT], ids=["stream", "whole", "small"])
def test_a_client_that_takes_nothing_does_not_hold_up_the_end(sizes: tuple[int, ...]) -> None:
    clock, deadline = Clock(), time.monotonic() + PATIENCE

    async def end() -> bool:
        async with draining(sizes) as (serving, closed, _):
            while not serving.done():
                assert time.monotonic() < deadline
                clock.ahead += http.TAKE_SECONDS
                await asyncio.sleep(0)
            return closed.is_set()

    with asyncio.Runner(loop_factory=lambda: clock) as runner:
        assert runner.run(end())


@pytest.mark.parametrize("sizes", [STREAM, WHOLE], ids=["stream", "whole"])
def test_a_client_that_takes_little_at_a_time_has_all_of_its_answer(sizes: tuple[int, ...]) -> None:
    clock = Clock()

    async def take() -> bytes:
        taken = bytearray()
        async with draining(sizes) as (serving, _, client):
            while piece := await clock.sock_recv(client, 2**16):
                taken += piece
                if len(taken) // 2**20 > (len(taken) - len(piece)) // 2**20:
                    clock.ahead += http.TAKE_SECONDS / 2
            await serving
        return bytes(taken)

    with asyncio.Runner(loop_factory=lambda: clock) as runner:
        answer = runner.run(take())
    body = answer.partition(b"\r\n\r\n")[2]
    assert body.count(b"x") == sum(sizes)
    assert body.endswith(b"\r\n0\r\n\r\n")


@pytest.mark.slow
def test_schemathesis_finds_no_server_error(server: Server, tmp_path: Path) -> None:
    command = [str(Path(sys.executable).with_name("schemathesis")), "run", f"{server.url}/openapi.json"]
    flags = ["--checks", "not_a_server_error", "--phases", "examples,fuzzing", "--max-examples", "12", "--seed", "1"]
    run = subprocess.run([*command, *flags], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:]
    assert server.http.get("/health").status_code == 200


# Clients that leave, and too many of them


def test_a_client_that_leaves_a_stream_leaves_no_block_behind(server: Server) -> None:
    before = server.metric("request_success_total", finished_reason="abort")
    for path, body in ((COMPLETIONS, ENDLESS), (CHAT, {**ENDLESS, "messages": HELLO})):
        with server.http.stream("POST", path, json={**body, "stream": True}) as answer:
            lines = answer.iter_lines()  # where nobody holds it, httpx leaves
            next(lines)
            assert eventually(lambda: server.metric("kv_cache_usage_perc") > 0)
        assert eventually(lambda: is_empty(server))
    assert server.metric("request_success_total", finished_reason="abort") == before + 2


def test_a_client_that_does_not_wait_for_its_answer_leaves_no_block_behind(server: Server) -> None:
    before = server.metric("request_success_total", finished_reason="abort")
    with pytest.raises(httpx.ReadTimeout):
        server.http.post(COMPLETIONS, json=ENDLESS, timeout=0.1)
    assert eventually(lambda: server.metric("request_success_total", finished_reason="abort") == before + 1)
    assert eventually(lambda: is_empty(server))


def test_a_full_queue_sends_clients_away_for_a_while(server: Server) -> None:
    async def ask_all() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE) as client:
            return await asyncio.gather(*(client.post(COMPLETIONS, json={**SOME, "max_tokens": 64}) for _ in range(20)))

    answers = asyncio.run(ask_all())
    refused = [answer for answer in answers if answer.status_code == 429]
    assert {answer.status_code for answer in answers} == {200, 429}
    assert len(answers) - len(refused) >= MAX_QUEUE
    assert all(int(answer.headers["retry-after"]) > 0 for answer in refused)
    assert refused[0].json()["error"]["code"] == "queue_full"
    assert is_empty(server)


def test_prompts_are_logged_where_asked(server: Server) -> None:
    server.http.post(COMPLETIONS, json={"prompt": "not a secret", "max_tokens": 1})
    assert eventually(lambda: '"not a secret"' in server.log)


def test_an_open_address_without_a_key_is_warned_of(server: Server) -> None:
    assert "whoever reaches 0.0.0.0 may use the model" in server.log


@pytest.mark.parametrize(("host", "open_"), [("127.0.0.1", False), ("localhost", False), ("::1", False), ("::", True)])
def test_only_loopback_is_for_oneself(host: str, open_: bool) -> None:
    assert ServeOptions(host=host).reachable_by_others is open_


# Ends


@pytest.mark.slow
def test_sigterm_finishes_what_runs_and_a_second_one_ends_at_once(tiny: Path) -> None:
    expected = LLM(str(tiny), device="cpu").generate(
        ["x"], SamplingParams(max_tokens=SOME["max_tokens"], ignore_eos=True, seed=1)
    )[0].completions[0]  # fmt: skip
    with served(tiny) as server:
        with server.http.stream("POST", COMPLETIONS, json={**SOME, "stream": True}) as answer:
            lines = answer.iter_lines()
            first = next(lines)
            server.process.send_signal(signal.SIGTERM)
            assert eventually(lambda: "ending: 1 requests" in server.log)
            assert eventually(lambda: is_closed(server))
            events = [line.removeprefix("data: ") for line in (first, *lines) if line]
        assert events[-1] == "[DONE]"
        assert "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1]) == expected.text
        assert server.process.wait(PATIENCE) == 0
    with served(tiny) as server:
        with server.http.stream("POST", COMPLETIONS, json={**ENDLESS, "stream": True}) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            assert eventually(lambda: "ending: 1 requests" in server.log)
            engine = server.engine_pid()
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(PATIENCE) == 128 + signal.SIGTERM
            assert not Path(f"/proc/{engine}").exists() or "Z" in Path(f"/proc/{engine}/stat").read_text()


@pytest.mark.slow
def test_a_deadline_ends_a_request_and_a_dead_engine_the_server(tiny: Path, tmp_path: Path) -> None:
    """A model without a tokenizer, too: prompts are token ids."""
    bare = Path(shutil.copytree(tiny, tmp_path / "bare", ignore=shutil.ignore_patterns("*token*", "*.jinja")))
    with served(bare, "--request-timeout", 1) as server:
        brief = server.http.post(COMPLETIONS, json={"prompt": [1, 2], "max_tokens": 1})
        assert (brief.status_code, brief.json()["usage"]["completion_tokens"]) == (200, 1)
        assert server.http.post(COMPLETIONS, json={"prompt": "text"}).status_code == 400
        formed = server.http.post(COMPLETIONS, json={"prompt": [1], "response_format": {"type": "json_object"}})
        assert (formed.status_code, formed.json()["error"]["param"]) == (400, "response_format")
        long = {**ENDLESS, "prompt": [1, 2]}
        assert server.http.post(COMPLETIONS, json=long).status_code == 504
        stream = server.http.post(COMPLETIONS, json={**long, "stream": True}).text
        assert '"type":"timeout_error"' in stream
        assert stream.endswith("data: [DONE]\n\n")
        assert eventually(lambda: is_empty(server))
        with server.http.stream("POST", COMPLETIONS, json={**long, "stream": True}) as answer:
            lines = answer.iter_lines()
            next(lines)
            os.kill(server.engine_pid(), signal.SIGKILL)
            assert any('"error"' in line for line in lines)
        assert server.process.wait(PATIENCE) == 1
        assert "error: the engine's process ended (-9), and so does the server" in server.log
        assert is_closed(server)


def test_a_port_that_is_taken_is_found_before_the_model_is_loaded(tiny: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = llmq("serve", tiny, "--port", port)
    assert result.code == 1
    assert result.err.startswith(f"error: cannot listen on 127.0.0.1, port {port}: Address already in use")
    assert "--port" in result.err


def test_a_model_that_cannot_be_run_is_the_user_s_mistake(tiny: Path, tmp_path: Path) -> None:
    assert "there is no folder ./nowhere" in llmq("serve", "./nowhere", "--port", 0).err
    broken = Path(shutil.copytree(tiny, tmp_path / "broken"))
    (broken / "model.safetensors").write_bytes(b"nothing")
    result = llmq("serve", broken, "--port", 0)
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith("error: ")
    assert "model.safetensors" in result.err


@pytest.mark.parametrize(
    "options", [{"port": -1}, {"port": 70000}, {"max_queue": 0}, {"request_timeout": 0.0}, {"api_keys": ("",)}]
)
def test_options_out_of_range_are_usage_errors(options: dict[str, Any]) -> None:
    with pytest.raises(LlmqError) as caught:
        ServeOptions(**options)
    assert caught.value.exit_code == 2
