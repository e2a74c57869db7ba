"""What the server's two processes say to each other, pickled by ``multiprocessing`` between a parent and its own child.

Plain tuples: hundreds of them cross in a step. From the engine come, of each request, TokenDeltas and a Done.
"""

from __future__ import annotations

from array import array
from typing import NamedTuple

from llmq.engine.admission import Limits
from llmq.engine.outputs import TokenDelta
from llmq.engine.request import FinishReason, SamplingParams
from llmq.plan import TokenLogprobs


class Submit(NamedTuple):
    """To the engine: run this prompt."""

    request_id: int
    prompt_ids: array[int]
    params: SamplingParams


class Finish(NamedTuple):
    """To the engine: this answer ends here, by a stop text."""

    request_id: int
    sample: int


class Abort(NamedTuple):
    """To the engine: nobody waits for this any more."""

    request_id: int


Order = Submit | Finish | Abort | None
"""None: end."""


class Ranked(NamedTuple):
    """An answer of a request whose samples were ranked, which comes whole."""

    token_ids: list[int]
    logprobs: list[TokenLogprobs]
    finish_reason: FinishReason | None


class Done(NamedTuple):
    """From the engine: no more comes of this request."""

    request_id: int
    prompt_logprobs: list[TokenLogprobs]
    cached_tokens: int
    ranked: list[Ranked]


class Refused(NamedTuple):
    """From the engine: this can never run."""

    request_id: int
    message: str


Event = TokenDelta | Done | Refused


class Load(NamedTuple):
    """How full the engine is: requests in its queues, blocks that they own, and counts since the start."""

    running: int = 0
    waiting: int = 0
    used_blocks: int = 0
    steps: int = 0
    tokens: int = 0
    preemptions: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0


class Step(NamedTuple):
    """From the engine: what one step brought, and how full it is now."""

    events: list[Event]
    load: Load


class Ready(NamedTuple):
    """From the engine, once: it is loaded. ``limits`` are a copy of the engine's, whose pool is empty."""

    limits: Limits
    device: str
    dtype: str


class Failed(NamedTuple):
    """From the engine, instead of Ready: the model cannot be run."""

    message: str
    hint: str | None
    exit_code: int
