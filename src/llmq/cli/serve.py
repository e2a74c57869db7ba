"""``llmq serve``"""

from __future__ import annotations

from typing import Annotated, cast

import typer

from llmq import memory
from llmq.cli import options
from llmq.engine.options import EngineOptions, KVCacheDtype, LoadFormat, Preemption, QueueOrder, SchedulerPolicy
from llmq.serve.options import ServeOptions

_ENGINE = EngineOptions()
_SERVE = ServeOptions()
API_KEY = "LLMQ_API_KEY"


def serve(
    model: options.Model,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0: of all networks.")] = _SERVE.host,
    port: Annotated[int, typer.Option(help="0: any that is free.")] = _SERVE.port,
    api_key: Annotated[
        list[str] | None,
        typer.Option(envvar=API_KEY, help="A key that lets clients in; may be repeated.", show_default=False),
    ] = None,
    served_model_name: Annotated[
        str | None, typer.Option(help="The model's name to clients. [default: MODEL]", show_default=False)
    ] = _SERVE.served_model_name,
    max_queue: Annotated[int, typer.Option(help="Prompts that may wait; then clients get status 429.")] = (
        _SERVE.max_queue
    ),
    request_timeout: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Longest that a request may take.", show_default=False)
    ] = _SERVE.request_timeout,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Write prompts to the access log.")] = False,
    max_num_seqs: options.MaxNumSeqs = _ENGINE.max_num_seqs,
    max_num_batched_tokens: options.MaxNumBatchedTokens = _ENGINE.max_num_batched_tokens,
    block_size: options.BlockSize = _ENGINE.block_size,
    kv_cache_memory: options.KVCacheMemory = None,
    kv_cache_dtype: options.KVCacheDtype = _ENGINE.kv_cache_dtype,
    gpu_memory_utilization: options.GpuMemoryUtilization = _ENGINE.gpu_memory_utilization,
    max_model_len: options.MaxModelLen = _ENGINE.max_model_len,
    prefix_caching: options.PrefixCaching = _ENGINE.prefix_caching,
    swap_space: options.SwapSpace = _ENGINE.swap_space / 2**30,
    scheduler: options.Scheduler = _ENGINE.scheduler,
    delay_factor: options.DelayFactor = _ENGINE.delay_factor,
    max_prefill_steps: options.MaxPrefillSteps = _ENGINE.max_prefill_steps,
    max_skips: options.MaxSkips = _ENGINE.max_skips,
    preemption: options.Preemption = _ENGINE.preemption,
    queue: options.Queue = _ENGINE.queue,
    load_format: options.LoadFormat = _ENGINE.load_format,
    enforce_eager: options.EnforceEager = _ENGINE.enforce_eager,
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
    engine = EngineOptions(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        block_size=block_size,
        kv_cache_memory=None if kv_cache_memory is None else memory.parse_bytes(kv_cache_memory),
        kv_cache_dtype=cast(KVCacheDtype, kv_cache_dtype),
        gpu_memory_utilization=gpu_memory_utilization,
        max_model_len=max_model_len,
        prefix_caching=prefix_caching,
        swap_space=memory.parse_bytes(f"{swap_space:f}GiB"),
        scheduler=cast(SchedulerPolicy, scheduler),
        delay_factor=delay_factor,
        max_prefill_steps=max_prefill_steps,
        max_skips=max_skips,
        preemption=cast(Preemption, preemption),
        queue=cast(QueueOrder, queue),
        load_format=cast(LoadFormat, load_format),
        enforce_eager=enforce_eager,
    )

    from llmq.serve.server import serve as run

    settings = {"revision": revision, "dtype": dtype, "device": device}
    run(model, settings=settings, options=engine, serve_options=serve_options)
