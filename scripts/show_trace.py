"""Draw what the scheduler did, from the file that LLMQ_TRACE names.

    LLMQ_TRACE=trace.jsonl llmq generate demo -i prompts.txt
    python scripts/show_trace.py trace.jsonl

A line a step, a column a request in the order of arrival:

    P a chunk of its prompt    . its next tokens    ! preempted    < came back from main memory
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

BAR = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--first", type=int, default=0, help="first step to show")
    parser.add_argument("--last", type=int, default=None, help="last step to show")
    parser.add_argument("--requests", type=int, default=60, help="columns at most")
    arguments = parser.parse_args()
    steps = [json.loads(line) for line in arguments.trace.read_text(encoding="utf-8").splitlines()]
    shown = [one for one in steps if arguments.first <= one["step"] <= (arguments.last or one["step"])]
    for line in draw(shown, arguments.requests):
        print(line)
    for line in summarize(steps):
        print(line)


def draw(steps: list[dict[str, Any]], most_requests: int) -> list[str]:
    """The picture, line by line."""
    columns: dict[str, int] = {}
    for step in steps:
        for name in _touched(step):
            columns.setdefault(name, len(columns))
    width = min(len(columns), most_requests)
    lines = [f"{'step':>6} {'tokens':>6} {'run':>4} {'wait':>5} {'swap':>4}  {'blocks used':<{BAR}}  requests"]
    for step in steps:
        cells = [" "] * width
        for name, mark in _marks(step).items():
            if columns[name] < width:
                cells[columns[name]] = mark
        tokens = sum(row[1] for row in step["rows"])
        used = step["blocks_total"] - step["blocks_free"]
        bar = ("#" * round(BAR * used / max(1, step["blocks_total"]))).ljust(BAR)
        notes = [f"{step[name]} {text}" for name, text in _NOTES.items() if step[name]]
        if step["wait"]:
            notes.append(f"{_name(step['head'])} waits: {step['wait']}")
        lines.append(
            f"{step['step']:>6} {tokens:>6} {step['running']:>4} {step['waiting']:>5} {step['swapped']:>4}  {bar}  "
            f"{''.join(cells)}  {', '.join(notes)}".rstrip()
        )
    return lines


def summarize(steps: list[dict[str, Any]]) -> list[str]:
    """Totals, and how many steps the head of the line waited for what."""
    waits: dict[str, int] = {}
    for step in steps:
        if step["wait"]:
            waits[step["wait"]] = waits.get(step["wait"], 0) + 1
    tokens = sum(row[1] for step in steps for row in step["rows"])
    preempted = sum(len(step["preempted"]) for step in steps)
    return [
        f"{len(steps)} steps, {tokens} tokens, {preempted} preemptions, "
        + ", ".join(f"{sum(step[name] for step in steps)} {text}" for name, text in _NOTES.items()),
        "waits: " + (", ".join(f"{count} for {name}" for name, count in sorted(waits.items())) or "none"),
    ]


_NOTES = {
    "swap_out": "blocks out",
    "swap_in": "blocks in",
    "copies": "copies",
    "rejected": "rejected",
}


def _name(request_id: Any) -> str:
    return "/".join(str(part) for part in request_id if part != "") if isinstance(request_id, list) else str(request_id)


def _touched(step: dict[str, Any]) -> list[str]:
    return [_name(row[3]) for row in step["rows"]] + [_name(one) for one in step["preempted"]]


def _marks(step: dict[str, Any]) -> dict[str, str]:
    marks: dict[str, str] = {}
    fresh = {_name(one) for one in step["admitted"]}
    for _, tokens, _, request_id in step["rows"]:
        name = _name(request_id)
        marks[name] = "P" if tokens > 1 or name in fresh else marks.get(name, ".")
    marks |= dict.fromkeys((_name(one) for one in step["resumed"]), "<")
    return marks | dict.fromkeys((_name(one) for one in step["preempted"]), "!")


if __name__ == "__main__":
    main()
