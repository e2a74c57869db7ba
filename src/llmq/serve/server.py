"""``llmq serve``: start the engine and the HTTP interface, and end them."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import time
from importlib.util import find_spec
from typing import Any

from llmq.checkpoint.config import read_config
from llmq.checkpoint.folder import resolve
from llmq.checkpoint.tokenizer import has_tokenizer, load_tokenizer
from llmq.engine.admission import Limits
from llmq.engine.grammar import Grammars
from llmq.engine.options import EngineOptions
from llmq.errors import FAILED, LlmqError
from llmq.serve.client import EngineClient
from llmq.serve.messages import Ready
from llmq.serve.metrics import Metrics
from llmq.serve.options import ServeOptions
from llmq.serve.service import Service

PACKAGES = ("fastapi", "uvicorn")
LAST_WORDS_SECONDS = 3.0
"""How long clients of an engine that died may take to read so."""
SHORT_CONTEXT = 4096
SNIPPET = """
from openai import OpenAI
client = OpenAI(base_url="{url}/v1", api_key="{key}")
answer = client.chat.completions.create(model="{model}", messages=[{{"role": "user", "content": "hello"}}])
print(answer.choices[0].message.content)
"""


def serve(model: str, *, settings: dict[str, Any], options: EngineOptions, serve_options: ServeOptions) -> None:
    """Serve ``model`` until SIGTERM or Ctrl-C: then what runs is answered to its end, and a second signal ends at once.

    ``settings``: revision, dtype and device of LLM. Prints the address on stdout once clients can come.

    Raises LlmqError when the model cannot be run, the address is taken, or the engine dies.
    """
    started = time.perf_counter()
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise LlmqError(f"llmq serve needs {' and '.join(missing)}", "pip install 'llmq[serve]'")
    folder = resolve(model, settings.get("revision"))
    config = read_config(folder)
    listener = _bind(serve_options)
    name = serve_options.served_model_name or model
    client = EngineClient(model, settings, options, Metrics(name))
    try:
        # While the engine loads the weights, there is time for this.
        from llmq.serve.app import create_app

        tokenizer = load_tokenizer(folder) if has_tokenizer(folder) else None
        ready = client.wait()
        grammars = Grammars(folder, config.vocab_size, config.eos_token_ids)
        service = Service(name, model, config, tokenizer, grammars, ready.limits, client, serve_options)
        if serve_options.reachable_by_others and not serve_options.api_keys:
            _say(f"warning: whoever reaches {serve_options.host} may use the model: there is no --api-key")

        def announce() -> None:
            _announce(service, ready, listener, time.perf_counter() - started)

        asyncio.run(_run(create_app(service), client, listener, announce))
        if client.died.is_set():
            raise _engine_died(client)
    finally:
        client.close()
        listener.close()


async def _run(app: Any, client: EngineClient, listener: socket.socket, announce: Any) -> None:
    from llmq.serve.http import Server

    client.listen()
    server = Server(app, announce, at_once=client.kill)
    watching = asyncio.ensure_future(_end_with(client, server))
    await server.serve(sockets=[listener])
    watching.cancel()


async def _end_with(client: EngineClient, server: Any) -> None:
    """End the server when the engine dies, whoever is still connected."""
    await client.died.wait()
    server.should_exit = True
    await asyncio.sleep(LAST_WORDS_SECONDS)
    _say(f"error: {_engine_died(client).message}")
    os._exit(FAILED)


def _engine_died(client: EngineClient) -> LlmqError:
    return LlmqError(f"the engine's process ended ({client.exit_code}), and so does the server", "see its words above")


def _bind(options: ServeOptions) -> socket.socket:
    """A socket of the address, before anything slow is done. Nobody can connect until the server listens."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            options.host, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise LlmqError(
            f"cannot listen on {options.host}, port {options.port}: {error.strerror}",
            "choose another --port (0: any that is free) or --host",
        ) from None
    return listener


def _announce(service: Service, ready: Ready, listener: socket.socket, seconds: float) -> None:
    """The address on stdout, and beside it what fits and how to begin."""
    host, port = listener.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    print(url, flush=True)
    _say(f"ready in {seconds:.1f} s: {service.name} on {ready.device}, {ready.dtype}; {capacity(ready.limits)}")
    key = "KEY" if service.options.api_keys else "none"
    _say(SNIPPET.format(url=url, key=key, model=service.name))


def capacity(limits: Limits) -> str:
    """How many sequences the KV cache really holds at once, at the whole context and at a short one."""
    blocks = limits.blocks

    def at_once(tokens: int) -> str:
        number = min(limits.options.seats, blocks.total // blocks.worst_case(1, tokens, 1))
        return f"{number:,} × {tokens:,} tokens"

    longest = min(limits.context, blocks.longest(1, 1))
    shorter = min(SHORT_CONTEXT, longest // 4)
    return f"room for {at_once(longest)} at once, or {at_once(shorter)}"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
