"""``llmq … --help`` answers for every command, and needs neither torch nor transformers for it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import pytest
import typer.main

from llmq import __version__
from llmq.cli import app
from llmq.cli.options import ENGINE_FLAGS
from llmq.engine.options import API_ONLY, EngineOptions

HEAVY = {"torch", "transformers", "triton"}

RUN = f"""
import sys
from llmq.cli import main
sys.argv[0] = "llmq"
try:
    main()
finally:
    print("loaded:", *sorted({HEAVY} & set(sys.modules)), file=sys.stderr)
"""


def commands(command: Any, *path: str) -> Iterator[tuple[str, ...]]:
    """``()``, ``("quantize",)``, ``("bench",)``, ``("bench", "throughput")``, …"""
    yield path
    for name, child in getattr(command, "commands", {}).items():
        yield from commands(child, *path, name)


COMMANDS = list(commands(typer.main.get_command(app)))


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", RUN, *arguments], capture_output=True, text=True, check=False)


def test_the_commands_are_found() -> None:
    assert {
        ("quantize",),
        ("convert",),
        ("inspect",),
        ("memplan",),
        ("generate",),
        *(("bench", name) for name in ("latency", "throughput", "serve", "sweep", "kernels", "diff")),
        ("eval",),
        ("env",),
    } <= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(("llmq", *command)))
def test_help(command: tuple[str, ...]) -> None:
    result = run(*command, "--help")
    assert result.returncode == 0, result.stderr
    assert " ".join(("Usage: llmq", *command)) in " ".join(result.stdout.split())
    assert result.stderr.split() == ["loaded:"]


def test_every_option_of_the_engine_is_a_flag_of_whatever_runs_it() -> None:
    assert set(ENGINE_FLAGS) == {field.name for field in fields(EngineOptions)} - set(API_ONLY)
    group: Any = typer.main.get_command(app)
    for command in (
        group.commands["generate"],
        group.commands["serve"],
        group.commands["bench"].commands["throughput"],
    ):
        assert set(ENGINE_FLAGS) <= {parameter.name for parameter in command.params}


def test_the_version_alone_is_printed() -> None:
    result = run("--version")
    assert (result.returncode, result.stdout, result.stderr.split()) == (0, f"{__version__}\n", ["loaded:"])


def test_an_unknown_command_is_a_usage_error() -> None:
    result = run("quantise")
    assert result.returncode == 2
    assert "quantise" in result.stderr


def test_what_the_encoding_of_stdout_does_not_have_is_no_failure() -> None:
    command = [sys.executable, "-m", "llmq", "memplan", "demo", "--gpu", "t4"]
    done = subprocess.run(command, capture_output=True, env=os.environ | {"PYTHONIOENCODING": "ascii"}, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.isascii()
    assert b"parameters" in done.stdout
