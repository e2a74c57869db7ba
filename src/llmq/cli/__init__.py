"""The command line: one file a subcommand, each of which parses, calls the library and prints."""

from __future__ import annotations

import os
import sys
import warnings
from io import TextIOWrapper
from typing import Annotated

import typer

from llmq import __version__
from llmq.cli import backends, bench, chat, convert, env, eval_, generate, inspect_, memplan, quantize, recipe, serve
from llmq.cli.console import print_error
from llmq.errors import FAILED, LlmqError

app = typer.Typer(
    help="Quantize a language model, plan its memory, generate with it, and measure what was won and lost.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("quantize")(quantize.quantize)
app.add_typer(recipe.app, name="recipe")
app.add_typer(backends.app, name="backends")
app.command("convert")(convert.convert)
app.command("inspect")(inspect_.inspect)
app.command("memplan")(memplan.memplan)
app.command("generate")(generate.generate)
app.command("serve")(serve.serve)
app.command("chat")(chat.chat)
app.add_typer(bench.app, name="bench")
app.command("eval")(eval_.evaluate)
app.command("env")(env.env)

DEBUG = "LLMQ_DEBUG"


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _common(
    debug: Annotated[
        bool, typer.Option("--debug", envvar=DEBUG, help="Show a traceback when something fails.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if debug:
        os.environ[DEBUG] = "1"


def main() -> None:
    """The console script. Exit codes: 0 done, 1 failed, 2 usage, 3 does not fit or check failed, 130 Ctrl-C."""
    warnings.showwarning = _show_warning
    if isinstance(sys.stdout, TextIOWrapper):  # an encoding without a bar's blocks is no reason to fail
        sys.stdout.reconfigure(errors="replace")
    try:
        app()
    except LlmqError as error:
        if os.environ.get(DEBUG):
            raise
        print_error(error)
        sys.exit(error.exit_code)
    except OSError as error:
        if os.environ.get(DEBUG):
            raise
        _abandon_stdout()
        # A reader of stdout that left (head, less) is not here: click ends that run, quietly.
        what = f"{error.filename}:" if error.filename else "stdout cannot be written:"
        print_error(LlmqError(f"{what} {error.strerror}", "check the path, and the space on the disk"))
        sys.exit(FAILED)


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"warning: {message}", file=sys.stderr)


def _abandon_stdout() -> None:
    """Let what stdout still holds go nowhere, or Python would fail again when it flushes at the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
