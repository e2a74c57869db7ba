"""``llmq chat``: a conversation line by line, with a model here or at a server."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from command_line import Result, llmq
from serving import Server, served
from tiny_models import save_tiny

from llmq import LLM, SamplingParams
from llmq.errors import FAILED, USAGE

FLAGS = ("--max-tokens", 8, "--seed", 1)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model", "llama")


@pytest.fixture(scope="module")
def server(tiny: Path) -> Iterator[Server]:
    with served(tiny, "--api-key", "key") as running:
        yield running


@pytest.fixture(params=["here", "url"])
def where(request: pytest.FixtureRequest, tiny: Path) -> tuple[object, ...]:
    if request.param == "here":
        return (tiny, "--device", "cpu")
    server: Server = request.getfixturevalue("server")
    return ("--url", server.url, "--api-key", "key")


def answers(llm: LLM, lines: list[str], system: str | None = None) -> list[dict[str, str]]:
    """The conversation that ``lines`` lead to."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    for line in lines:
        messages.append({"role": "user", "content": line})
        output = llm.generate([messages], SamplingParams(max_tokens=8, seed=1))[0]
        messages.append({"role": "assistant", "content": output.completions[0].text})
    return messages


def saved(path: Path) -> list[dict[str, str]]:
    messages: list[dict[str, str]] = json.loads(path.read_text())["messages"]
    return messages


def talk(where: tuple[object, ...], *lines: str) -> Result:
    return llmq("chat", *where, *FLAGS, stdin="\n".join(lines) + "\n")


def test_every_answer_knows_what_was_said_before(where: tuple[object, ...], tiny: Path, tmp_path: Path) -> None:
    result = talk((*where, "--system", "be"), "one", "", "two", f"/save {tmp_path / 'chat.jsonl'}", "/exit", "three")
    expected = answers(LLM(str(tiny), device="cpu"), ["one", "two"], system="be")
    assert saved(tmp_path / "chat.jsonl") == expected
    assert result.out == "".join(f"{one['content']}\n" for one in expected if one["role"] == "assistant")
    assert result.err.count("tokens/s") == 2


def test_reset_forgets(where: tuple[object, ...], tiny: Path, tmp_path: Path) -> None:
    talk(where, "one", "/reset", "two", f"/save {tmp_path / 'chat.jsonl'}")
    assert saved(tmp_path / "chat.jsonl") == answers(LLM(str(tiny), device="cpu"), ["two"])


def test_what_was_saved_can_be_continued(tiny: Path, tmp_path: Path) -> None:
    talk((tiny,), "one", f"/save {tmp_path / 'chat.jsonl'}")
    assert llmq("generate", tiny, "-i", tmp_path / "chat.jsonl", "--max-tokens", 2).code == 0


def test_a_message_that_fails_is_not_remembered(where: tuple[object, ...], tiny: Path, tmp_path: Path) -> None:
    result = talk(where, "x" * 600, "one", "/nothing", "/save", f"/save {tmp_path / 'chat.jsonl'}")
    assert result.code == 1
    assert "hint: /reset begins anew" in result.err
    assert "there is no /nothing" in result.err
    assert "/save needs a file" in result.err
    assert saved(tmp_path / "chat.jsonl") == answers(LLM(str(tiny), device="cpu"), ["one"])


def test_a_server_that_is_not_there_or_wants_a_key(server: Server) -> None:
    nowhere = llmq("chat", "--url", "http://127.0.0.1:9")
    assert (nowhere.code, nowhere.out) == (1, "")
    assert "http://127.0.0.1:9/v1 cannot be reached" in nowhere.err
    assert "the server answers 401" in llmq("chat", "--url", server.url).err
    assert llmq("chat").code == llmq("chat", "demo", "--url", server.url).code == 2


@contextmanager
def answering(models: bytes, stream: bytes) -> Iterator[str]:
    """The URL of a server that says this, and closes the connection where a chunk should follow."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(models)

        def do_POST(self) -> None:
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(stream)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


HELLO = b'data: {"choices": [{"index": 0, "delta": {"content": "hello"}}]}\n\n'


@pytest.mark.parametrize(
    ("rest", "reason"),
    [
        (b"", "the server's answer broke off"),
        (b"40\r\ndata: {", "the server's answer broke off"),
        (b"8\r\ndata: {\n\r\n", "the server's answer broke off"),
        (b'1b\r\ndata: {"error": "no more"}\n\r\n', "the server gave up: no more"),
    ],
)
def test_an_answer_that_breaks_off_is_an_error(rest: bytes, reason: str) -> None:
    with answering(b'{"data": [{"id": "m"}]}', b"%x\r\n%s\r\n%s" % (len(HELLO), HELLO, rest)) as url:
        result = llmq("chat", "--url", url, stdin="hi\n")
    assert (result.code, result.out) == (FAILED, "hello\n")
    assert reason in result.err


def test_a_url_that_is_none_or_of_something_else() -> None:
    assert "error: 'localhost:8000' is no URL" in (result := llmq("chat", "--url", "localhost:8000")).err
    assert result.code == USAGE
    with answering(b"<html>", b"") as url:
        assert "is not OpenAI's interface" in llmq("chat", "--url", url).err


def test_a_message_that_is_not_text(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda prompt: b"\xff".decode())
    result = llmq("chat", tiny, "--device", "cpu", stdin="x")
    assert (result.code, result.out) == (FAILED, "")
    assert "error: what stdin brings is not UTF-8 text" in result.err
