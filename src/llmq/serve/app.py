"""The HTTP interface: OpenAI's routes, and those that vLLM's clients expect beside them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware

from llmq import __version__
from llmq.engine.request import SamplingParams
from llmq.serve import metrics
from llmq.serve.answers import Answer, Generation
from llmq.serve.errors import ApiError
from llmq.serve.middleware import LOG_FIELDS, AccessLog, ApiKeys, WholeBody
from llmq.serve.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from llmq.serve.replies import Echo, Envelope, Kind, chat_choice, chat_opening, chat_piece, completion_choice, usage
from llmq.serve.service import Service
from llmq.serve.streaming import ClientLeft, EventStream, as_api_error, collect, merged, until_failure, while_connected

CLIENT_LEFT = 499
"""The status in the log when nobody waited for the answer: nginx's."""

Choice = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Form:
    """How the answers of one endpoint look, each under its index: ``whole``, or as pieces with perhaps an opening."""

    object: Kind
    chunk: Kind
    whole: Callable[[Generation, Answer, int], Choice]
    piece: Callable[[Answer, int], Choice]
    opening: Callable[[Generation, int], Choice] | None


def create_app(service: Service) -> FastAPI:
    """The routes, in front of ``service``."""
    app = FastAPI(
        title="llmq",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        middleware=[
            Middleware(AccessLog),
            Middleware(ApiKeys, keys=service.options.api_keys),
            Middleware(WholeBody),
        ],
    )
    _answer_errors(app)
    _add_generation(app, service)
    _add_tokenization(app, service)
    _add_state(app, service)
    return app


def _add_generation(app: FastAPI, service: Service) -> None:
    @lru_cache(maxsize=2**16)
    def token_text(token_id: int) -> str:
        return service.text([token_id])

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue one prompt or several."""
        service.check_model(body.model)
        params = body.params()
        await service.check_schema(params)
        asked = body.prompts
        prompts = [await service.encode(prompt) for prompt in asked]

        def echo(generation: Generation) -> Echo | None:
            if not body.echo:
                return None
            ids = generation.prompt_ids
            return Echo(service.decode(ids), ids, [None, *generation.prompt_logprobs])

        def whole(generation: Generation, answer: Answer, index: int) -> Choice:
            return completion_choice(answer, index, token_text, top=body.logprobs, echo=echo(generation))

        def piece(answer: Answer, index: int) -> Choice:
            return completion_choice(answer, index, token_text, top=body.logprobs)

        def opening(generation: Generation, index: int) -> Choice:
            return completion_choice(Answer(index), index, token_text, top=None, echo=echo(generation))

        form = Form("text_completion", "text_completion", whole, piece, opening if body.echo else None)
        _log_prompts(service, request, asked)
        return await _respond(service, request, body, prompts, params, form)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answer the last message of a conversation."""
        service.check_model(body.model)
        params = body.params()
        await service.check_schema(params)
        prompts = [await service.encode_chat(body.conversation)]

        def whole(generation: Generation, answer: Answer, index: int) -> Choice:
            return chat_choice(answer, index, token_text, top=params.logprobs)

        def piece(answer: Answer, index: int) -> Choice:
            return chat_piece(answer, index, token_text, top=params.logprobs)

        def opening(generation: Generation, index: int) -> Choice:
            return chat_opening(index)

        form = Form("chat.completion", "chat.completion.chunk", whole, piece, opening)
        _log_prompts(service, request, body.conversation)
        return await _respond(service, request, body, prompts, params, form)


