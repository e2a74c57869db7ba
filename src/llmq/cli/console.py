"""What every command prints with: data on stdout, talk on stderr."""

from __future__ import annotations

import json
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from llmq.errors import LlmqError

PIPE_WIDTH = 160

# Brackets in a text are brackets, not markup. In a pipe there is no edge to cut a table at.
out = Console(markup=False, highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else PIPE_WIDTH)
err = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)


def print_error(error: LlmqError) -> None:
    """One sentence on stderr, and the command or flag that mends it."""
    print(f"error: {error.message}", file=sys.stderr)
    if error.hint:
        print(f"hint: {error.hint}", file=sys.stderr)


def print_json(schema: str, value: dict[str, Any]) -> None:
    """One JSON object on stdout that names its own schema and version: ``llmq.memplan/1``."""
    print(json.dumps({"schema": schema, **value}, indent=2))


def table(*columns: str, title: str | None = None) -> Table:
    """A plain table whose first column is text and whose other columns are figures."""
    grid = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(columns):
        grid.add_column(column, justify="left" if number == 0 else "right", no_wrap=True)
    return grid
