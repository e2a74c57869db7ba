"""What clients may ask for: OpenAI's request bodies, with vLLM's extensions, and the SamplingParams they mean.

API: https://platform.openai.com/docs/api-reference (completions, chat). What is known there and not done here is
refused; fields that nobody knows are let pass, as clients send all sorts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from llmq.engine.grammar import ANY_OBJECT
from llmq.engine.request import SamplingParams
from llmq.errors import LlmqError
from llmq.serve.errors import ApiError

TokenIds = list[int]
DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's max_tokens of a completion; a chat answer may be as long as there is room."""


_SAME_NAMES = (
    "temperature", "top_p", "n", "seed", "presence_penalty", "frequency_penalty", "min_p", "repetition_penalty",
    "ignore_eos", "min_tokens", "best_of", "priority",
)  # fmt: skip
"""Fields that SamplingParams has under the same names."""


class _Body(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


class StreamOptions(_Body):
    """``include_usage``: a last chunk says how many tokens there were."""

    include_usage: bool | None = None


class JsonSchema(_Body):
    """A JSON Schema; none stands for any object."""

    name: str | None = None
    description: str | None = None
    strict: bool | None = None
    """As good as true: what cannot be followed to the letter is refused."""
    content: dict[str, Any] | None = Field(None, alias="schema")


class ResponseFormat(_Body):
    """What an answer is: ``text``, whatever the model says; ``json_object``; or JSON of a ``json_schema``."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @property
    def schema_text(self) -> str | None:
        """As SamplingParams takes it. ApiError when there is none."""
        if self.type == "text":
            return None
        if self.type == "json_object":
            return ANY_OBJECT
        if self.json_schema is None:
            raise ApiError(400, "the type json_schema goes with a json_schema", param="response_format")
        content = self.json_schema.content
        return ANY_OBJECT if content is None else json.dumps(content)


class _Generate(_Body):
    """What completions and chats have in common. A null is as good as nothing."""

    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, Any] | None = None
    response_format: ResponseFormat | None = None
    user: str | None = None
    # vLLM's
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    best_of: int | None = None
    priority: int | None = None
    structured_outputs: dict[str, Any] | None = None
    return_token_ids: bool | None = None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def _params(
        self, *, max_tokens: int | None, logprobs: int | None, prompt_logprobs: int | None = None
    ) -> SamplingParams:
        """What is not given is left to SamplingParams' defaults. ApiError when something is out of range."""
        self._refuse_what_is_missing()
        given: dict[str, Any] = {name: getattr(self, name) for name in _SAME_NAMES}
        given |= {
            "top_k": 0 if self.top_k == -1 else self.top_k,  # vLLM says "all" with -1
            "stop": (self.stop,) if isinstance(self.stop, str) else self.stop and tuple(self.stop),
            "stop_token_ids": self.stop_token_ids and tuple(self.stop_token_ids),
            "include_stop": self.include_stop_str_in_output,
            "json_schema": self.response_format and self.response_format.schema_text,
            "logprobs": logprobs,
            "prompt_logprobs": prompt_logprobs,
        }
        try:
            return SamplingParams(
                max_tokens=max_tokens, **{name: value for name, value in given.items() if value is not None}
            )
        except LlmqError as error:
            raise ApiError(400, error.message, param=error.message.split(" ", 1)[0]) from None

    def _refuse_what_is_missing(self) -> None:
        for field in ("logit_bias", "structured_outputs"):
            if getattr(self, field):
                raise unsupported(field)
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options goes with stream: true", param="stream_options")
        if self.stream and self.best_of is not None and self.best_of > (self.n or 1):
            raise ApiError(400, "the best of several answers cannot be streamed: leave best_of out", param="best_of")


class CompletionRequest(_Generate):
    """The body of POST /v1/completions."""

    prompt: str | TokenIds | list[str] | list[TokenIds]
    suffix: str | None = None
    echo: bool | None = None
    logprobs: int | None = None

    @property
    def prompts(self) -> Sequence[str | TokenIds]:
        """One or several, each a text or token ids. ApiError when there is none."""
        prompt = self.prompt
        if prompt:
            if isinstance(prompt, str) or isinstance(prompt[0], int):
                return [prompt]
            if all(prompt):
                return prompt
        raise ApiError(400, "the prompt is empty: give at least one character or token", param="prompt")

    def params(self) -> SamplingParams:
        """ApiError when a field is out of range, or asks for what llmq does not do."""
        if self.suffix:
            raise unsupported("suffix")
        scored = bool(self.echo) and self.logprobs is not None
        if scored and self.stream:
            raise ApiError(
                400, "log-probabilities of the prompt cannot be streamed: leave echo or stream out", param="echo"
            )
        return self._params(
            max_tokens=DEFAULT_COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens,
            logprobs=self.logprobs,
            prompt_logprobs=self.logprobs if scored else None,
        )


class TextPart(_Body):
    """A piece of a message."""

    type: Literal["text"]
    text: str


class Message(_Body):
    """One turn of a conversation. Whatever else it holds, the model's chat template sees too."""

    role: str
    content: str | list[TextPart] | None = None

    def flat(self) -> dict[str, Any]:
        """The message with its content as one text."""
        content = self.content
        text = content if isinstance(content, str) else "".join(part.text for part in content or [])
        return {**(self.model_extra or {}), "role": self.role, "content": text}


class ChatRequest(_Generate):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Any] | None = None
    functions: list[Any] | None = None
    audio: dict[str, Any] | None = None
    modalities: list[str] | None = None

    @property
    def conversation(self) -> list[dict[str, Any]]:
        """The messages as a chat template takes them."""
        return [message.flat() for message in self.messages]

    def params(self) -> SamplingParams:
        """ApiError when a field is out of range, or asks for what llmq does not do."""
        for field in ("tools", "functions", "audio"):
            if getattr(self, field):
                raise unsupported(field)
        if self.modalities not in (None, [], ["text"]):
            raise unsupported("modalities")
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs goes with logprobs: true", param="top_logprobs")
        most = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return self._params(max_tokens=most, logprobs=(self.top_logprobs or 0) if self.logprobs else None)


class TokenizeRequest(_Body):
    """The body of POST /tokenize: a prompt or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool = True


class DetokenizeRequest(_Body):
    """The body of POST /detokenize."""

    model: str | None = None
    tokens: list[int]


def unsupported(field: str) -> ApiError:
    """The answer to a field that OpenAI knows and llmq does not do."""
    return ApiError(400, f"{field} is not supported here: leave it out", param=field, code="unsupported_parameter")
