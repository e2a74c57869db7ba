"""uvicorn, with deadlines for clients that stop sending a head or taking an answer, and an end by signals that is
graceful once and sudden twice."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 10.0
"""How long a client may take to send a request line and headers."""
TAKE_SECONDS = 15.0
"""How often a client, the system's buffers being full, is looked at, and let go if it took nothing since: within the
30 s that Kubernetes gives an end."""
KEEP_ALIVE_SECONDS = 60
"""Longer than clients keep idle connections (httpx: 5 s): it is they who close them, so that no request meets a
closing connection."""
BACKLOG = 2048
KILLED_BY_SIGNAL = 128


class Server(uvicorn.Server):
    """Calls ``announce`` when it listens. ``at_once`` is called before a second signal ends the process."""

    def __init__(self, app: Any, announce: Callable[[], None], at_once: Callable[[], None]) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=TimedConnection,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                backlog=BACKLOG,
            )
        )
        self._announce = announce
        self._at_once = at_once

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets=sockets)
        self._announce()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            self._at_once()
            os._exit(KILLED_BY_SIGNAL + sig)
        self.should_exit = True
        running = len(self.server_state.tasks)
        print(f"ending: {running} requests to finish; the same signal again ends at once", file=sys.stderr, flush=True)


class TimedConnection(H11Protocol):
    """A connection that is closed when the head of a request does not come in time, or the client takes no answer."""

    _head_timer: asyncio.TimerHandle | None = None
    _take_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # Whatever is left here holds the connection open: writing is paused from the first byte on.
        transport.set_write_buffer_limits(high=0)
        self._start_head_timer()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._look_at_head()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._look_at_head()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._start_take_timer()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_take_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        self._stop_take_timer()
        super().connection_lost(exc)

    def _look_at_head(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._stop_head_timer()  # it is there
        elif self.conn.trailing_data[0]:
            self._start_head_timer()  # a part of it is

    def _start_head_timer(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _start_take_timer(self) -> None:
        left = self.transport.get_write_buffer_size()
        self._take_timer = self.loop.call_later(TAKE_SECONDS, self._look_at_taking, left)

    def _look_at_taking(self, before: int) -> None:
        if self.transport.get_write_buffer_size() < before:
            self._start_take_timer()  # slow, but there
        else:
            self.transport.abort()

    def _stop_take_timer(self) -> None:
        if self._take_timer is not None:
            self._take_timer.cancel()
            self._take_timer = None
