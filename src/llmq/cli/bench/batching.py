"""``llmq bench batching``"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from llmq.bench.uneven import ROUNDS, Requests
from llmq.cli import options
from llmq.cli.bench import flags
from llmq.cli.console import out, print_report, progress, table
from llmq.engine.options import EngineOptions

if TYPE_CHECKING:
    from llmq.bench.batching import BatchingReport, Result

_ENGINE, _REQUESTS = EngineOptions(), Requests()


def batching(
    model: options.Model,
    num_prompts: Annotated[int, typer.Option(help="Requests.")] = _REQUESTS.num_prompts,
    input_len: Annotated[int, typer.Option(help="Tokens of each prompt.")] = _REQUESTS.input_len,
    longest: Annotated[int, typer.Option(help="Tokens generated for the longest.")] = _REQUESTS.longest,
    spread: Annotated[int, typer.Option(help="How many times longer that is than the shortest.")] = _REQUESTS.spread,
    growth: Annotated[
        int, typer.Option(help="Tokens of the answer by which time is set against length.")
    ] = _REQUESTS.growth,
    max_num_seqs: Annotated[int, typer.Option(help="Requests that run at once.")] = 8,
    rounds: Annotated[int, typer.Option(help="Times that the batched ways run, after once to warm up.")] = ROUNDS,
    seed: Annotated[int, typer.Option(help="Same seed, same requests.")] = _REQUESTS.seed,
    peer: flags.Peer = None,
    gpu_memory_utilization: options.GpuMemoryUtilization = _ENGINE.gpu_memory_utilization,
    dtype: options.DType = "auto",
    device: options.Device = "auto",
    revision: options.Revision = None,
    plot: flags.Plot = None,
    output: flags.Output = None,
    json: options.Json = False,
) -> None:
    """What a KV cache and continuous batching are worth, beside static and dynamic batching, on the same requests.

    llmq bench batching demo --plot batching.png
    """
    from llmq.bench.batching import bench_batching

    with progress("measurements") as bar:
        report = bench_batching(
            model,
            Requests(num_prompts, input_len, longest, spread, growth, seed),
            seats=max_num_seqs,
            rounds=rounds,
            gpu_memory_utilization=gpu_memory_utilization,
            revision=revision,
            dtype=dtype,
            device=device,
            peer=peer,
            progress=bar,
        )
    print_report("llmq.bench.batching/1", report.as_json(), show=partial(_print, report), json=json, file=output)
    if plot is not None:
        from llmq.bench.batching_plot import draw_batching

        draw_batching(report, plot)
    every = [run for result in report.results for run in (*result.rounds, result.one_by_one) if run is not None]
    failed = sum(run.metrics.failed for run in every)
    total = sum(run.metrics.failed + run.metrics.completed for run in every)
    flags.raise_if_failed(failed, total, sorted({error for run in every for error in run.errors}))


def _print(report: BatchingReport) -> None:
    out.print(
        f"continuous batching: {report.speedup:.2f} × static batching's tokens/s; by counting steps "
        f"{report.counted:.2f} ×, of which this is {report.speedup / report.counted:.0%}"
    )
    out.print()
    metered = any(result.joules_per_token is not None for result in report.results)
    columns = ["tokens/s", "steps", "wasted seats", "latency p50, s", "p99", "one by one: p50", "p99"]
    grid = table("", *columns, *(["J a token"] if metered else []))
    for result in report.results:
        joules = result.joules_per_token
        grid.add_row(result.way.name, *_row(result), *([] if joules is None else [f"{joules:.3f}"]))
    out.print(grid)
    flags.print_comparison(report.peer)
    out.print()
    for growth in report.growth:
        base, slope = growth.line
        out.print(
            f"{growth.way.name}: twice the length takes {growth.doubling:.2f} × the time (2: linear, 4: quadratic); a "
            f"token takes {1e3 * base:.1f} ms, and {1e3 * slope:+.3f} for each before it"
        )
    out.print()
    requests = report.requests
    alone = report.results[0].rounds[0].metrics.completed
    out.print(
        f"{requests.num_prompts} requests of {min(requests.output_lens)} to {max(requests.output_lens)} tokens "
        f"({alone} of them without batching), {report.seats} at once; one by one: {report.request_rate:.2f} a second; "
        f"{report.setup.device_name}"
    )


def _row(result: Result) -> list[str]:
    figures = [f"{result.output_throughput:,.1f}", f"{result.steps:,}", f"{result.wasted:.0%}"]
    for run in (None if result.way.alone else result.rounds[0], result.one_by_one):
        latency = None if run is None else run.metrics.latencies["e2el"]
        if latency is None:
            figures += ["", ""]
        else:
            figures += [f"{latency.percentiles[p] / 1e3:.2f}" for p in (50, 99)]
    return figures
