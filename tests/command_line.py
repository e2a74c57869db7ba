"""Run llmq's command line within the test process, as fast as a function and as real as the console script."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from unittest.mock import patch

from llmq.cli import main


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


def llmq(*arguments: object, stdin: str = "") -> Result:
    """What ``llmq arguments…`` prints, and its exit code."""
    out, err = io.StringIO(), io.StringIO()
    argv: Sequence[str] = ["llmq", *map(str, arguments)]
    code: object = 0
    with (
        redirect_stdout(out),
        redirect_stderr(err),
        patch.object(sys, "argv", argv),
        patch("sys.stdin", io.StringIO(stdin)),
    ):
        try:
            main()
        except SystemExit as exit_:
            code = exit_.code
    return Result(code if isinstance(code, int) else 0, out.getvalue(), err.getvalue())
