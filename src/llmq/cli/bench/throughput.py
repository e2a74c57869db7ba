"""``llmq bench throughput``"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from llmq.bench.metrics import PERCENTILES
from llmq.bench.workload import Workload
from llmq.cli import options
from llmq.cli.console import out, print_json, table
from llmq.engine.options import EngineOptions
from llmq.errors import LlmqError
from llmq.memory import format_bytes

if TYPE_CHECKING:
    from llmq.bench.throughput import ThroughputReport

_WORKLOAD = Workload()


@options.with_engine_flags
def throughput(
    model: options.Model,
    num_prompts: Annotated[int, typer.Option(help="Requests, all there at the start.")] = _WORKLOAD.num_prompts,
    input_len: Annotated[int, typer.Option(help="Tokens of each prompt.")] = _WORKLOAD.input_len,
    output_len: Annotated[int, typer.Option(help="Tokens generated for each.")] = _WORKLOAD.output_len,
    seed: Annotated[int, typer.Option(help="Of the random prompts.")] = _WORKLOAD.seed,
    *,
    engine: EngineOptions,
    dtype: options.DType = "auto",
    device: options.Device = "auto",
    revision: options.Revision = None,
    json: options.Json = False,
) -> None:
    """Tokens a second and latencies of the built-in engine on random prompts. Exits with 1 if a request fails.

    llmq bench throughput demo --num-prompts 32 --output-len 64
    """
    workload = Workload(num_prompts, input_len, output_len, seed)

    from llmq.bench.throughput import bench_throughput

    report = bench_throughput(model, workload, revision=revision, dtype=dtype, device=device, options=engine)
    if json:
        print_json("llmq.bench.throughput/1", report.as_json())
    else:
        _print(report)
    if report.errors:
        raise LlmqError(f"{report.metrics.failed} of {num_prompts} requests failed: {'; '.join(report.errors)}")


def _print(report: ThroughputReport) -> None:
    metrics, workload, setup = report.metrics, report.workload, report.setup
    out.print(f"{metrics.output_throughput:,.1f} output tokens/s on {setup.device_name}")
    out.print()
    runs = table("throughput", "")
    runs.add_row("duration", f"{metrics.duration:.2f} s")
    runs.add_row("requests", f"{metrics.completed} of {workload.num_prompts}, {metrics.request_throughput:.2f}/s")
    runs.add_row("tokens in", f"{metrics.total_input_tokens:,}")
    runs.add_row("tokens out", f"{metrics.total_output_tokens:,}")
    runs.add_row("tokens in and out", f"{metrics.total_token_throughput:,.1f}/s")
    runs.add_row("weights", f"{format_bytes(setup.weights_bytes)} as {setup.dtype}")
    runs.add_row("KV cache, peak", f"{report.peak_blocks} of {report.total_blocks} blocks, {report.peak_kv_usage:.1%}")
    runs.add_row("preemptions", str(report.preemptions))
    out.print(runs)
    out.print()
    latencies = table("latency, ms", "mean", *(f"p{p}" for p in PERCENTILES))
    for name, latency in metrics.latencies.items():
        figures = () if latency is None else (latency.mean, *latency.percentiles.values())
        latencies.add_row(name.upper(), *(f"{figure:,.2f}" for figure in figures))
    out.print(latencies)
