"""What every command prints with: data on stdout, talk on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
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
    print(as_json(schema, value))


def as_json(schema: str, value: dict[str, Any]) -> str:
    return json.dumps({"schema": schema, **value}, indent=2)


def print_report(
    schema: str, value: dict[str, Any], *, show: Callable[[], None], json: bool, file: Path | None
) -> None:
    """A report on stdout, as ``show`` prints it or as JSON, and the JSON in ``file`` as well if there is one. LlmqError
    behind the report when ``file`` cannot be written: what took long is not lost with it."""
    unwritten: OSError | None = None
    if file is not None:
        try:
            file.write_text(as_json(schema, value) + "\n", encoding="utf-8")
        except OSError as error:
            unwritten = error
    if json:
        print_json(schema, value)
    else:
        show()
    if unwritten is not None:
        raise LlmqError(f"{file} cannot be written: {unwritten.strerror}", "the report is on stdout, and nowhere else")


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal's stderr, to be told how many of how many are done."""
    with Progress(*Progress.get_default_columns(), console=err, disable=not err.is_terminal, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def table(*columns: str, title: str | None = None) -> Table:
    """A plain table whose first column is text and whose other columns are figures."""
    grid = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(columns):
        grid.add_column(column, justify="left" if number == 0 else "right", no_wrap=True)
    return grid
