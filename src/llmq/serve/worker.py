"""The engine's process: orders in, tokens out, one step after another."""

from __future__ import annotations

import os
import signal
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from llmq.engine.options import EngineOptions
from llmq.engine.outputs import TokenDelta
from llmq.errors import LlmqError
from llmq.serve.messages import Abort, Done, Event, Failed, Finish, Load, Order, Ranked, Ready, Refused, Step, Submit

if TYPE_CHECKING:
    from llmq.llm import LLM, RequestOutput


def run(connection: Connection, model: str, settings: dict[str, Any], options: EngineOptions) -> None:
    """Load ``model`` and serve it until the other end of ``connection`` closes. ``settings``: of LLM, by name.

    Whatever fails after loading ends the process: the other end finds its connection closed.
    """
    # Ctrl-C and a service manager's SIGTERM reach both processes; when this one ends is the other's decision.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        try:
            llm = _load(model, settings, options)
        except LlmqError as error:
            connection.send(Failed(error.message, error.hint, error.exit_code))
            return
        connection.send(Ready(llm.limits, llm.device, str(llm.dtype).removeprefix("torch.")))
        while True:
            events = _obey(llm, connection)
            events += [one if isinstance(one, TokenDelta) else _done(one) for one in llm.step()]
            connection.send(Step(events, _load_of(llm)))
    except (EOFError, ConnectionError):
        return  # the server is gone


def _load(model: str, settings: dict[str, Any], options: EngineOptions) -> LLM:
    import torch

    from llmq.llm import LLM

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) - 1))  # one core is the other process's
    return LLM(model, options=options, text=False, **settings)


def _obey(llm: LLM, connection: Connection) -> list[Event]:
    """Follow all orders that have come; with nothing to do, wait for one."""
    refused: list[Event] = []
    while llm.idle or connection.poll():
        order: Order = connection.recv()
        match order:
            case Submit(request_id, prompt_ids, params):
                try:
                    llm.submit(request_id, prompt_ids, params)
                except LlmqError as error:
                    refused.append(Refused(request_id, error.message))
            case Finish(request_id, sample):
                llm.finish(request_id, sample)
            case Abort(request_id):
                llm.abort(request_id)
            case None:
                raise EOFError
        if refused:
            break
    return refused


def _done(output: RequestOutput) -> Done:
    ranked = [one for one in output.completions if one.score is not None]
    answers = [Ranked(one.token_ids, one.logprobs, one.finish_reason) for one in ranked]
    return Done(output.index, output.prompt_logprobs, output.cached_tokens, answers)


def _load_of(llm: LLM) -> Load:
    now, stats = llm.occupancy, llm.stats
    return Load(
        running=now.running,
        waiting=now.waiting + now.swapped,
        used_blocks=now.used_blocks,
        steps=stats.steps,
        tokens=stats.tokens,
        preemptions=stats.preemptions,
        prefix_queries=stats.prefix_queries,
        prefix_hits=stats.prefix_hits,
    )
