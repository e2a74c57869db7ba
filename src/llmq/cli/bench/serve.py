"""``llmq bench serve``"""

from __future__ import annotations

from functools import partial
from math import inf
from typing import TYPE_CHECKING

from llmq.bench.load import Load
from llmq.bench.metrics import parse_goodput
from llmq.bench.workload import Workload
from llmq.cli import options
from llmq.cli.bench import flags
from llmq.cli.console import out, print_report, progress, table

if TYPE_CHECKING:
    from llmq.bench.serve import ServeReport


@flags.with_load_flags
@flags.with_workload_flags
def serve(
    url: flags.Url,
    *,
    workload: Workload,
    load: Load,
    endpoint: flags.Endpoint = "completions",
    model: flags.ServedModel = None,
    tokenizer: flags.Tokenizer = None,
    api_key: flags.ApiKey = None,
    ignore_eos: flags.IgnoreEos = True,
    goodput: flags.Goodput = None,
    peer: flags.Peer = None,
    output: flags.Output = None,
    json: options.Json = False,
) -> None:
    """What users of a server see, at a rate of requests. Any server of OpenAI's interface. Exits with 1 if one fails.

    Files: jsonl has a prompt or messages a line, and perhaps output_len; sharegpt is its list of conversations; trace
    has timestamp, input_length and output_length, in CSV or JSON lines.

    llmq bench serve http://127.0.0.1:8000 --request-rate 4

    llmq bench serve http://127.0.0.1:8000 --dataset trace --dataset-path mooncake.jsonl --num-prompts 1000
    """
    limits = None if goodput is None else parse_goodput(goodput)

    from llmq.bench.serve import bench_serve

    with progress("requests") as bar:
        report = bench_serve(
            url,
            workload,
            load,
            model=model,
            tokenizer=tokenizer,
            api_key=api_key,
            chat=flags.is_chat(endpoint),
            ignore_eos=ignore_eos,
            goodput=limits,
            peer=peer,
            progress=bar,
        )
    print_report("llmq.bench.serve/1", report.as_json(), show=partial(_print, report), json=json, file=output)
    metrics = report.run.metrics
    flags.warn_if_cached(metrics.cached_tokens, metrics.total_input_tokens, workload)
    flags.raise_if_failed(metrics.failed, metrics.failed + metrics.completed, report.run.outcome.errors)


def _print(report: ServeReport) -> None:
    run, metrics = report.run, report.run.metrics
    out.print(f"{metrics.output_throughput:,.1f} output tokens/s from {report.client.endpoint.url}")
    out.print()
    grid = table("load", "")
    grid.add_row("duration", f"{metrics.duration:.2f} s")
    total = metrics.completed + metrics.failed
    grid.add_row("requests", f"{metrics.completed} of {total}, {metrics.request_throughput:.2f}/s, {_asked(report)}")
    if metrics.request_goodput is not None:
        grid.add_row("goodput", f"{metrics.good} within the limits, {metrics.request_goodput:.2f}/s")
    grid.add_row("at once", f"{metrics.max_concurrent_requests}")
    cached = "?" if metrics.cached_tokens is None else f"{metrics.cached_tokens:,}"
    grid.add_row("tokens in", f"{metrics.total_input_tokens:,}, {cached} in the prefix cache")
    grid.add_row("tokens out", f"{metrics.total_output_tokens:,}")
    if run.counters is not None and "preemptions" in run.counters:
        grid.add_row("preemptions", f"{run.counters['preemptions']}")
    if run.joules_per_token is not None:
        grid.add_row("energy", f"{run.joules_per_token:.3f} J a token")
    out.print(grid)
    out.print()
    flags.print_latencies(metrics)
    flags.print_comparison(report.peer)


def _asked(report: ServeReport) -> str:
    if report.client.workload.dataset == "trace":
        return "sent as traced"
    rate = report.run.load.request_rate
    return "sent all at once" if rate == inf else f"sent at {rate:g}/s"
