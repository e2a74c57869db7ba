"""Texts to calibrate on and to score: a UTF-8 file, or a ``.jsonl`` file with a ``text`` in each line. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from llmq.errors import LlmqError

SEPARATOR = "\n\n"
"""Between documents, as the evaluations of the GPTQ and AWQ papers join WikiText's."""


def read_text(path: Path, hint: str, most: int | None = None) -> str:
    """The text of ``path``, about ``most`` characters of it if it is longer. LlmqError, with ``hint``, when it cannot
    be read."""
    try:
        with path.open(encoding="utf-8") as stream:
            if path.suffix != ".jsonl":
                return stream.read(most)
            texts: list[str] = []
            for text in _jsonl_texts(path, stream, hint):
                texts.append(text)
                if most is not None and sum(map(len, texts)) >= most:
                    break
            return SEPARATOR.join(texts)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise LlmqError(f"{path} cannot be read: {reason}", hint) from None


def _jsonl_texts(path: Path, lines: Iterator[str], hint: str) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError):
            text = None
        if not isinstance(text, str):
            raise LlmqError(f'{path.name}, line {number}: not a JSON object with a "text"', hint)
        yield text
