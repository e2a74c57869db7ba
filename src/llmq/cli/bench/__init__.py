"""``llmq bench …``, one file a subcommand."""

from __future__ import annotations

import typer

from llmq.cli.bench.throughput import throughput

app = typer.Typer(help="Measure speed.", no_args_is_help=True)
app.command()(throughput)


@app.callback()
def bench() -> None:
    """Measure speed."""
