"""Requests from files.

sharegpt   JSON: a list of ``{"conversations": [{"from": …, "value": …}, …]}``. The first turn is the prompt, and as
           many tokens are generated as the second has. In an order that the seed gives, and as vLLM's benchmark does,
           without those of fewer than 4 tokens on a side, over 1024 in the prompt or over 2048 in all.
jsonl      JSON lines: ``prompt`` (a text, or token ids) or ``messages``, and perhaps ``output_len``
trace      when requests came and how long they were, with random prompts. JSON lines as Mooncake publishes them
           (https://github.com/kvcache-ai/Mooncake): ``timestamp`` in milliseconds, ``input_length``,
           ``output_length``; or CSV as Azure does (https://github.com/Azure/AzurePublicDataset): TIMESTAMP, a date or
           seconds, ContextTokens, GeneratedTokens
"""

from __future__ import annotations

import csv
import json
import math
import random
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from llmq.bench.workload import FROM_FILE, Item, Prompt, Vocabulary, Workload, draw_prompt, prompt_len
from llmq.errors import LlmqError

SHAREGPT_LEAST, SHAREGPT_PROMPT, SHAREGPT_TOTAL = 4, 1024, 2048
TRACE_COLUMNS = {
    "timestamp": "due",
    "input_length": "input",
    "contexttokens": "input",
    "output_length": "output",
    "generatedtokens": "output",
}


class Malformed(Exception):
    """What an entry of a file should be, and is not."""


def items_of(workload: Workload, vocabulary: Vocabulary | None, cell: int = 0) -> list[Item]:
    """The requests of measurement number ``cell``, which has none of another one's prompts: what an earlier one left
    in a prefix cache cannot flatter it. LlmqError when a file is not as it should be, or too short."""
    return (
        _read_items(workload, vocabulary, cell) if workload.dataset in FROM_FILE else workload.drawn(vocabulary, cell)
    )


def _read_items(workload: Workload, vocabulary: Vocabulary | None, cell: int) -> list[Item]:
    """Of a file: each measurement has its own part of it, or, of a trace, prompts of its own. LlmqError with the number
    of the line or entry that is malformed."""
    path = workload.path
    assert path is not None
    if workload.dataset == "trace":
        noise = random.Random(f"trace {workload.seed} {cell}")
        found = _read_trace(path, workload.num_prompts, noise, vocabulary)
    else:
        read = _read_sharegpt if workload.dataset == "sharegpt" else _read_jsonl
        every = read(path, workload, vocabulary)
        size = min(workload.num_prompts, len(every))
        found = every[cell * size : (cell + 1) * size]
        if len(found) < size:
            raise LlmqError(
                f"{path} has {len(every)} prompts: too few for {size} others in each of {cell + 1} measurements",
                "lower --num-prompts",
            )
    if not found:
        raise LlmqError(f"{path} has no prompts", "it needs one at least")
    return found


def _read_sharegpt(path: Path, workload: Workload, vocabulary: Vocabulary | None) -> list[Item]:
    try:
        entries = json.loads(_text(path))
    except ValueError as error:
        raise LlmqError(f"{path} is no JSON: {error}") from None
    if not isinstance(entries, list):
        raise LlmqError(f"{path} is no list of conversations", "is it --dataset jsonl?")
    found = []
    for number, entry in enumerate(entries, 1):
        with _numbered(path, "entry", number):
            turns = _field(entry, "conversations", list)
            texts = [_field(turn, "value", str) for turn in turns[:2]]
        if len(texts) < 2 or not all(texts):
            continue
        sizes = [prompt_len(Item(text, 1), vocabulary) for text in texts]
        if min(sizes) >= SHAREGPT_LEAST and sizes[0] <= SHAREGPT_PROMPT and sum(sizes) <= SHAREGPT_TOTAL:
            found.append(Item(texts[0], sizes[1]))
    random.Random(f"sharegpt {workload.seed}").shuffle(found)
    return found


def _read_jsonl(path: Path, workload: Workload, vocabulary: Vocabulary | None) -> list[Item]:
    found = []
    for number, entry in _json_lines(path):
        with _numbered(path, "line", number):
            found.append(Item(_prompt(entry), _length(entry, "output_len", workload.output_len)))
    return found


def _read_trace(path: Path, most: int, noise: random.Random, vocabulary: Vocabulary | None) -> list[Item]:
    rows = _csv_rows(path) if path.suffix == ".csv" else _json_lines(path)
    found: list[Item] = []
    first = latest = 0.0
    for number, row in rows:
        if len(found) == most:
            break
        with _numbered(path, "line", number):
            entry = {
                TRACE_COLUMNS[str(name).lower()]: value
                for name, value in row.items()
                if str(name).lower() in TRACE_COLUMNS
            }
            time = _seconds(entry.get("due"), milliseconds=path.suffix != ".csv")
            first, latest = (first, latest) if found else (time, time)
            if time < latest:
                raise Malformed("comes before the one before it")
            latest = time
            prompt = draw_prompt(noise, _length(entry, "input"), vocabulary)
            found.append(Item(prompt, _length(entry, "output"), time - first))
    return found


def _prompt(entry: dict[str, Any]) -> Prompt:
    prompt, messages = entry.get("prompt"), entry.get("messages")
    if (prompt is None) == (messages is None):
        raise Malformed("has not one of prompt and messages")
    if isinstance(messages, list) and messages:
        return [{"role": _field(one, "role", str), "content": _field(one, "content", str)} for one in messages]
    if prompt and isinstance(prompt, str):
        return prompt
    if prompt and isinstance(prompt, list) and all(type(token) is int and token >= 0 for token in prompt):
        return prompt
    raise Malformed("has a prompt that is neither a text, nor token ids, nor messages")


def _length(entry: dict[str, Any], name: str, default: int | None = None) -> int:
    value = entry.get(name, default)
    if isinstance(value, str) and value.strip().isdigit():
        value = int(value)
    if type(value) is not int or value < 1:
        raise Malformed(f"has {'no' if value is None else 'a wrong'} {name} length: it is a number, 1 or more")
    return value


def _seconds(value: object, *, milliseconds: bool) -> float:
    try:
        seconds = float(value) / (1000 if milliseconds else 1)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        pass
    else:
        if math.isfinite(seconds):
            return seconds
    try:
        return datetime.fromisoformat(str(value)).timestamp()
    except ValueError:
        raise Malformed(f"has {value!r} for its timestamp") from None


def _field(entry: object, name: str, kind: type) -> Any:
    value = entry.get(name) if isinstance(entry, dict) else None
    if not isinstance(value, kind):
        raise Malformed(f"has no {name}")
    return value


def _json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(_text(path).split("\n"), 1):  # splitlines ends lines within texts: at U+2028
        if not line.strip():
            continue
        with _numbered(path, "line", number):
            try:
                entry = json.loads(line)
            except ValueError as error:
                raise Malformed(f"is no JSON: {error}") from None
            if not isinstance(entry, dict):
                raise Malformed("is no JSON object")
        yield number, entry


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(_text(path).splitlines())
    for row in reader:
        yield reader.line_num, row


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise LlmqError(f"{path} cannot be read: {reason}", "check the path") from None


class _numbered:
    """What is malformed within becomes an LlmqError that says where."""

    def __init__(self, path: Path, unit: str, number: int) -> None:
        self.place = f"{path}, {unit} {number}"

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Malformed):
            raise LlmqError(f"{self.place} {error}", "llmq bench serve --help names the formats") from None
