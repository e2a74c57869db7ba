"""Two reports of the same measurement, figure by figure. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from llmq.bench.load import Load
from llmq.bench.uneven import Requests
from llmq.bench.workload import Workload
from llmq.errors import CHECK_FAILED, LlmqError

ALIKE = (
    "schema",
    "device_name",
    *(field.name for field in fields(Workload)),
    *(field.name for field in fields(Load)),
    *(field.name for field in fields(Requests) if field.name != "growth"),
    "workload",
    "seats",
    "batch_size",
    "endpoint",
    "ignore_eos",
    "axis",
)
"""What two runs must have in common: the measurement, the work and the machine. What may differ is what is compared:
the model, its scheme, the version, the engine's options."""
ABOUT = ("model_id", "dtype", "llmq", "commit", "torch", "driver", "power_limit_w", "max_num_seqs", "date")
"""What is said of each run."""
LESS_IS_BETTER = ("_ms", "_latency", "joules_per_token", "duration", "failed", "preemptions", "wasted")
FIGURES = ("throughput", "goodput", "peak_kv_usage", "_per_s", *LESS_IS_BETTER)
"""How the names of figures end."""
PARTS = {
    "cells": ("batch_size", "request_rate"),
    "schemes": ("scheme",),
    "ways": ("way",),
    "products": ("layer", "scheme", "rows"),
}
"""The parts that a report is of, and by which of their fields they are known."""


@dataclass(frozen=True, slots=True)
class Change:
    """A figure of both runs. ``cell``: the part of a report that it is of, a load or a scheme."""

    name: str
    before: float
    after: float
    cell: str = ""

    @property
    def ratio(self) -> float | None:
        """After over before; None where there was nothing before."""
        return self.after / self.before if self.before else None

    @property
    def better(self) -> bool:
        less = self.name.endswith(LESS_IS_BETTER)
        return self.after < self.before if less else self.after > self.before

    def as_json(self) -> dict[str, Any]:
        return {"figure": self.name, "cell": self.cell or None, "a": self.before, "b": self.after, "ratio": self.ratio}


@dataclass(frozen=True, slots=True)
class Diff:
    """``about``: what differs between the runs that the figures are not, as (name, a, b)."""

    about: tuple[tuple[str, Any, Any], ...]
    changes: tuple[Change, ...]

    def as_json(self) -> dict[str, Any]:
        about = {name: {"a": before, "b": after} for name, before, after in self.about}
        return {"differs": about, "figures": [change.as_json() for change in self.changes]}


def diff(before: Path, after: Path) -> Diff:
    """The figures of two reports that ``--output`` or ``--json`` wrote. LlmqError when one is none, or they are of runs
    that cannot be compared; it names the field."""
    a, b = read_report(before), read_report(after)
    for name in ALIKE:
        if a.get(name) != b.get(name):
            raise LlmqError(
                f"the runs are not alike: {name} is {a.get(name)} in {before}, and {b.get(name)} in {after}",
                "run both with the same workload, on the same device",
                exit_code=CHECK_FAILED,
            )
    about = [(name, a.get(name), b.get(name)) for name in ABOUT if a.get(name) != b.get(name)]
    return Diff(tuple(about), tuple(_changes(a, b)))


def read_report(path: Path) -> dict[str, Any]:
    """A report of one of the measurements."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LlmqError(f"{path} cannot be read: {error.strerror}", "check the path") from None
    except ValueError as error:
        raise LlmqError(f"{path} is no JSON: {error}", "it is what --output or --json writes") from None
    if not isinstance(found, dict) or not str(found.get("schema", "")).startswith("llmq.bench."):
        raise LlmqError(f"{path} is no report of llmq bench", "it is what --output or --json writes")
    return found


def _changes(a: dict[str, Any], b: dict[str, Any]) -> Iterator[Change]:
    yield from _of_one(a, b)
    for part, known_by in PARTS.items():
        others = {_name(cell, known_by): cell for cell in b.get(part, [])}
        for cell in a.get(part, []):
            name = _name(cell, known_by)
            if name in others:
                yield from _of_one(cell, others[name], name)


def _name(cell: dict[str, Any], known_by: Sequence[str]) -> str:
    return " ".join(f"{field} {cell[field]}" for field in known_by if field in cell)


def _of_one(a: dict[str, Any], b: dict[str, Any], cell: str = "") -> Iterator[Change]:
    for name, before in a.items():
        after = b.get(name)
        told_twice = name.startswith("median") and name.replace("median", "p50", 1) in a
        if not name.endswith(FIGURES) or name.startswith("std") or told_twice:
            continue
        if isinstance(before, dict) and isinstance(after, dict):
            both = (key for key in before if key in after)
            yield from (Change(f"{name} {key}", before[key], after[key], cell) for key in both)
        elif isinstance(before, int | float) and isinstance(after, int | float):
            yield Change(name, before, after, cell)
