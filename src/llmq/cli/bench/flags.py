"""Flags that several measurements share, and the table of their latencies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from llmq.bench.load import Load
from llmq.bench.metrics import PERCENTILES, Metrics
from llmq.bench.workload import DATASETS, Workload
from llmq.cli.console import err, out, table
from llmq.cli.options import check_plot, check_writable, with_flags
from llmq.errors import USAGE, LlmqError

Number = TypeVar("Number", int, float)
Output = Annotated[
    Path | None,
    typer.Option(
        "-o",
        "--output",
        metavar="FILE",
        help="Write the JSON to a file, too.",
        callback=check_writable,
        show_default=False,
    ),
]
Goodput = Annotated[
    str | None,
    typer.Option(help="Limits in ms that good requests keep, e.g. 'ttft:200 tpot:50'.", show_default=False),
]
Peer = Annotated[
    str | None,
    typer.Option(help="transformers, vllm or a server's URL: run it too, in turns.", show_default=False),
]
Url = Annotated[str, typer.Argument(metavar="URL", help="Of a server with OpenAI's interface.", show_default=False)]
ApiKey = Annotated[str | None, typer.Option(envvar="LLMQ_API_KEY", help="The server's key.", show_default=False)]
Endpoint = Annotated[str, typer.Option(help="completions or chat.")]
ServedModel = Annotated[
    str | None, typer.Option("--model", help="Its name at the server.", show_default="the first there")
]
Tokenizer = Annotated[
    str | None,
    typer.Option(metavar="MODEL", help="Whose tokens random prompts are of.", show_default="the server's, if here"),
]
IgnoreEos = Annotated[
    bool, typer.Option("--ignore-eos/--no-ignore-eos", help="Ask for answers that do not end before --output-len.")
]
Plot = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="A picture: .png, .svg or .pdf.", callback=check_plot, show_default=False),
]
WORKLOAD_FLAGS: dict[str, Any] = {
    "dataset": Annotated[str, typer.Option(help=f"{', '.join(DATASETS)}.")],
    "dataset_path": Annotated[Path | None, typer.Option(metavar="FILE", help="Of the last three.", show_default=False)],
    "num_prompts": Annotated[int, typer.Option(help="Requests; of a file, its first so many.")],
    "input_len": Annotated[int, typer.Option(help="Tokens of each prompt.")],
    "output_len": Annotated[int, typer.Option(help="Tokens generated for each.")],
    "range_ratio": Annotated[float, typer.Option(help="Draw lengths between (1 - r) and (1 + r) times these.")],
    "num_prefixes": Annotated[int, typer.Option(help="prefix: beginnings that prompts share.")],
    "prefix_len": Annotated[int, typer.Option(help="prefix: tokens of each, of --input-len.")],
    "seed": Annotated[int, typer.Option(help="Same seed, same requests.")],
}
LOAD_FLAGS: dict[str, Any] = {
    "request_rate": Annotated[float, typer.Option(help="Requests a second; inf: all at once.")],
    "burstiness": Annotated[float, typer.Option(help="Of the gaps: 1 Poisson, less in bursts, inf even.")],
    "max_concurrency": Annotated[
        int | None, typer.Option(help="Requests under way at most; others wait here.", show_default=False)
    ],
    "ramp_up": Annotated[float, typer.Option(metavar="SECONDS", help="Let the rate grow from nothing for so long.")],
}


def with_workload_flags(command: Callable[..., None]) -> Callable[..., None]:
    """``command``, which takes a Workload as ``workload``, as one that takes each of WORKLOAD_FLAGS in that place."""
    fields = asdict(Workload())
    fields["dataset_path"] = fields.pop("path")

    def make(flags: dict[str, Any]) -> Workload:
        return Workload(path=flags.pop("dataset_path"), **flags)

    return with_flags(command, "workload", WORKLOAD_FLAGS, fields, make)


def with_load_flags(command: Callable[..., None]) -> Callable[..., None]:
    """``command``, which takes a Load as ``load``, as one that takes each of LOAD_FLAGS in that place."""
    return _with_load_flags(command, LOAD_FLAGS)


def with_shape_flags(command: Callable[..., None]) -> Callable[..., None]:
    """``with_load_flags``, but for the rate."""
    return _with_load_flags(command, {name: flag for name, flag in LOAD_FLAGS.items() if name != "request_rate"})


def _with_load_flags(command: Callable[..., None], flags: dict[str, Any]) -> Callable[..., None]:
    return with_flags(command, "load", flags, asdict(Load()), lambda given: Load(**given))


def is_chat(endpoint: str) -> bool:
    """LlmqError when it is neither."""
    if endpoint not in ("completions", "chat"):
        raise LlmqError(f"there is no endpoint {endpoint!r}", "choose completions or chat", exit_code=USAGE)
    return endpoint == "chat"


def numbers(text: str, flag: str, kind: type[Number]) -> list[Number]:
    """``1,2,4`` as numbers above 0, of integers or floats. LlmqError, naming ``flag``, when it is none."""
    try:
        found = [kind(number) for number in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(number > 0 for number in found):
        what = "whole numbers" if kind is int else "numbers"
        raise LlmqError(f"{text!r} is no list of {what} above 0", f"write {flag} 1,2,4,8", exit_code=USAGE)
    return found


def print_latencies(metrics: Metrics) -> None:
    """A row a latency."""
    grid = table("latency, ms", "mean", *(f"p{p}" for p in PERCENTILES))
    for name, latency in metrics.latencies.items():
        figures = () if latency is None else (latency.mean, *latency.percentiles.values())
        title = name.removeprefix("scheduled_").upper() + (" from schedule" if name.startswith("scheduled_") else "")
        grid.add_row(title, *(f"{figure:,.2f}" for figure in figures))
    out.print(grid)


def print_comparison(peer: Any) -> None:
    """Ratios to another engine, if there is one: a ``Comparison``."""
    if peer is None:
        return
    out.print()
    grid = table(f"llmq / {peer.peer}", "ratio", *(f"round {number + 1}" for number in range(len(peer.rounds))))
    for name, ratio in peer.ratios.items():
        rounds = (f"{ours[name]:,.1f} / {theirs[name]:,.1f}" for ours, theirs in peer.rounds)
        grid.add_row(name, f"{ratio:.3f}", *rounds)
    out.print(grid)


def warn_if_cached(cached: int | None, read: int, workload: Workload) -> None:
    """Say so where a prefix cache had what should be new to it: an earlier run asked for the same."""
    if cached and workload.dataset != "prefix":
        err.print(
            f"warning: {cached:,} of {read:,} prompt tokens were in the server's prefix cache; another --seed has "
            "prompts that it has not seen"
        )


def raise_if_failed(failed: int, total: int, errors: Sequence[str]) -> None:
    """LlmqError, with the reasons, when not all requests of a run succeeded."""
    if failed:
        raise LlmqError(f"{failed} of {total} requests failed: {'; '.join(errors)}")
