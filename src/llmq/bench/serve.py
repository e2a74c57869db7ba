"""Load on a server of OpenAI's interface, from outside: what its users see."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from llmq.bench.comparison import ROUNDS, Comparison, figures
from llmq.bench.datasets import items_of
from llmq.bench.endpoint import Endpoint, connect
from llmq.bench.environment import cpu_name, setting
from llmq.bench.load import Load, Outcome, Progress, run_load
from llmq.bench.metrics import DEFINITIONS, Goodput, Metrics
from llmq.bench.nvml import Card, open_card, start_meter
from llmq.bench.workload import Item, Vocabulary, Workload, check_context, prompt_len, warm_up
from llmq.memplan.gpu import detect_gpus


@dataclass(frozen=True, slots=True)
class ServeRun:
    """One load and what came of it. ``counters``: how much the server's own grew meanwhile; ``joules``: what the
    machine's only card spent, if the server is on this machine. None: nobody says."""

    load: Load
    outcome: Outcome
    metrics: Metrics
    counters: dict[str, int] | None
    joules: float | None

    @property
    def joules_per_token(self) -> float | None:
        """Of output."""
        tokens = self.metrics.total_output_tokens
        return None if self.joules is None or not tokens else self.joules / tokens

    def as_json(self) -> dict[str, Any]:
        counters = self.counters or {}
        return {
            **self.load.as_json(),
            **self.metrics.as_json(),
            "completion_rate": self.outcome.completion_rate,
            "preemptions": counters.get("preemptions"),
            "joules": self.joules,
            "joules_per_token": self.joules_per_token,
            "errors": list(self.outcome.errors),
        }


@dataclass(frozen=True, slots=True)
class Client:
    """A server, and the prompts that suit it."""

    endpoint: Endpoint
    workload: Workload
    vocabulary: Vocabulary | None

    @property
    def card(self) -> Card | None:
        """That the server runs on, if it is on this machine, which has no other."""
        return open_card() if self.endpoint.is_local else None

    def items(self, cell: int) -> list[Item]:
        """The requests of measurement ``cell``. LlmqError when the server cannot take one of them."""
        items = items_of(self.workload, self.vocabulary, cell)
        self.endpoint.check(items)
        # Words are about as many as tokens: only what was counted is held against the context.
        if self.endpoint.context_length is not None and self.vocabulary is not None:
            check_context(items, self.vocabulary, self.endpoint.context_length)
        return items

    async def warm_up(self, items: Sequence[Item], load: Load, cell: int = 0) -> None:
        """Other prompts of the same shapes, as many, under the same load: what a server compiles or allocates when it
        first meets a shape is not measured."""
        await self._run(warm_up(items, self.vocabulary, self.workload.seed, cell), load, None)

    async def measure(
        self, items: Sequence[Item], load: Load, goodput: Goodput | None, progress: Progress | None
    ) -> ServeRun:
        """Put ``load`` on the server."""
        before = await self.endpoint.counters()
        meter = start_meter(self.card)
        outcome = await self._run(items, load, progress)
        joules = meter.joules
        after, counters = await self.endpoint.counters(), None
        if before is not None and after is not None:
            counters = {name: after[name] - before.get(name, 0) for name in after}
        metrics = outcome.metrics(goodput)
        if metrics.cached_tokens is None and counters is not None:
            metrics = replace(metrics, cached_tokens=counters.get("prefix_cache_hits"))
        return ServeRun(load, outcome, metrics, counters, joules)

    def as_json(self) -> dict[str, Any]:
        """What was asked, of whom, from where."""
        card = self.card
        return {
            "backend": "openai-chat" if self.endpoint.chat else "openai",
            "base_url": self.endpoint.url,
            "model_id": self.endpoint.model,
            "endpoint": "chat" if self.endpoint.chat else "completions",
            **setting(detect_gpus()[0].name if card else cpu_name(), card),
            **self.workload.as_json(),
            "temperature": 0.0,
            "ignore_eos": self.endpoint.ignore_eos,
            "definitions": DEFINITIONS,
        }

    async def _run(self, items: Sequence[Item], load: Load, progress: Progress | None) -> Outcome:
        lengths = [prompt_len(item, self.vocabulary) for item in items]
        return await run_load(self.endpoint, items, load, seed=self.workload.seed, lengths=lengths, progress=progress)


@dataclass(frozen=True, slots=True)
class ServeReport:
    """A server under one load. ``peer``: another server under the same, in turns."""

    client: Client
    run: ServeRun
    peer: Comparison | None

    def as_json(self) -> dict[str, Any]:
        peer = None if self.peer is None else self.peer.as_json()
        return {**self.client.as_json(), **self.run.as_json(), "peer": peer}


def bench_serve(
    url: str,
    workload: Workload,
    load: Load,
    *,
    model: str | None = None,
    tokenizer: str | None = None,
    api_key: str | None = None,
    chat: bool = False,
    ignore_eos: bool = True,
    goodput: Goodput | None = None,
    peer: str | None = None,
    progress: Progress | None = None,
) -> ServeReport:
    """Put ``load`` with the requests of ``workload`` on the server at ``url``, after a warm-up.

    ``tokenizer``: the model folder whose tokens random prompts are made of. ``peer``: the URL of another server, which
    has its turn after ours ROUNDS times, each time with fresh prompts.

    LlmqError before anything is measured when a server does not answer, or the workload does not fit it.
    """

    async def run() -> ServeReport:
        client = await open_client(url, workload, model, tokenizer, api_key, chat, ignore_eos)
        other = None if peer is None else await open_client(peer, workload, None, tokenizer, api_key, chat, ignore_eos)
        items = client.items(0)
        load.schedule(items, workload.seed)
        rounds = [] if other is None else [client.items(cell) for cell in range(1, ROUNDS + 1)]
        await client.warm_up(items, load)
        measured = await client.measure(items, load, goodput, progress)
        if other is None:
            return ServeReport(client, measured, None)
        await other.warm_up(items, load)
        found = []
        for own in rounds:
            runs = [await one.measure(own, load, goodput, None) for one in (client, other)]
            found.append((figures(runs[0].metrics), figures(runs[1].metrics)))
        return ServeReport(client, measured, Comparison(other.endpoint.url, None, tuple(found)))

    return asyncio.run(run())


async def open_client(
    url: str,
    workload: Workload,
    model: str | None,
    tokenizer: str | None,
    api_key: str | None,
    chat: bool,
    ignore_eos: bool,
) -> Client:
    """A client of the server at ``url``. LlmqError when it does not answer."""
    endpoint = await connect(url, model=model, api_key=api_key, chat=chat, ignore_eos=ignore_eos)
    return Client(endpoint, workload, endpoint.vocabulary(tokenizer))
