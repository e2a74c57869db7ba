"""A model behind OpenAI's HTTP interface, as a target of load: every answer is streamed, and each piece gets its time.

Tokens are counted by the server, where its stream ends with usage: what is told in text cannot be counted here without
its tokenizer, and a piece may be several tokens.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmq.bench.http import Address, Response, parse_url
from llmq.bench.load import Failure, Reply
from llmq.bench.workload import Item, Vocabulary, vocabulary_of
from llmq.checkpoint.folder import DEMO, resolve
from llmq.errors import USAGE, LlmqError

SILENCE_SECONDS = 600.0
"""A server that says nothing for so long has failed."""
COUNTERS = {"preemptions": "num_preemptions_total", "prefix_cache_hits": "prefix_cache_hits_total"}
"""What vLLM's and llmq's /metrics count."""
NO_HTTP = (OSError, EOFError, ValueError, asyncio.LimitOverrunError)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A model that is served. ``root`` is what its server loaded it from, ``context_length`` how long its sequences may
    get: None where the server does not say. ``ignore_eos``: ask for answers that do not end before their length."""

    url: str
    address: Address
    headers: dict[str, str]
    model: str
    root: str | None
    context_length: int | None
    chat: bool
    ignore_eos: bool

    async def send(self, item: Item) -> Reply:
        """The answer to one request, streamed. Raises Failure."""
        loop = asyncio.get_running_loop()
        times: list[float] = []
        usage: dict[str, Any] = {}
        path = "/v1/chat/completions" if self.chat else "/v1/completions"
        try:
            async with (
                asyncio.timeout(SILENCE_SECONDS) as silence,
                self.address.request(path, headers=self.headers, body=self.body(item)) as response,
            ):
                if response.status != 200:
                    raise Failure(await _refusal(response))
                async with aclosing(_events(response)) as events:
                    async for event in events:
                        silence.reschedule(loop.time() + SILENCE_SECONDS)
                        if "error" in event:
                            raise Failure(f"the server gave up: {_message(event)}")
                        if any(map(_says_something, event.get("choices") or ())):
                            times.append(loop.time())
                        usage = event.get("usage") or usage
        except TimeoutError:
            raise Failure(f"no answer for {SILENCE_SECONDS:g} s") from None
        except NO_HTTP as error:
            raise Failure(f"the connection failed: {_reason(error)}") from None
        written = usage.get("completion_tokens")
        tokens = len(times) if written is None else written
        if not times or (self.ignore_eos and tokens < item.output_len):
            raise Failure(f"ended after {tokens} of {item.output_len} tokens")
        details = usage.get("prompt_tokens_details") or {}
        return Reply(times, usage.get("prompt_tokens"), written, details.get("cached_tokens"))

    def body(self, item: Item) -> bytes:
        """The request that ``item`` is: greedy, streamed, of a fixed length."""
        prompt = item.prompt
        fields: dict[str, Any] = {"model": self.model}
        if self.chat:
            fields["messages"] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        else:
            fields["prompt"] = prompt
        fields |= {"max_tokens": item.output_len, "temperature": 0.0, "stream": True}
        fields |= {"stream_options": {"include_usage": True}}
        if self.ignore_eos:
            fields["ignore_eos"] = True
        return json.dumps(fields).encode()

    def check(self, items: list[Item]) -> None:
        """LlmqError unless the interface takes prompts of this kind."""
        for number, item in enumerate(items, 1):
            kind = "text" if isinstance(item.prompt, str) else "ids" if isinstance(item.prompt[0], int) else "messages"
            if kind == ("ids" if self.chat else "messages"):
                taken = "texts or messages" if self.chat else "texts or token ids"
                other = "completions" if self.chat else "chat"
                raise LlmqError(f"request {number}: {self.url} is asked with {taken} only", f"--endpoint {other}")

    async def counters(self) -> dict[str, int] | None:
        """COUNTERS now; None where the server has none."""
        try:
            async with self.address.request("/metrics", headers=self.headers) as response:
                page = (await response.whole()).decode() if response.status == 200 else ""
        except NO_HTTP:
            return None
        found = {}
        for name, counter in COUNTERS.items():
            values = re.findall(rf"^\w+:{counter}(?:{{.*}})? (\S+)$", page, re.MULTILINE)
            if values:
                found[name] = int(sum(map(float, values)))
        return found or None

    @property
    def is_local(self) -> bool:
        return self.address.host in ("localhost", "127.0.0.1", "::1")

    def vocabulary(self, tokenizer: str | None) -> Vocabulary | None:
        """Of the model ``tokenizer``, else of the one that the server runs, if it is here; None: prompts are texts."""
        if self.chat:
            if tokenizer is not None:
                hint = "leave out --tokenizer, or pass --endpoint completions"
                raise LlmqError("chat is asked with texts, not with tokens", hint, exit_code=USAGE)
            return None
        if tokenizer is not None:
            return vocabulary_of(resolve(tokenizer))
        known = self.root is not None and (self.root == DEMO or Path(self.root, "config.json").is_file())
        return vocabulary_of(resolve(self.root)) if self.root is not None and known else None


async def connect(
    url: str, *, model: str | None = None, api_key: str | None = None, chat: bool = False, ignore_eos: bool = True
) -> Endpoint:
    """The model called ``model`` at ``url``; None: the first that it lists. LlmqError when it does not answer."""
    address = parse_url(url)
    headers = {"Content-Type": "application/json"}
    if api_key is not None:
        headers["Authorization"] = f"Bearer {api_key}"
    try:
        async with address.request("/v1/models", headers=headers) as response:
            if response.status != 200:
                raise LlmqError(f"{url} answers {await _refusal(response)}", "check the URL and --api-key")
            cards = json.loads(await response.whole())["data"]
            known = {str(card["id"]): card for card in cards}
    except (*NO_HTTP, KeyError, TypeError) as error:
        raise LlmqError(
            f"{url} does not answer: {_reason(error)}", "is a server running there? llmq serve demo"
        ) from None
    name = model or next(iter(known), None)
    if name not in known or name is None:
        raise LlmqError(f"{url} serves no model {name or 'at all'}", f"it has {', '.join(known) or 'none'}")
    card = known[name]
    return Endpoint(url, address, headers, name, card.get("root"), card.get("max_model_len"), chat, ignore_eos)


async def _events(response: Response) -> AsyncGenerator[dict[str, Any]]:
    """The objects of a stream of server-sent events, to its end or to [DONE]."""
    rest = b""
    async with aclosing(response.body()) as pieces:
        async for piece in pieces:
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                name, _, data = line.partition(b":")
                if name == b"data" and data.strip() != b"[DONE]":
                    yield json.loads(data)


def _says_something(choice: dict[str, Any]) -> bool:
    """Whether a piece is output: text, tokens that have none, or the end, which may be a token without a text too."""
    delta = choice.get("delta") or choice
    texts = (delta.get("content"), delta.get("text"), delta.get("reasoning_content"), choice.get("token_ids"))
    return any(texts) or choice.get("finish_reason") is not None


async def _refusal(response: Response) -> str:
    return f"{response.status}: {_message(await response.whole())}"


def _message(said: bytes | dict[str, Any]) -> str:
    """OpenAI's message, where there is one."""
    try:
        event = json.loads(said) if isinstance(said, bytes) else said
        return str(event["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return str(said)[:100]


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
