"""``llmq bench latency``"""

from __future__ import annotations

from statistics import fmean
from typing import TYPE_CHECKING, Annotated

import typer

from llmq.bench.workload import Workload
from llmq.cli import options
from llmq.cli.bench import flags
from llmq.cli.console import out, print_report, progress, table
from llmq.engine.options import EngineOptions
from llmq.errors import USAGE, LlmqError

if TYPE_CHECKING:
    from llmq.bench.latency import LatencyReport

_WORKLOAD = Workload(num_prompts=8, input_len=32, output_len=128)
_ITERATIONS = 10


@options.with_engine_flags
def latency(
    model: options.Model,
    batch_size: Annotated[int, typer.Option(help="Prompts that enter together.")] = _WORKLOAD.num_prompts,
    input_len: Annotated[int, typer.Option(help="Tokens of each prompt.")] = _WORKLOAD.input_len,
    output_len: Annotated[int, typer.Option(help="Tokens generated for each.")] = _WORKLOAD.output_len,
    iterations: Annotated[int, typer.Option(help="Batches that are measured.")] = _ITERATIONS,
    seed: Annotated[int, typer.Option(help="Same seed, same prompts.")] = _WORKLOAD.seed,
    *,
    engine: EngineOptions,
    peer: flags.Peer = None,
    dtype: options.DType = "auto",
    device: options.Device = "auto",
    revision: options.Revision = None,
    output: flags.Output = None,
    json: options.Json = False,
) -> None:
    """How long one static batch takes, from its first prompt to its last token. Exits with 1 if a request fails.

    llmq bench latency demo --batch-size 4 --output-len 32
    """
    if iterations < 1 or batch_size < 1:
        raise LlmqError("there is nothing to measure", "check --batch-size and --iterations", exit_code=USAGE)
    workload = Workload(batch_size, input_len, output_len, seed)

    from llmq.bench.latency import bench_latency

    with progress("batches") as bar:
        report = bench_latency(
            model,
            workload,
            iterations=iterations,
            revision=revision,
            dtype=dtype,
            device=device,
            options=engine,
            peer=peer,
            progress=bar,
        )
    found = report.as_json()
    print_report("llmq.bench.latency/1", found, show=lambda: _print(report), json=json, file=output)
    flags.raise_if_failed(report.failed, len(report.runs) * batch_size, found["errors"])


def _print(report: LatencyReport) -> None:
    out.print(f"{fmean(report.latencies):.3f} s a batch on {report.setup.device_name}")
    out.print()
    grid = table("latency", "")
    grid.add_row("batches", f"{len(report.runs)} of {report.workload.num_prompts} prompts")
    for p, seconds in report.percentiles.items():
        grid.add_row(f"p{p}", f"{seconds:.3f} s")
    for name in ("ttft", "tpot"):
        mean = report.mean(name)
        if mean is not None:
            grid.add_row(f"{name.upper()}, mean", f"{mean:,.2f} ms")
    grid.add_row("tokens out", f"{report.output_throughput:,.1f}/s")
    if report.joules_per_token is not None:
        grid.add_row("energy", f"{report.joules_per_token:.3f} J a token")
    out.print(grid)
    flags.print_comparison(report.peer)
