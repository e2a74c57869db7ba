"""``llmq bench …``, one file a subcommand."""

from __future__ import annotations

import typer

from llmq.cli.bench.batching import batching
from llmq.cli.bench.compare import compare
from llmq.cli.bench.diff import diff
from llmq.cli.bench.kernels import kernels
from llmq.cli.bench.latency import latency
from llmq.cli.bench.serve import serve
from llmq.cli.bench.sweep import sweep
from llmq.cli.bench.throughput import throughput

app = typer.Typer(help="Measure speed.", no_args_is_help=True)
app.command()(latency)
app.command()(throughput)
app.command()(serve)
app.command()(sweep)
app.command()(compare)
app.command()(batching)
app.command()(kernels)
app.command()(diff)


@app.callback()
def bench() -> None:
    """Measure speed."""
