"""The engine's process as the server's event loop sees it."""

from __future__ import annotations

import asyncio
import multiprocessing
import threading
import time
from collections.abc import Sequence
from itertools import count
from queue import SimpleQueue
from typing import Any

from llmq.engine.options import EngineOptions
from llmq.engine.outputs import TokenDelta
from llmq.engine.request import SamplingParams, token_array
from llmq.errors import LlmqError
from llmq.serve import worker
from llmq.serve.messages import Abort, Event, Failed, Finish, Load, Order, Ready, Step, Submit
from llmq.serve.metrics import Metrics

CLOSE_SECONDS = 5.0
"""How long the engine may take to end by itself, when asked to."""


class EngineDied(Exception):
    """The engine's process ended while somebody waited for it."""


class EngineClient:
    """Starts the engine's process; then ``wait`` for it, ``listen`` within an event loop, ``submit``, and ``close``."""

    def __init__(self, model: str, settings: dict[str, Any], options: EngineOptions, metrics: Metrics) -> None:
        """``settings``: of LLM, by name."""
        self.metrics = metrics
        self.load = Load()
        self.streams: dict[int, RequestStream] = {}
        self.died = asyncio.Event()
        self._listening = False
        self._numbers = count()
        self._orders: SimpleQueue[Order] = SimpleQueue()
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=worker.run, args=(theirs, model, settings, options), name="llmq engine")
        self._process.start()
        theirs.close()

    def wait(self) -> Ready:
        """Block until the model is loaded. LlmqError when it cannot be."""
        try:
            message = self._connection.recv()
        except EOFError:
            self._process.join()
            raise LlmqError(
                f"the engine's process ended with {self._process.exitcode} while it loaded the model",
                "see what it wrote above; out of memory? llmq memplan says what the model takes",
            ) from None
        if isinstance(message, Failed):
            raise LlmqError(message.message, message.hint, exit_code=message.exit_code)
        ready: Ready = message
        return ready

    def listen(self) -> None:
        """From now on, pass on what comes to the running event loop, and send orders."""
        loop = asyncio.get_running_loop()
        self._listening = True
        threading.Thread(target=self._read, args=(loop,), daemon=True).start()
        threading.Thread(target=self._write, daemon=True).start()

    def submit(self, prompt_ids: Sequence[int], params: SamplingParams) -> RequestStream:
        """Hand the engine a request that is within its limits. EngineDied when there is none any more."""
        if self.died.is_set():
            raise EngineDied
        stream = RequestStream(self, next(self._numbers))
        self.streams[stream.request_id] = stream
        self.send(Submit(stream.request_id, token_array(prompt_ids), params))
        return stream

    def send(self, order: Order) -> None:
        # By a thread: a pipe that is full, because the engine is in a long step, must not stop the event loop.
        self._orders.put(order)

    @property
    def waiting(self) -> int:
        """Requests that have not been let in yet, as far as the engine's last step tells."""
        return max(0, len(self.streams) - self.load.running)

    def close(self) -> None:
        """End the engine's process, between two steps if it has not long to go there."""
        if self._listening:
            self._orders.put(None)
        else:
            self._connection.close()
        self._process.join(CLOSE_SECONDS)
        self.kill()

    def kill(self) -> None:
        """End the engine's process now."""
        self._process.kill()
        self._process.join()

    @property
    def exit_code(self) -> int | None:
        """Of the engine's process, once it has died."""
        self._process.join(CLOSE_SECONDS)
        return self._process.exitcode

    def _read(self, loop: asyncio.AbstractEventLoop) -> None:
        try:
            while True:
                loop.call_soon_threadsafe(self._take, self._connection.recv())
        except (EOFError, OSError, RuntimeError):  # RuntimeError: the loop has ended before the engine
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._lose)

    def _write(self) -> None:
        try:
            while True:
                order = self._orders.get()
                self._connection.send(order)
                if order is None:
                    return
        except OSError:
            return  # the reader notices

    def _take(self, step: Step) -> None:
        now = time.perf_counter()
        if step.load.steps > self.load.steps:
            self.metrics.iteration_tokens.observe(step.load.tokens - self.load.tokens)
        self.load = step.load
        for event in step.events:
            stream = self.streams.get(event[0])
            if stream is not None:
                stream.take(event, now)

    def _lose(self) -> None:
        self.died.set()
        for stream in self.streams.values():
            stream.wake()


class RequestStream:
    """A request in the engine: what comes of it, as it comes. Times are those of ``time.perf_counter``: its arrival,
    and its first and latest token."""

    def __init__(self, client: EngineClient, request_id: int) -> None:
        self.request_id = request_id
        self.arrival = time.perf_counter()
        self.queue_seconds: float | None = None
        self.first: float | None = None
        self.last = self.arrival
        self._client = client
        self._events: list[Event] = []
        self._come = asyncio.Event()
        self._times: dict[int, float] = {}

    async def next(self) -> list[Event]:
        """All that has come since the last call, once there is something. EngineDied when nothing more can."""
        while not self._events:
            if self._client.died.is_set():
                raise EngineDied
            self._come.clear()
            await self._come.wait()
        events, self._events = self._events, []
        return events

    def take(self, event: Event, now: float) -> None:
        """Called with what comes, at ``now`` by ``time.perf_counter``."""
        if isinstance(event, TokenDelta):
            self._measure(event, now)
        else:
            del self._client.streams[self.request_id]
        self._events.append(event)
        self._come.set()

    def wake(self) -> None:
        """Called when nothing more can come."""
        self._come.set()

    def finish(self, sample: int) -> None:
        """Answer ``sample`` ends here: nobody reads on."""
        self._client.send(Finish(self.request_id, sample))

    def close(self) -> None:
        """Nobody waits for the rest, if there is one: the engine frees all that the request holds before it steps."""
        if self._client.streams.pop(self.request_id, None) is not None:
            self._client.send(Abort(self.request_id))

    def _measure(self, token: TokenDelta, now: float) -> None:
        metrics, index = self._client.metrics, token.sample
        if self.first is None:
            self.first, self.queue_seconds = now, token.queue_seconds
            metrics.time_to_first_token.observe(now - self.arrival)
        elif index in self._times:
            metrics.inter_token_latency.observe(now - self._times[index])
        self._times[index] = self.last = now
