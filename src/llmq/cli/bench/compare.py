"""``llmq bench compare``"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmq.bench.candidates import BATCH_SIZES, ROUNDS, SCHEMES, WATCHED, WORKLOADS
from llmq.bench.workload import Workload
from llmq.cli import options
from llmq.cli.bench import flags
from llmq.cli.console import out, print_report, progress, table
from llmq.engine.options import EngineOptions
from llmq.errors import USAGE, LlmqError
from llmq.memory import format_bytes

if TYPE_CHECKING:
    from llmq.bench.compare_report import CompareReport, Row

_WORKLOAD = Workload()


@options.with_engine_flags
def compare(
    model: options.Model,
    schemes: Annotated[str, typer.Option(metavar="LIST", help="The first is what the others are set beside.")] = (
        ",".join(SCHEMES)
    ),
    workload: Annotated[
        str, typer.Option(metavar="NAME|FILE", help=f"{', '.join(WORKLOADS)}, or a .jsonl file of prompts.")
    ] = "chat",
    num_prompts: Annotated[int, typer.Option(help="Requests of the workload.")] = _WORKLOAD.num_prompts,
    batch_sizes: Annotated[str, typer.Option(metavar="LIST", help="To measure decoding at.")] = ",".join(
        map(str, BATCH_SIZES)
    ),
    rounds: Annotated[int, typer.Option(help="Times that each scheme runs, after once to warm up.")] = ROUNDS,
    folder: Annotated[
        list[str] | None,
        typer.Option(metavar="SCHEME=PATH", help="Take a scheme from there.", show_default="round to nearest"),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Text to measure quality on.", show_default="for demo, its own; else none"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Same seed, same requests.")] = _WORKLOAD.seed,
    *,
    engine: EngineOptions,
    peer: flags.Peer = None,
    dtype: options.DType = "auto",
    device: options.Device = "auto",
    revision: options.Revision = None,
    plot: flags.Plot = None,
    output: flags.Output = None,
    json: options.Json = False,
) -> None:
    """Speed over batch sizes, quality and memory of one model in several schemes, and which to take.

    Exits with 1 if a request fails.

    llmq bench compare demo --workload chat --plot compare.png

    llmq bench compare ./my-model --folder w4a16=my-model-gptq --data held-out.txt
    """
    from llmq.bench.compare import bench_compare

    with progress("measurements") as bar:
        report = bench_compare(
            model,
            schemes=schemes.split(","),
            workload=workload,
            num_prompts=num_prompts,
            batch_sizes=flags.numbers(batch_sizes, "--batch-sizes", int),
            rounds=rounds,
            folders=_folders(folder or []),
            data=data,
            seed=seed,
            revision=revision,
            dtype=dtype,
            device=device,
            options=engine,
            peer=peer,
            progress=bar,
        )
    print_report("llmq.bench.compare/1", report.as_json(), show=partial(_print, report), json=json, file=output)
    if plot is not None:
        from llmq.bench.compare_plot import draw_compare

        draw_compare(report, plot)
    failed = sum(row.failed for row in report.rows)
    errors = sorted({error for row in report.rows for speeds in row.rounds for error in speeds.run.errors})
    flags.raise_if_failed(failed, report.requests * rounds * len(report.rows), errors)


def _folders(given: Sequence[str]) -> dict[str, Path]:
    pairs = [text.partition("=") for text in given]
    for scheme, _, path in pairs:
        if not scheme or not path:
            raise LlmqError(f"{scheme!r} is no scheme and folder", "write --folder w4a16=PATH", exit_code=USAGE)
    return {scheme: Path(path) for scheme, _, path in pairs}


def _print(report: CompareReport) -> None:
    out.print(report.recommendation)
    out.print()
    names = [row.scheme for row in report.rows]
    watched = WATCHED if set(WATCHED) <= set(names) else None
    grid = table("", *names, *([" / ".join(watched)] if watched else []))

    def add(title: str, cell: Callable[[Row], str], ratio: float | None = None) -> None:
        grid.add_row(title, *(cell(row) for row in report.rows), "" if ratio is None else f"{ratio:.2f}")

    add("weights", lambda row: format_bytes(row.weights_bytes))
    if any(row.kv_tokens is not None for row in report.rows):
        add("KV tokens that fit", lambda row: f"{row.kv_tokens:,}")
    if any(row.quality is not None for row in report.rows):
        base = next(row.quality.reference.perplexity for row in report.rows if row.quality is not None)
        add("perplexity", lambda row: f"{base if row.quality is None else base * (1 + row.quality.increase.value):.3f}")
        add("KL, mean", lambda row: "" if row.quality is None else f"{row.quality.kl.value:.4f}")
    ratio = None if watched is None else report.ratio(*watched, lambda speeds: speeds.prefill)
    add("prefill, tokens/s", lambda row: f"{row.median_of(lambda speeds: speeds.prefill):,.0f}", ratio)
    for batch in report.batch_sizes:
        ratio = None if watched is None else report.decode_ratio(*watched, batch)
        add(f"decode, batch {batch}", partial(_decode, batch), ratio)
    ratio = None if watched is None else report.ratio(*watched, lambda speeds: speeds.run.metrics.output_throughput)
    add(f"{report.workload_name}, output tokens/s", lambda row: f"{row.output_throughput:,.0f}", ratio)
    for name in ("ttft", "tpot"):
        add(f"{report.workload_name}, {name.upper()} p50, ms", partial(_latency, name))
    if any(row.joules_per_token is not None for row in report.rows):
        add(f"{report.workload_name}, J a token", lambda row: f"{row.joules_per_token:.3f}")
    peer = report.rows[0].peer
    for name in () if peer is None else peer.ratios:
        add(f"{name} / the peer's", partial(_peer_ratio, name))
    out.print(grid)
    out.print()
    for (scheme, other), start in report.crossovers.items():
        out.print(f"{scheme} overtakes {other} at a batch of {start:.1f}")
    rounds = len(report.rows[0].rounds)
    turns = "in turns" if report.side_by_side else "one scheme after another"
    out.print(
        f"{report.requests} requests, all there at the start; {rounds} round{'s' * (rounds > 1)}, {turns}; "
        f"{report.setup.device_name}" + ("" if peer is None else f"; the peer: {peer.peer} {peer.version or ''}")
    )


def _decode(batch: int, row: Row) -> str:
    return f"{row.decode_throughput(batch):,.0f}"


def _peer_ratio(name: str, row: Row) -> str:
    return "" if row.peer is None else f"{row.peer.ratios[name]:.2f}"


def _latency(name: str, row: Row) -> str:
    found = row.latency(name)
    return "" if found is None else f"{found:,.2f}"
