"""What comes out of the engine token by token."""

from __future__ import annotations

from typing import NamedTuple

from llmq.engine.request import FinishReason
from llmq.plan import TokenLogprobs


class TokenDelta(NamedTuple):
    """A token that completion ``sample`` of a request has just got. The last one says why it ended: ``stop``, by that
    token, or ``length``. The first of a request says how many seconds that waited to be let in, and how many tokens of
    its prompt were in the prefix cache then."""

    request_index: int
    sample: int
    token_id: int
    logprobs: TokenLogprobs | None
    finish_reason: FinishReason | None
    queue_seconds: float | None = None
    cached_tokens: int | None = None
