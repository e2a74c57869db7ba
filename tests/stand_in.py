"""A small server of OpenAI's interface, on a thread: it answers by rule, and keeps what it was asked."""

from __future__ import annotations

import asyncio
import json
import threading
from dataclasses import dataclass, field
from typing import Any


@dataclass
class StandIn:
    """``refuse`` and ``cut``: numbers of the requests that get status 429, or half an answer and no end.

    ``usage``: whether streams end with the tokens' count. ``short``: tokens that every answer lacks. ``cached``: prompt
    tokens that usage says were cached. ``card``: more about the model. ``metrics``: the page /metrics, one for
    each call; the last stays.
    """

    refuse: set[int] = field(default_factory=set)
    cut: set[int] = field(default_factory=set)
    usage: bool = True
    short: int = 0
    cached: int | None = None
    card: dict[str, Any] = field(default_factory=dict)
    metrics: list[str] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)

    def __enter__(self) -> StandIn:
        self._loop = asyncio.new_event_loop()
        self._server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._server.close()
        self._loop.close()

    @property
    def prompts(self) -> list[Any]:
        return [body.get("prompt", body.get("messages")) for body in self.bodies]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        path = head.split(" ", 2)[1]
        length = next((int(line[15:]) for line in head.splitlines() if line.startswith("Content-Length:")), 0)
        body = await reader.readexactly(length)
        if path == "/v1/models":
            self._whole(writer, 200, json.dumps({"data": [{"id": "stand-in", **self.card}]}))
        elif path == "/metrics" and self.metrics:
            self._whole(writer, 200, self.metrics.pop(0) if len(self.metrics) > 1 else self.metrics[0])
        elif path in ("/v1/completions", "/v1/chat/completions"):
            number = len(self.bodies)
            self.bodies.append(json.loads(body))
            if number in self.refuse:
                self._whole(writer, 429, json.dumps({"error": {"message": "try later"}}))
            else:
                await self._stream(writer, self.bodies[number], cut=number in self.cut)
        else:
            self._whole(writer, 404, "{}")
        await writer.drain()
        writer.close()

    def _whole(self, writer: asyncio.StreamWriter, status: int, page: str) -> None:
        writer.write(f"HTTP/1.1 {status} .\r\nContent-Length: {len(page)}\r\n\r\n{page}".encode())

    async def _stream(self, writer: asyncio.StreamWriter, body: dict[str, Any], *, cut: bool) -> None:
        """Chunked, and each event in two chunks, as a network may cut it."""
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Type: text/event-stream\r\n\r\n")
        tokens = body["max_tokens"] - self.short
        for number in range(tokens):
            if cut and number == tokens // 2:
                return
            say = {"delta": {"content": "a"}} if "messages" in body else {"text": "a"}
            reason = "length" if number == tokens - 1 else None
            self._event(writer, {"choices": [{"index": 0, **say, "finish_reason": reason}]})
            await writer.drain()
        if self.usage:
            usage: dict[str, Any] = {"prompt_tokens": 11, "completion_tokens": tokens}
            if self.cached is not None:
                usage["prompt_tokens_details"] = {"cached_tokens": self.cached}
            self._event(writer, {"choices": [], "usage": usage})
        self._event(writer, "[DONE]")
        writer.write(b"0\r\n\r\n")

    def _event(self, writer: asyncio.StreamWriter, event: dict[str, Any] | str) -> None:
        text = event if isinstance(event, str) else json.dumps(event)
        data = f"data: {text}\n\n".encode()
        for part in (data[:9], data[9:]):
            writer.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
