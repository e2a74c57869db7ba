"""How far a quantization is: a bar on a terminal, else one line a block, so that a log can be read."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from llmq.quant.pipeline import Step


@contextmanager
def show_progress(console: Console) -> Iterator[Callable[[Step], None]]:
    """Whom to tell each step."""
    if not console.is_terminal:
        yield Lines(console)
        return
    columns = (
        TextColumn("part {task.fields[part]}"),
        BarColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[what]}"),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None, part="", what="")

        def show(step: Step) -> None:
            part = f"{min(step.parts + 1, step.of_parts)} of {step.of_parts}"
            error = "" if step.layer is None else f", error {step.layer.error:.1e}"
            bar.update(task, completed=step.layers, total=step.of_layers, part=part, what=f"{step.what}{error}")

        yield show


class Lines:
    """A line for each part of the model that is done, and for whatever else is not a layer."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._started = time.monotonic()
        self._first: int | None = None

    def __call__(self, step: Step) -> None:
        if self._first is None:
            self._first = step.parts
        if step.layer is not None:
            return
        done, seconds = step.parts - self._first, time.monotonic() - self._started
        left = ""
        if done > 0 and step.parts < step.of_parts:
            left = f", {timedelta(seconds=round(seconds / done * (step.of_parts - step.parts)))} left"
        self._console.print(f"{step.parts} of {step.of_parts} parts: {step.what}{left}")
