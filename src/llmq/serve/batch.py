"""Lines of OpenAI's batch files, and the answers to them.

    {"custom_id": …, "method": "POST", "url": "/v1/chat/completions", "body": {…}}
    {"id": …, "custom_id": …, "response": {"status_code": …, "request_id": …, "body": {…}}, "error": null}

Format: https://platform.openai.com/docs/api-reference/batch
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from llmq.checkpoint.tokenizer import Tokenizer
from llmq.serve.answers import Answer
from llmq.serve.errors import ApiError
from llmq.serve.protocol import ChatRequest, CompletionRequest
from llmq.serve.replies import Echo, Envelope, chat_choice, completion_choice, usage

if TYPE_CHECKING:
    from llmq.llm import Prompt, RequestOutput

Body = CompletionRequest | ChatRequest
BODIES: dict[str, type[CompletionRequest] | type[ChatRequest]] = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatRequest,
}


class _Line(BaseModel):
    model_config = ConfigDict(extra="allow")

    custom_id: str = Field(min_length=1)
    method: Literal["POST"] = "POST"
    url: str
    body: dict[str, Any]


def is_request(fields: object) -> bool:
    """Whether a line of an input file is one of OpenAI's."""
    return isinstance(fields, dict) and "body" in fields


def is_answer(fields: Mapping[str, Any]) -> bool:
    """Whether a line of an output file is one of OpenAI's: a plain one has an index, and may have the user's fields."""
    return "response" in fields and "index" not in fields


def failed(answer: Mapping[str, Any]) -> bool:
    """Whether the request was refused."""
    return bool(answer["response"]["status_code"] != 200)


def read_request(fields: Mapping[str, Any]) -> tuple[Prompt, Body]:
    """The prompt of a line, and its body, which says how to sample; the model's name in it is not looked at.

    Raises pydantic's ValidationError, or ApiError, when it cannot be run.
    """
    line = _Line.model_validate(fields)
    if line.url not in BODIES:
        raise ApiError(404, f"there is no {line.url}, only {' and '.join(BODIES)}")
    body = BODIES[line.url].model_validate(line.body)
    body.params()
    if body.stream:
        raise ApiError(400, "a line cannot be streamed: leave stream out")
    if isinstance(body, ChatRequest):
        return body.conversation, body
    if len(body.prompts) > 1:
        raise ApiError(400, "a line has one prompt: write a line for each")
    return body.prompts[0], body


def answer_line(custom_id: str, body: Body, output: RequestOutput, tokenizer: Tokenizer) -> dict[str, Any]:
    """The line that answers ``body``."""
    if output.error is None:
        status, answer = 200, _answer(body, output, tokenizer)
    else:
        error = ApiError(400, output.error.message)
        status, answer = error.status, error.body
    response = {"status_code": status, "request_id": f"req-{custom_id}", "body": answer}
    return {"id": f"batch_req-{custom_id}", "custom_id": custom_id, "response": response, "error": None}


def _answer(body: Body, output: RequestOutput, tokenizer: Tokenizer) -> dict[str, Any]:
    """What ``llmq serve`` answers."""

    def token_text(token_id: int) -> str:
        return tokenizer.decode([token_id], skip_special_tokens=False)

    answers = [
        Answer(one.index, 0, one.text, one.token_ids, one.logprobs, one.finish_reason) for one in output.completions
    ]
    prompt_ids, params = output.prompt_token_ids, body.params()
    counts = usage(len(prompt_ids), output.cached_tokens, sum(len(one.token_ids) for one in answers))
    if isinstance(body, ChatRequest):
        choices = [chat_choice(one, one.index, token_text, top=params.logprobs) for one in answers]
        return Envelope("chat.completion", body.model or "").around(choices, usage=counts)
    echo = None
    if body.echo:
        text = tokenizer.decode(prompt_ids, skip_special_tokens=True)
        echo = Echo(text, prompt_ids, [None, *output.prompt_logprobs])
    choices = [completion_choice(one, one.index, token_text, top=params.logprobs, echo=echo) for one in answers]
    return Envelope("text_completion", body.model or "").around(choices, usage=counts)
