"""Answers on their way to a client that may leave at any time."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from llmq.serve.answers import Answer, Generation
from llmq.serve.client import EngineDied
from llmq.serve.errors import ApiError
from llmq.serve.remote import DONE

T = TypeVar("T")


class ClientLeft(Exception):
    """Nobody is there to answer."""


class EventStream(Response):
    """Server-sent events. ``events`` are objects, or texts to be sent as they are; ``close`` is called in any case."""

    def __init__(self, events: AsyncGenerator[dict[str, Any] | str], close: Callable[[], None]) -> None:
        super().__init__(media_type="text/event-stream", headers={"cache-control": "no-cache"})
        del self.headers["content-length"]
        self._events = events
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await while_connected(receive, self._send(send))
            await send({"type": "http.response.body", "body": b""})
        except (ClientLeft, OSError):
            pass
        finally:
            self._close()

    async def _send(self, send: Send) -> None:
        async with aclosing(self._events) as events:
            async for event in events:
                data = event if isinstance(event, str) else json.dumps(event, ensure_ascii=False, separators=(",", ":"))
                await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``, which is cancelled with ClientLeft once the client is gone."""
    task = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait((task, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientLeft
        return await task
    finally:
        task.cancel()
        leaving.cancel()
        await asyncio.gather(task, leaving, return_exceptions=True)


async def merged(generations: Sequence[Generation]) -> AsyncGenerator[tuple[int, list[Answer]]]:
    """The pieces of all ``generations`` as they come, each with the number of its generation."""
    if len(generations) == 1:
        async for pieces in generations[0].pieces():
            yield 0, pieces
        return
    queue: asyncio.Queue[tuple[int, list[Answer]] | None] = asyncio.Queue()

    async def pump(number: int) -> None:
        async for pieces in generations[number].pieces():
            queue.put_nowait((number, pieces))

    async def pump_all() -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for number in range(len(generations)):
                    group.create_task(pump(number))
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        finally:
            queue.put_nowait(None)

    pumping = asyncio.ensure_future(pump_all())
    try:
        while (item := await queue.get()) is not None:
            yield item
        await pumping
    finally:
        pumping.cancel()


async def collect(generations: Sequence[Generation]) -> list[list[Answer]]:
    """The whole answers of each generation."""
    whole = [[Answer(index) for index in range(generation.params.n)] for generation in generations]
    async for number, pieces in merged(generations):
        for piece in pieces:
            whole[number][piece.index].extend(piece)
    return whole


async def until_failure(events: AsyncGenerator[Any], seconds: float | None) -> AsyncGenerator[Any]:
    """``events``, and where they fail, or come to take longer than ``seconds``, the error: it is too late for a status.
    Then OpenAI's end of the stream."""
    deadline = None if seconds is None else asyncio.get_running_loop().time() + seconds
    try:
        async with aclosing(events) as open_events:
            while True:
                # Only the wait for the engine is under the clock, not the client's reading.
                async with asyncio.timeout_at(deadline):
                    event = await anext(open_events, None)
                if event is None:
                    break
                yield event
    except Exception as error:
        yield as_api_error(error, seconds).body
    yield DONE


def as_api_error(error: Exception, seconds: float | None) -> ApiError:
    """What a client is told of a failure. Raises what is none of those that are known."""
    match error:
        case ApiError():
            return error
        case EngineDied():
            return ApiError(500, "the engine's process died, and the server is about to end")
        case TimeoutError():
            return ApiError(504, f"the answer took longer than the {seconds:g} s that requests may take here")
    raise error


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