async def _respond(
    service: Service,
    request: Request,
    body: CompletionRequest | ChatRequest,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    form: Form,
) -> Response:
    """Run ``prompts``; choice number i · n + k is answer k to prompt i."""
    generations = service.start(prompts, params)
    seconds = service.options.request_timeout
    # Without a tokenizer, token ids are all that there is to an answer.
    shows_tokens = bool(body.return_token_ids) or service.tokenizer is None

    def close() -> None:
        for generation in generations:
            generation.close()
        request.scope[LOG_FIELDS].update(_usage(generations))

    def marked(choice: Choice, answer: Answer) -> Choice:
        return {**choice, "token_ids": answer.token_ids} if shows_tokens else choice

    async def chunks() -> AsyncGenerator[dict[str, Any]]:
        """The events of a stream. Where usage is asked for it is null in all but the last."""
        envelope, more = Envelope(form.chunk, service.name), {"usage": None} if body.include_usage else {}
        if form.opening is not None:
            for number, generation in enumerate(generations):
                for index in range(number * params.n, (number + 1) * params.n):
                    yield envelope.around([form.opening(generation, index)], **more)
        async with aclosing(merged(generations)) as incoming:
            async for number, pieces in incoming:
                choices = [marked(form.piece(piece, number * params.n + piece.index), piece) for piece in pieces]
                yield envelope.around(choices, **more)
        if body.include_usage:
            yield envelope.around([], usage=_usage(generations))

    if body.stream:
        for generation in generations:
            generation.every_token |= shows_tokens
        return EventStream(until_failure(chunks(), seconds), close)
    try:
        async with asyncio.timeout(seconds):
            answers = await while_connected(request.receive, collect(generations))
    except ClientLeft:
        return Response(status_code=CLIENT_LEFT)
    except Exception as error:
        raise as_api_error(error, seconds) from None
    finally:
        close()
    choices = [
        marked(form.whole(generation, answer, number * params.n + answer.index), answer)
        for number, (generation, own) in enumerate(zip(generations, answers, strict=True))
        for answer in own
    ]
    return JSONResponse(Envelope(form.object, service.name).around(choices, usage=_usage(generations)))


def _usage(generations: Sequence[Generation]) -> dict[str, Any]:
    return usage(
        sum(len(generation.prompt_ids) for generation in generations),
        sum(generation.cached_tokens for generation in generations),
        sum(generation.completion_tokens for generation in generations),
    )


def _log_prompts(service: Service, request: Request, prompts: object) -> None:
    if service.options.log_prompts:
        request.scope[LOG_FIELDS]["prompts"] = prompts


def _add_tokenization(app: FastAPI, service: Service) -> None:
    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        """The token ids of a prompt, or of a conversation by the model's chat template."""
        service.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "give either a prompt or messages", param="prompt")
        if body.messages is not None:
            token_ids = await service.encode_chat([message.flat() for message in body.messages])
        else:
            token_ids = await service.encode(body.prompt or "", special_tokens=body.add_special_tokens)
        return {"count": len(token_ids), "max_model_len": service.limits.context, "tokens": token_ids}

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, str]:
        """The text of token ids."""
        service.check_model(body.model)
        service.check_token_ids(body.tokens)
        return {"prompt": service.text(body.tokens)}


def _add_state(app: FastAPI, service: Service) -> None:
    client, limits = service.client, service.limits

    @app.get("/health")
    async def health() -> Response:
        """200 as long as the engine lives."""
        return Response(status_code=503 if client.died.is_set() else 200)

    @app.get("/version")
    async def version() -> dict[str, str]:
        """Of llmq."""
        return {"version": __version__}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The one model that is served here."""
        return {"object": "list", "data": [service.card]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """The one model that is served here, by its name."""
        service.check_model(name)
        return service.card

    @app.get("/metrics")
    async def prometheus() -> Response:
        """Counters and histograms, for Prometheus."""
        page = client.metrics.render(client.load, client.waiting, limits.blocks.total, limits.options.block_size)
        return Response(page, media_type=metrics.CONTENT_TYPE)


def _answer_errors(app: FastAPI) -> None:
    """OpenAI's error object for whatever fails."""

    def answer(error: ApiError) -> Response:
        return JSONResponse(error.body, error.status, error.headers)

    @app.exception_handler(ApiError)
    async def _refused(request: Request, error: ApiError) -> Response:
        return answer(error)

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> Response:
        if "json" not in request.headers.get("content-type", ""):
            return answer(ApiError(415, "the body must be JSON, and say so: Content-Type: application/json"))
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return answer(
                ApiError(400, f"the body is not JSON: {first['ctx']['error']} at character {first['loc'][1]}")
            )
        # "body" names nothing to a client, and of a union pydantic names every member that it tried.
        place = ".".join(str(part) for part in first["loc"][1:]) or None
        return answer(ApiError(400, f"{place + ': ' if place else ''}{first['msg']}", param=place))

    @app.exception_handler(HTTPException)
    async def _no_route(request: Request, error: HTTPException) -> Response:
        return answer(ApiError(error.status_code, str(error.detail), headers=dict(error.headers or {})))

    @app.exception_handler(Exception)
    async def _failed(request: Request, error: Exception) -> Response:
        return answer(ApiError(500, "the server failed; its log says how"))
