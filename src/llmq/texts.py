"""Texts to calibrate on and to score: a UTF-8 file, or a ``.jsonl`` file with a ``text`` in each line. No torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from llmq.errors import LlmqError

SEPARATOR = "\n\n"
"""Between documents, as the evaluations of the GPTQ and AWQ papers join WikiText's."""


ToText = Callable[[Any, str], str]
"""From a row, and the words for where it stands, to its text; or an LlmqError."""


def read_text(path: Path, hint: str, most: int | None = None, to_text: ToText | None = None) -> str:
    """The text of ``path``, about ``most`` characters of it if it is longer. ``to_text``: of what a line of ``.jsonl``
    says, else its ``text``. LlmqError, with ``hint``, when it cannot be read."""
    try:
        with path.open(encoding="utf-8-sig") as stream:
            if path.suffix != ".jsonl":
                return stream.read(most)
            return join(_jsonl_texts(path, stream, to_text or partial(_text, hint=hint)), most)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise LlmqError(f"{path} cannot be read: {reason}", hint) from None


def join(texts: Iterable[str], most: int | None) -> str:
    """Documents, one behind the other, until they have about ``most`` characters."""
    joined, left = [], most
    for text in texts:
        joined.append(text)
        if left is not None and (left := left - len(text)) <= 0:
            break
    return SEPARATOR.join(joined)


def _jsonl_texts(path: Path, lines: Iterator[str], to_text: ToText) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        yield to_text(row, f"{path.name}, line {number}")


def _text(row: Any, where: str, hint: str) -> str:
    text = row.get("text") if isinstance(row, Mapping) else None
    if not isinstance(text, str):
        raise LlmqError(f'{where}: not a JSON object with a "text"', hint)
    return checked(text, where, hint)


def checked(text: str, where: str, hint: str) -> str:
    """``text``. LlmqError where it has half of a surrogate pair, which JSON can say and no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise LlmqError(f"{where} is not Unicode text: it has half of a character", hint) from None
    return text
