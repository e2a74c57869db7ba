"""What every HTTP request passes before a route sees it: the log, the key, and the limits on its body. Plain ASGI."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llmq.serve.errors import ApiError

MAX_BODY_BYTES = 32 * 2**20
BODY_SECONDS = 30.0
"""How long a client may take to send a body."""
OPEN_PATHS = {"/health", "/metrics", "/version", "/openapi.json"}
"""No key is asked for here."""
LOG_FIELDS = "llmq.log"
"""Where in the scope routes leave what the log is to say."""


class AccessLog:
    """One JSON line on stderr for each request, when it is over."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        fields: dict[str, Any] = {}
        scope[LOG_FIELDS] = fields
        status = 0

        async def watch(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self.app(scope, receive, watch)
        finally:
            client = scope.get("client") or ("",)
            record = {
                "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                "client": client[0],
                "method": scope["method"],
                "path": scope["path"],
                "status": status,
                "ms": round((time.perf_counter() - started) * 1000, 1),
                **fields,
            }
            print(json.dumps(record), file=sys.stderr, flush=True)


class ApiKeys:
    """Lets in who shows one of ``keys``, and everybody where there are none."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self.app = app
        self._digests = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._digests and scope["path"] not in OPEN_PATHS:
            kind, _, shown = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
            # Digests have one length, and all of them are looked at: the time tells nothing of the key.
            matches = [hmac.compare_digest(_digest(shown.strip()), digest) for digest in self._digests]
            if kind.lower() != b"bearer" or not any(matches):
                error = ApiError(401, "no key, or a wrong one: send Authorization: Bearer KEY", code="invalid_api_key")
                await send_error(send, error)
                return
        await self.app(scope, receive, send)


class WholeBody:
    """Reads a body before the route is called, unless it is too large or takes too long to come."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD"):
            await self.app(scope, receive, send)
            return
        try:
            _check_size(int(dict(scope["headers"]).get(b"content-length", b"0") or 0))
            async with asyncio.timeout(BODY_SECONDS):
                body = await _read(receive)
        except ApiError as error:
            await send_error(send, error)
            return
        except TimeoutError:
            await send_error(send, ApiError(408, f"the body did not come within {BODY_SECONDS:g} s"))
            return
        whole: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return whole.pop() if whole else await receive()

        await self.app(scope, replay, send)


async def send_error(send: Send, error: ApiError) -> None:
    """Answer with ``error`` and close the connection: the rest of the body is not read."""
    body = json.dumps(error.body).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _read(receive: Receive) -> bytes:
    chunks, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            break
        chunks.append(message.get("body", b""))
        size += len(chunks[-1])
        _check_size(size)
        more = message.get("more_body", False)
    return b"".join(chunks)


def _check_size(size: int) -> None:
    if size > MAX_BODY_BYTES:
        raise ApiError(413, f"the body is larger than {MAX_BODY_BYTES // 2**20} MiB")


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
