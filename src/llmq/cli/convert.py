"""``llmq convert``"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmq.checkpoint.convert import convert as run
from llmq.checkpoint.formats import FORMATS
from llmq.cli import options
from llmq.cli.console import err, out, print_json, progress
from llmq.memory import format_bytes


def convert(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A quantized model folder, or a hub id.", show_default=False)
    ],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FOLDER", help="The folder to write.")],
    format: Annotated[str, typer.Option(help=f"To write: {', '.join(FORMATS)}.", show_default=False)],
    revision: options.Revision = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output folder.")] = False,
    json: options.Json = False,
) -> None:
    """Write a quantized model in another format that holds the same numbers. Changes no value, or refuses.

    llmq convert demo-w4 -o demo-w4-awq --format awq
    """
    with progress("layers") as told:
        report = run(model, output, format, revision=revision, overwrite=overwrite, progress=told)
    if json:
        print_json("llmq.convert/1", report.to_json())
    else:
        out.print(
            f"{report.model} → {report.output}: {report.layers} layers of {report.scheme}, {report.source_format} → "
            f"{report.format}, {format_bytes(report.bytes_before)} → {format_bytes(report.bytes_after)}"
        )
    for warning in report.warnings:
        err.print(f"warning: {warning}")
