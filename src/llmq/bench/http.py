"""As much of an HTTP/1.1 client as a benchmark needs: one request on a connection of its own, its answer read as it
comes. On asyncio alone: between a server's piece and its time stands nothing that could be slow."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from urllib.parse import urlsplit

from llmq.errors import USAGE, LlmqError

LINE_BYTES = 2**20
"""The longest line that is read."""
PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class Response:
    """The answer to a request; header names are lower case."""

    status: int
    headers: Mapping[str, str]
    reader: asyncio.StreamReader

    async def body(self) -> AsyncGenerator[bytes]:
        """The body, in the pieces that it comes in. OSError or EOFError when it is cut off."""
        if self.headers.get("transfer-encoding", "").lower() == "chunked":
            while size := int((await self.reader.readuntil()).partition(b";")[0], 16):
                yield await self.reader.readexactly(size)
                await self.reader.readuntil()
        elif "content-length" in self.headers:
            yield await self.reader.readexactly(int(self.headers["content-length"]))
        else:
            while piece := await self.reader.read(LINE_BYTES):
                yield piece

    async def whole(self) -> bytes:
        return b"".join([piece async for piece in self.body()])


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server is. ``prefix`` stands before every path."""

    scheme: str
    host: str
    port: int
    prefix: str

    @asynccontextmanager
    async def request(
        self, path: str, *, headers: Mapping[str, str] | None = None, body: bytes | None = None
    ) -> AsyncGenerator[Response]:
        """GET, or POST where there is a body. OSError, EOFError or ValueError when no HTTP comes back."""
        reader, writer = await asyncio.open_connection(
            self.host, self.port, ssl=True if self.scheme == "https" else None, limit=LINE_BYTES
        )
        try:
            lines = [
                f"{'GET' if body is None else 'POST'} {self.prefix}{path} HTTP/1.1",
                f"Host: {f'[{self.host}]' if ':' in self.host else self.host}:{self.port}",
                "Connection: close",
                *(f"{name}: {value}" for name, value in (headers or {}).items()),
                *([] if body is None else [f"Content-Length: {len(body)}"]),
            ]
            writer.write("\r\n".join([*lines, "", ""]).encode() + (body or b""))
            version, status, *_ = (await reader.readuntil()).split()
            if not version.startswith(b"HTTP/"):
                raise ValueError("the answer is no HTTP")
            fields = {}
            while line := (await reader.readuntil()).strip():
                name, _, value = line.decode("latin-1").partition(":")
                fields[name.strip().lower()] = value.strip()
            yield Response(int(status), fields, reader)
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()


def is_url(text: str) -> bool:
    return text.startswith(("http://", "https://"))


def parse_url(url: str) -> Address:
    """``http://host:8000``, with or without /v1 at its end. LlmqError for what is no URL."""
    try:
        parts = urlsplit(url)
        port = parts.port or PORTS.get(parts.scheme, 0)
    except ValueError:
        parts, port = urlsplit(""), 0
    if parts.scheme not in PORTS or not parts.hostname:
        raise LlmqError(f"{url!r} is no URL", "write http://127.0.0.1:8000", exit_code=USAGE)
    return Address(parts.scheme, parts.hostname, port, parts.path.rstrip("/").removesuffix("/v1"))
