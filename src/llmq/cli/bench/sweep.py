"""``llmq bench sweep``"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from llmq.bench.load import Load
from llmq.bench.metrics import parse_goodput
from llmq.bench.sweep import BATCH_SIZES, RATES
from llmq.bench.workload import Workload
from llmq.cli import options
from llmq.cli.bench import flags
from llmq.cli.console import out, print_report, progress, table
from llmq.engine.options import EngineOptions

if TYPE_CHECKING:
    from llmq.bench.sweep import Cell, SweepReport

_COLUMNS = ("TTFT p50", "p99", "TPOT p50", "p99")


@options.with_engine_flags
@flags.with_shape_flags
@flags.with_workload_flags
def sweep(
    subject: Annotated[str, typer.Argument(metavar="MODEL|URL", help="A model, or a server.", show_default=False)],
    batch_sizes: Annotated[
        str, typer.Option(metavar="LIST", help="Of a model: prompts in each static batch.")
    ] = ",".join(map(str, BATCH_SIZES)),
    request_rates: Annotated[
        str, typer.Option(metavar="LIST", help="Of a server: requests a second, of --num-prompts each.")
    ] = ",".join(map(str, RATES)),
    *,
    workload: Workload,
    load: Load,
    engine: EngineOptions,
    endpoint: flags.Endpoint = "completions",
    model: flags.ServedModel = None,
    tokenizer: flags.Tokenizer = None,
    api_key: flags.ApiKey = None,
    ignore_eos: flags.IgnoreEos = True,
    goodput: flags.Goodput = None,
    dtype: options.DType = "auto",
    device: options.Device = "auto",
    revision: options.Revision = None,
    plot: flags.Plot = None,
    output: flags.Output = None,
    json: options.Json = False,
) -> None:
    """Speed at growing load, and the knee: batch sizes of a model here, or request rates of a server.

    llmq bench sweep demo --batch-sizes 1,2,4,8 --output-len 32

    llmq bench sweep http://127.0.0.1:8000 --request-rates 1,2,4,8
    """
    limits = None if goodput is None else parse_goodput(goodput)

    from llmq.bench.http import is_url
    from llmq.bench.sweep import sweep_batches, sweep_rates

    with progress("loads") as bar:
        if is_url(subject):
            report = sweep_rates(
                subject,
                workload,
                load,
                flags.numbers(request_rates, "--request-rates", float),
                model=model,
                tokenizer=tokenizer,
                api_key=api_key,
                chat=flags.is_chat(endpoint),
                ignore_eos=ignore_eos,
                goodput=limits,
                progress=bar,
            )
        else:
            report = sweep_batches(
                subject,
                workload,
                flags.numbers(batch_sizes, "--batch-sizes", int),
                revision=revision,
                dtype=dtype,
                device=device,
                options=engine,
                progress=bar,
            )
    print_report("llmq.bench.sweep/1", report.as_json(), show=partial(_print, report), json=json, file=output)
    if plot is not None:
        from llmq.bench.plot import draw_sweep

        draw_sweep(report, plot)
    cached, read = (
        sum(getattr(cell.metrics, name) or 0 for cell in report.cells)
        for name in ("cached_tokens", "total_input_tokens")
    )
    flags.warn_if_cached(cached, read, workload)
    total = sum(cell.metrics.completed + cell.metrics.failed for cell in report.cells)
    errors = sorted({error for cell in report.cells for error in cell.details["errors"]})
    flags.raise_if_failed(report.failed, total, errors)


def _print(report: SweepReport) -> None:
    batches = report.axis == "batch_size"
    knee = "below the least of these" if report.knee is None else f"{report.knee:g}"
    knee += " or more" if report.knee == report.cells[-1].load else ""
    out.print(f"knee: {'batch' if batches else 'requests/s'} {knee}")
    out.print(report.reason)
    out.print()
    completed = () if batches else ("completed/s", "scheduled TTFT p99")
    grid = table("batch" if batches else "offered/s", *completed, "tokens/s", *_COLUMNS, "cached", "failed")
    for cell in report.cells:
        grid.add_row(f"{cell.load:g}{' ←' if cell.load == report.knee else ''}", *_row(cell, batches))
    out.print(grid)


def _row(cell: Cell, batches: bool) -> Sequence[str]:
    found, metrics = cell.details, cell.metrics
    first = () if batches else (found["completion_rate"], found["p99_scheduled_ttft_ms"])
    times = [found[f"{p}_{name}_ms"] for name in ("ttft", "tpot") for p in ("p50", "p99")]
    counts = ("?" if metrics.cached_tokens is None else f"{metrics.cached_tokens:,}", f"{metrics.failed}")
    return *(_figure(value) for value in (*first, metrics.output_throughput, *times)), *counts


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:,.1f}"
