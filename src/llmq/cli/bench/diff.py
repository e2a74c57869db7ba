"""``llmq bench diff``"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmq.bench.diff import Change
from llmq.bench.diff import diff as compare
from llmq.cli import options
from llmq.cli.console import out, print_json, table

_Report = Annotated[Path, typer.Argument(help="What --output wrote.", show_default=False)]


def diff(a: _Report, b: _Report, *, json: options.Json = False) -> None:
    """Two reports of the same measurement, figure by figure: the second over the first. Exits with 3 if unlike.

    llmq bench diff before.json after.json
    """
    found = compare(a, b)
    if json:
        print_json("llmq.bench.diff/1", found.as_json())
        return
    for name, before, after in found.about:
        out.print(f"{name}: {before} → {after}")
    out.print()
    grid = table("figure", a.name[-24:], b.name[-24:], "ratio", "")
    for change in found.changes:
        ratio = "" if change.ratio is None else f"{change.ratio:.3f}"
        name = f"{change.cell} {change.name}".strip()
        grid.add_row(name, f"{change.before:,.3f}", f"{change.after:,.3f}", ratio, _verdict(change))
    out.print(grid)


def _verdict(change: Change) -> str:
    return "" if change.before == change.after else "better" if change.better else "worse"
