"""Answers as OpenAI's objects: whole, or chunk by chunk.

API: https://platform.openai.com/docs/api-reference/completions/object, …/chat/object, …/chat/streaming
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from secrets import token_hex
from typing import Any, Literal

from llmq.engine.detokenizer import INCOMPLETE
from llmq.plan import TokenLogprobs
from llmq.serve.answers import Answer

TokenText = Callable[[int], str]
"""The text of a single token."""
LEAST_LOGPROB = -9999.0
"""What stands for minus infinity, which JSON has not."""
Kind = Literal["text_completion", "chat.completion", "chat.completion.chunk"]
_PREFIXES: dict[Kind, str] = {
    "text_completion": "cmpl",
    "chat.completion": "chatcmpl",
    "chat.completion.chunk": "chatcmpl",
}


@dataclass(frozen=True, slots=True)
class Envelope:
    """What the object of an answer, or all chunks of a stream, have in common. ``created``: Unix seconds."""

    kind: Kind
    model: str
    number: str = field(default_factory=lambda: token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def around(self, choices: Sequence[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """The whole object."""
        return {
            "id": f"{_PREFIXES[self.kind]}-{self.number}",
            "object": self.kind,
            "created": self.created,
            "model": self.model,
            "choices": list(choices),
            **more,
        }


@dataclass(frozen=True, slots=True)
class Echo:
    """The prompt, to stand before its answer: ``logprobs`` has None for the first token."""

    text: str = ""
    token_ids: Sequence[int] = ()
    logprobs: Sequence[TokenLogprobs | None] = ()


def usage(prompt_tokens: int, cached_tokens: int, completion_tokens: int) -> dict[str, Any]:
    """How many tokens were read, those in the prefix cache among them, and written."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


def completion_choice(
    answer: Answer, index: int, token_text: TokenText, *, top: int | None, echo: Echo | None = None
) -> dict[str, Any]:
    """An answer, or a piece of one. ``top``: how many likeliest tokens to name; None: no log-probabilities."""
    echo = echo or Echo()
    logprobs = None
    if top is not None:
        scores = (*echo.logprobs, *answer.logprobs)
        logprobs = _completion_logprobs((*echo.token_ids, *answer.token_ids), scores, answer.offset, token_text, top)
    text = echo.text + answer.text
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": answer.finish_reason}


def chat_choice(answer: Answer, index: int, token_text: TokenText, *, top: int | None) -> dict[str, Any]:
    """A whole answer as a message."""
    message = {"role": "assistant", "content": answer.text}
    logprobs = _chat_logprobs(answer, token_text, top)
    return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": answer.finish_reason}


def chat_opening(index: int) -> dict[str, Any]:
    """The first chunk of an answer, before there is any text."""
    delta = {"role": "assistant", "content": ""}
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


def chat_piece(answer: Answer, index: int, token_text: TokenText, *, top: int | None) -> dict[str, Any]:
    """A piece of an answer."""
    delta = {"content": answer.text} if answer.text else {}
    logprobs = _chat_logprobs(answer, token_text, top)
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": answer.finish_reason}


def _completion_logprobs(
    token_ids: Sequence[int], scores: Sequence[TokenLogprobs | None], offset: int, token_text: TokenText, top: int
) -> dict[str, Any]:
    texts = [token_text(token_id) for token_id in token_ids]
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    likeliest = [
        None
        if score is None
        else {token_text(token_id): _finite(logprob) for token_id, logprob in score.top[:top]}
        | {text: _finite(score.logprob)}
        for text, score in zip(texts, scores, strict=True)
    ]
    return {
        "tokens": texts,
        "token_logprobs": [None if score is None else _finite(score.logprob) for score in scores],
        "top_logprobs": likeliest,
        "text_offset": offsets,
    }


def _chat_logprobs(answer: Answer, token_text: TokenText, top: int | None) -> dict[str, Any] | None:
    if top is None:
        return None

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        text = token_text(token_id)
        # Of a token that is a part of a character the text does not tell the bytes.
        characters = None if INCOMPLETE in text else list(text.encode())
        return {"token": text, "logprob": _finite(logprob), "bytes": characters}

    content = [
        entry(token_id, score.logprob) | {"top_logprobs": [entry(*likely) for likely in score.top[:top]]}
        for token_id, score in zip(answer.token_ids, answer.logprobs, strict=True)
    ]
    return {"content": content, "refusal": None}


def _finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)
