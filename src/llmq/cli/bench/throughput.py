"""``llmq bench throughput``"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmq.bench.metrics import parse_goodput
from llmq.bench.workload import Workload
from llmq.cli import options
from llmq.cli.bench import flags
from llmq.cli.console import out, print_report, progress, table
from llmq.engine.options import EngineOptions

if TYPE_CHECKING:
    from llmq.bench.throughput import ThroughputReport


@options.with_engine_flags
@flags.with_workload_flags
def throughput(
    model: options.Model,
    *,
    workload: Workload,
    engine: EngineOptions,
    goodput: flags.Goodput = None,
    peer: flags.Peer = None,
    dtype: options.DType = "auto",
    device: options.Device = "auto",
    revision: options.Revision = None,
    output: flags.Output = None,
    json: options.Json = False,
) -> None:
    """Tokens a second and latencies of the built-in engine, all requests there at the start.

    Exits with 1 if a request fails.

    llmq bench throughput demo --num-prompts 32 --output-len 64

    llmq bench throughput demo --num-prompts 32 --peer transformers
    """
    limits = None if goodput is None else parse_goodput(goodput)

    from llmq.bench.throughput import bench_throughput

    with progress("requests") as bar:
        report = bench_throughput(
            model,
            workload,
            revision=revision,
            dtype=dtype,
            device=device,
            options=engine,
            goodput=limits,
            peer=peer,
            progress=bar,
        )
    schema = "llmq.bench.throughput/2"
    print_report(schema, report.as_json(), show=lambda: _print(report), json=json, file=output)
    metrics = report.run.metrics
    flags.raise_if_failed(metrics.failed, metrics.failed + metrics.completed, report.run.errors)


def _print(report: ThroughputReport) -> None:
    run, setup = report.run, report.setup
    metrics, stats = run.metrics, run.stats
    out.print(f"{metrics.output_throughput:,.1f} output tokens/s on {setup.device_name}")
    out.print()
    grid = table("throughput", "")
    grid.add_row("duration", f"{metrics.duration:.2f} s")
    total = metrics.completed + metrics.failed
    grid.add_row("requests", f"{metrics.completed} of {total}, {metrics.request_throughput:.2f}/s")
    if metrics.request_goodput is not None:
        grid.add_row("goodput", f"{metrics.good} within the limits, {metrics.request_goodput:.2f}/s")
    grid.add_row("tokens in", f"{metrics.total_input_tokens:,}, {metrics.cached_tokens:,} in the prefix cache")
    grid.add_row("tokens out", f"{metrics.total_output_tokens:,}")
    grid.add_row("tokens in and out", f"{metrics.total_token_throughput:,.1f}/s")
    grid.add_row("KV cache, peak", f"{stats.peak_blocks} of {stats.total_blocks} blocks, {run.peak_kv_usage:.1%}")
    grid.add_row("preemptions", f"{stats.preemptions}, {stats.swapped_out} of them swapped out")
    if run.joules_per_token is not None:
        grid.add_row("energy", f"{run.joules_per_token:.3f} J a token")
    out.print(grid)
    out.print()
    flags.print_latencies(metrics)
    out.print()
    memory = table("memory", "predicted", "measured", "off by")
    for line in report.memory:
        memory.add_row(*line.row())
    out.print(memory)
    flags.print_comparison(report.peer)
