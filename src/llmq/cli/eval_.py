"""``llmq eval``"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress

from llmq.cli import options
from llmq.cli.console import err, out, print_json, table
from llmq.evals.perplexity import WINDOW, evaluate_perplexity


def evaluate(
    model: options.Model,
    data: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A UTF-8 text. [default: the demo's]", show_default=False)
    ] = None,
    window: Annotated[int, typer.Option(help="Tokens scored together, at most the model's context.")] = WINDOW,
    dtype: options.DType = "auto",
    device: options.Device = "auto",
    revision: options.Revision = None,
    json: options.Json = False,
) -> None:
    """Perplexity of a model on a text, in windows that do not overlap.

    llmq eval demo
    """
    with Progress(*Progress.get_default_columns(), console=err, disable=not err.is_terminal, transient=True) as bar:
        task = bar.add_task("scoring", total=None)
        result = evaluate_perplexity(
            model,
            data=data,
            window=window,
            dtype=dtype,
            device=device,
            revision=revision,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    if json:
        print_json("llmq.eval/1", result.as_json())
        return
    out.print(f"perplexity {result.perplexity:.4f}")
    out.print()
    grid = table("", "")
    grid.add_row("text", result.data)
    grid.add_row("scored", f"{result.tokens:,} tokens in {result.windows:,} windows of {result.window:,}")
    grid.add_row("time", f"{result.seconds:.1f} s on {result.device} in {result.dtype}")
    out.print(grid)
