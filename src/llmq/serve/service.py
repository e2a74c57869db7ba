"""What the routes work with: the model's facts, its tokenizer, and the way into the engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from llmq.checkpoint.config import ModelConfig
from llmq.checkpoint.tokenizer import Tokenizer, encode_chat, encode_text
from llmq.engine.admission import Limits, Rejected
from llmq.engine.grammar import Grammars
from llmq.engine.request import SamplingParams
from llmq.errors import LlmqError
from llmq.serve.answers import Generation
from llmq.serve.client import EngineClient
from llmq.serve.errors import CONTEXT_LENGTH_EXCEEDED, ApiError
from llmq.serve.options import ServeOptions

RETRY_SECONDS = 1
LONG_TEXT = 10_000
"""Characters whose tokens take so long that the event loop must not wait for them."""


@dataclass(frozen=True, slots=True)
class Service:
    """``model``, as it was named to us, served under ``name``. ``created``: Unix seconds.

    Without a tokenizer, prompts are token ids and answers have no text.
    """

    name: str
    model: str
    config: ModelConfig
    tokenizer: Tokenizer | None
    grammars: Grammars
    limits: Limits
    client: EngineClient
    options: ServeOptions
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def card(self) -> dict[str, Any]:
        """OpenAI's model object."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "llmq",
            "root": self.model,
            "max_model_len": self.limits.context,
        }

    def check_model(self, name: str | None) -> None:
        """ApiError unless this is the model that a client asks for."""
        if name not in (None, self.name):
            raise ApiError(
                404, f"there is no model {name!r} here, only {self.name!r}", param="model", code="model_not_found"
            )

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text that clients see: without special tokens."""
        return "" if self.tokenizer is None else self.tokenizer.decode(token_ids, skip_special_tokens=True)

    def text(self, token_ids: Sequence[int]) -> str:
        """The text of tokens, special ones included."""
        return "" if self.tokenizer is None else self.tokenizer.decode(token_ids, skip_special_tokens=False)

    async def encode(self, prompt: str | list[int], *, special_tokens: bool = True) -> list[int]:
        """The prompt's token ids. ApiError where they are not the model's, or it has no tokenizer."""
        if isinstance(prompt, str):
            return await self._tokenize(encode_text, prompt, special_tokens)
        self.check_token_ids(prompt)
        return prompt

    async def encode_chat(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """The conversation's token ids. ApiError when the model has no chat template, or it refuses the messages."""
        return await self._tokenize(encode_chat, messages)

    def check_token_ids(self, token_ids: Sequence[int], *, param: str | None = None) -> None:
        """ApiError unless all are in the vocabulary."""
        if not all(0 <= token < self.config.vocab_size for token in token_ids):
            raise ApiError(400, f"a token id is outside the vocabulary of {self.config.vocab_size}", param=param)

    async def check_schema(self, params: SamplingParams) -> None:
        """ApiError when answers are to fit a JSON Schema that cannot be followed here."""
        if params.json_schema is None:
            return
        try:
            # The engine will do the same; large ones take a while.
            await asyncio.to_thread(self.grammars.matcher, params.json_schema)
        except LlmqError as error:
            raise ApiError(400, error.message, param="response_format") from None

    def start(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> list[Generation]:
        """Hand ``prompts`` to the engine, all or none. ApiError when one can never run, or the queue is full."""
        self.check_token_ids(params.stop_token_ids, param="stop_token_ids")
        for prompt_ids in prompts:
            if not prompt_ids:
                raise ApiError(400, "the prompt has no tokens")
            self._check_limits(len(prompt_ids), params)
        most = self.options.max_queue
        if len(prompts) > most:
            raise ApiError(400, f"{len(prompts)} prompts in a request, and {most} may wait here", param="prompt")
        if self.client.waiting + len(prompts) > most:
            self.client.metrics.refused += len(prompts)
            raise ApiError(
                429,
                f"{self.client.waiting} prompts wait already: try again later",
                code="queue_full",
                headers={"Retry-After": str(RETRY_SECONDS)},
            )
        return [Generation(self.client, self.decode, prompt_ids, params) for prompt_ids in prompts]

    def _check_limits(self, prompt_tokens: int, params: SamplingParams) -> None:
        try:
            self.limits.max_total(prompt_tokens, params)
        except Rejected as error:
            if error.check != "context":
                raise ApiError(400, error.message) from None
            # Clients look for OpenAI's words.
            message = (
                f"this model's maximum context length is {self.limits.context} tokens, the answer included: {error}"
            )
            raise ApiError(400, message, code=CONTEXT_LENGTH_EXCEEDED) from None

    async def _tokenize(self, encode: Callable[..., list[int]], prompt: Any, *arguments: Any) -> list[int]:
        if self.tokenizer is None:
            raise ApiError(400, "the model has no tokenizer: give token ids")
        characters = sum(len(str(one)) for one in prompt) if isinstance(prompt, list) else len(prompt)
        try:
            if characters > LONG_TEXT:
                return await asyncio.to_thread(encode, self.tokenizer, prompt, *arguments)
            return encode(self.tokenizer, prompt, *arguments)
        except LlmqError as error:
            raise ApiError(400, error.message) from None
