"""A client for any server of OpenAI's chat interface, llmq's own among them, with nothing but Python's library."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from http.client import HTTPException, HTTPResponse
from typing import Any

from llmq.errors import USAGE, LlmqError

TIMEOUT_SECONDS = 600.0
DONE = "[DONE]"
BROKE_OFF = "the server's answer broke off"


class RemoteModel:
    """A model that is served at ``url``, which ends in ``/v1`` or just before it.

    ``model`` is its name; None: the first that the server lists. Raises LlmqError when the server cannot be reached,
    refuses a request, or breaks off its answer.
    """

    def __init__(self, url: str, *, api_key: str | None = None, model: str | None = None) -> None:
        if not url.startswith(("http://", "https://")):
            raise LlmqError(f"{url!r} is no URL", "write --url http://127.0.0.1:8000", exit_code=USAGE)
        self._base = url.rstrip("/").removesuffix("/v1") + "/v1"
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self.name = model or self._first_model()

    def chat(self, messages: Sequence[Mapping[str, Any]], **sampling: Any) -> Iterator[str | int]:
        """The pieces of the answer as they come, and at last the number of its tokens. ``sampling``: fields of the
        request, None where the server may choose."""
        asked = {name: value for name, value in sampling.items() if value is not None}
        stream = {"stream": True, "stream_options": {"include_usage": True}}
        with self._open(
            "/chat/completions", {"model": self.name, "messages": list(messages), **stream, **asked}
        ) as reply:
            ended = False
            for event in _events(reply):
                if event.get("error"):
                    raise LlmqError(f"the server gave up: {_message(event)}")
                for choice in event.get("choices") or ():
                    ended |= choice.get("finish_reason") is not None
                    yield choice["delta"].get("content") or ""
                if event.get("usage"):
                    yield int(event["usage"]["completion_tokens"])
            if not ended:
                raise LlmqError(BROKE_OFF)

    def _first_model(self) -> str:
        with self._open("/models") as reply:
            try:
                models = json.load(reply)["data"]
            except (HTTPException, OSError, ValueError, KeyError, TypeError):
                raise LlmqError(f"{self._base} is not OpenAI's interface", "check --url") from None
        if not models:
            raise LlmqError(f"{self._base} serves no model", "name one")
        return str(models[0]["id"])

    def _open(self, path: str, body: Mapping[str, Any] | None = None) -> HTTPResponse:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._base + path, data, self._headers)
        try:
            reply: HTTPResponse = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
        except urllib.error.HTTPError as error:
            raise LlmqError(f"the server answers {error.code}: {_reason(error)}", "check --url, --api-key") from None
        except (urllib.error.URLError, HTTPException, OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise LlmqError(f"{self._base} cannot be reached: {reason}", "is llmq serve running there?") from None
        return reply


def _events(reply: HTTPResponse) -> Iterator[dict[str, Any]]:
    try:
        for line in reply:
            field, _, data = line.decode().strip().partition(":")
            if field == "data" and data.strip() != DONE:
                yield json.loads(data)
    except (HTTPException, OSError, ValueError) as error:
        raise LlmqError(f"{BROKE_OFF}: {error}") from None


def _reason(error: urllib.error.HTTPError) -> str:
    """OpenAI's message, where there is one."""
    try:
        return _message(json.load(error))
    except (ValueError, KeyError, TypeError):
        return str(error.reason)


def _message(said: Mapping[str, Any]) -> str:
    """Of an error, which is OpenAI's object or, of some servers, a text."""
    error = said["error"]
    return str(error["message"] if isinstance(error, Mapping) else error)
