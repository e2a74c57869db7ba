"""What a user sees when something cannot be done: one sentence, and the command or flag that mends it."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from functools import cache

FAILED = 1
USAGE = 2
CHECK_FAILED = 3
"""Exit codes. 3 answers a question with no: does not fit, quality below the bound."""


class LlmqError(Exception):
    """A failure with a reason the user can act on, printed as ``error: …`` and ``hint: …``."""

    def __init__(self, message: str, hint: str | None = None, *, exit_code: int = FAILED) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.exit_code = exit_code


@cache
def note(text: str) -> None:
    """Say on stderr, once in a process, what is done in place of what was asked for, and why."""
    print(f"note: {text}", file=sys.stderr, flush=True)


def either(names: Iterable[object]) -> str:
    """What there is to choose from, in a sentence: ``gptq, awq or rtn``. At least one."""
    *others, last = map(str, names)
    return f"{', '.join(others)} or {last}" if others else last
