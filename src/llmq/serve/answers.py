"""From prompts to answers: tokens of the engine become text here, and stop texts end it."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field

from llmq.engine.detokenizer import Detokenizer
from llmq.engine.outputs import TokenDelta
from llmq.engine.request import FinishReason, SamplingParams
from llmq.plan import TokenLogprobs
from llmq.serve.client import EngineClient, RequestStream
from llmq.serve.errors import ApiError
from llmq.serve.messages import Done, Ranked, Refused

Decode = Callable[[Sequence[int]], str]


@dataclass(slots=True)
class Answer:
    """One answer, or a piece of one, before which the answer has ``offset`` characters.

    ``logprobs`` has one entry a token, where asked for.
    """

    index: int
    offset: int = 0
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def extend(self, piece: Answer) -> None:
        """Take in the piece that comes next."""
        self.text += piece.text
        self.token_ids += piece.token_ids
        self.logprobs += piece.logprobs
        self.finish_reason = piece.finish_reason


class Generation:
    """One prompt in the engine, and the text of its answers. Close it, whatever happens."""

    def __init__(self, client: EngineClient, decode: Decode, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        self.prompt_ids = prompt_ids
        self.params = params
        self.prompt_logprobs: list[TokenLogprobs] = []
        """Of the prompt's tokens from the second on, where asked for; there when all answers are."""
        self.every_token = params.logprobs is not None
        """Whether pieces come as tokens do, although they have no text yet."""
        self.cached_tokens = 0
        """Of the prompt, those that the prefix cache had."""
        self.completion_tokens = 0
        self._client = client
        self._detokenizers = [
            Detokenizer(decode, prompt_ids, params.stop, include_stop=params.include_stop) for _ in range(params.n)
        ]
        self._reasons: list[FinishReason | None] = [None] * params.n
        self._numbers = [0] * params.n
        self._stream: RequestStream = client.submit(prompt_ids, params)
        client.metrics.prompt_tokens += len(prompt_ids)

    async def pieces(self) -> AsyncGenerator[list[Answer]]:
        """Whatever there is to be read of the answers, as soon as there is something.

        Raises EngineDied, and ApiError when the engine refuses the prompt.
        """
        pieces: dict[int, Answer] = {}
        while None in self._reasons:
            for event in await self._stream.next():
                if isinstance(event, TokenDelta):
                    self._extend(event, pieces)
                elif isinstance(event, Refused):
                    raise ApiError(400, event.message)
                else:
                    self._conclude(event, pieces)
            # A part of a character, or of what may become a stop text, waits for the rest.
            readable = [one for one in pieces.values() if one.text or one.finish_reason or self.every_token]
            for piece in readable:
                del pieces[piece.index]
            if readable:
                yield readable
        if self.params.prompt_logprobs is not None:
            await self._await_prompt_logprobs()

    def close(self) -> None:
        """Count what became of the request; what it still has in the engine is freed."""
        self._stream.close()
        metrics, stream = self._client.metrics, self._stream
        for reason in self._reasons:
            metrics.finished[reason or "abort"] += 1
        metrics.request_prompt_tokens.observe(len(self.prompt_ids))
        metrics.request_generation_tokens.observe(self.completion_tokens)
        metrics.request_params_n.observe(self.params.n)
        if self.params.max_tokens is not None:
            metrics.request_params_max_tokens.observe(self.params.max_tokens)
        metrics.e2e_request_latency.observe(time.perf_counter() - stream.arrival)
        if stream.first is not None and stream.queue_seconds is not None:
            admitted = stream.arrival + stream.queue_seconds
            metrics.request_queue_time.observe(stream.queue_seconds)
            metrics.request_prefill_time.observe(stream.first - admitted)
            metrics.request_decode_time.observe(stream.last - stream.first)
            metrics.request_inference_time.observe(stream.last - admitted)

    def _extend(self, token: TokenDelta, pieces: dict[int, Answer]) -> None:
        """As LLM does it: the same tokens make the same text, and end at the same place."""
        index, params = token.sample, self.params
        if token.cached_tokens is not None:
            self.cached_tokens = token.cached_tokens
        if self._reasons[index] is not None:
            return  # the engine had not heard yet that a stop text ended this one
        self._numbers[index] += 1
        self._count(1)
        detokenizer, reason = self._detokenizers[index], token.finish_reason
        piece = pieces.setdefault(index, Answer(index, len(detokenizer.text)))
        piece.token_ids.append(token.token_id)
        if token.logprobs is not None:
            piece.logprobs.append(token.logprobs)
        hidden = token.finish_reason == "stop" and not params.include_stop
        piece.text += detokenizer.push(
            [] if hidden else [token.token_id], may_stop=self._numbers[index] > params.min_tokens
        )
        if detokenizer.stopped and reason is None:
            self._stream.finish(index)
        if reason is not None:
            piece.text += detokenizer.push([], last=True)
        piece.finish_reason = self._reasons[index] = "stop" if detokenizer.stopped else reason

    def _conclude(self, done: Done, pieces: dict[int, Answer]) -> None:
        self.prompt_logprobs, self.cached_tokens = done.prompt_logprobs, done.cached_tokens
        for index, ranked in enumerate(done.ranked[: self.params.n]):
            self._take_whole(index, ranked, pieces)

    def _take_whole(self, index: int, ranked: Ranked, pieces: dict[int, Answer]) -> None:
        params, detokenizer = self.params, self._detokenizers[index]
        ended = ranked.finish_reason == "stop" and not params.include_stop
        readable = ranked.token_ids[: -1 if ended else None]
        text = detokenizer.push(readable[: params.min_tokens], may_stop=False)
        text += detokenizer.push(readable[params.min_tokens :], last=True)
        reason: FinishReason = "stop" if detokenizer.stopped else ranked.finish_reason or "abort"
        logprobs = [] if params.logprobs is None else ranked.logprobs
        pieces[index] = Answer(index, 0, text, ranked.token_ids, logprobs, reason)
        self._reasons[index] = reason
        self._count(len(ranked.token_ids))

    def _count(self, tokens: int) -> None:
        self.completion_tokens += tokens
        self._client.metrics.generation_tokens += tokens

    async def _await_prompt_logprobs(self) -> None:
        while not self.prompt_logprobs and len(self.prompt_ids) > 1:
            for event in await self._stream.next():
                if isinstance(event, Done):
                    self.prompt_logprobs = event.prompt_logprobs
