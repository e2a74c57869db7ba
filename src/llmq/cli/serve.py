"""``llmq serve``"""

from __future__ import annotations

from typing import Annotated

import typer

from llmq.cli import options
from llmq.engine.options import EngineOptions
from llmq.serve.options import ServeOptions

_SERVE = ServeOptions()
API_KEY = "LLMQ_API_KEY"


@options.with_engine_flags
def serve(
    model: options.Model,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0: of all networks.")] = _SERVE.host,
    port: Annotated[int, typer.Option(help="0: any that is free.")] = _SERVE.port,
    api_key: Annotated[
        list[str] | None,
        typer.Option(envvar=API_KEY, help="A key that lets clients in; may be repeated.", show_default=False),
    ] = None,
    served_model_name: Annotated[
        str | None, typer.Option(help="The model's name to clients.", show_default="MODEL")
    ] = _SERVE.served_model_name,
    max_queue: Annotated[int, typer.Option(help="Prompts that may wait; then clients get status 429.")] = (
        _SERVE.max_queue
    ),
    request_timeout: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Longest that a request may take.", show_default=False)
    ] = _SERVE.request_timeout,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Write prompts to the access log.")] = False,
    *,
    engine: EngineOptions,
    dtype: options.DType = "auto",
    device: options.Device = "auto",
    revision: options.Revision = None,
) -> None:
    """Serve a model behind OpenAI's HTTP interface: completions, chat, streams, /metrics.

    Prints the address on stdout when it is ready. SIGTERM or Ctrl-C finishes what runs; a second one ends at once.

    llmq serve demo --port 8000
    """
    serve_options = ServeOptions(
        host=host,
        port=port,
        api_keys=tuple(api_key or ()),
        served_model_name=served_model_name,
        max_queue=max_queue,
        request_timeout=request_timeout,
        log_prompts=log_prompts,
    )

    from llmq.serve.server import serve as run

    settings = {"revision": revision, "dtype": dtype, "device": device}
    run(model, settings=settings, options=engine, serve_options=serve_options)
