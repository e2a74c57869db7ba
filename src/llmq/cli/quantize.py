"""``llmq quantize``"""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from llmq import memory
from llmq.checkpoint.formats import FORMATS
from llmq.cli import options
from llmq.cli.console import err, out, print_json, table
from llmq.quant.options import DEFAULTS, GPTQ, Calibration
from llmq.scheme import BITS, GROUP_SIZES, INT, Scheme

if TYPE_CHECKING:
    from llmq.quant.report import QuantizationReport

_SCHEME = DEFAULTS.scheme
_CALIBRATION = DEFAULTS.calibration


def quantize(
    model: options.Model,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FOLDER", help="The folder to write.")],
    method: Annotated[
        str, typer.Option(help="gptq, or rtn (round to nearest: no data, less exact).")
    ] = DEFAULTS.method,
    bits: Annotated[int, typer.Option(help=f"Bits of a weight: {', '.join(map(str, BITS[INT]))}.")] = _SCHEME.bits,
    group_size: Annotated[
        int, typer.Option(help=f"Weights that share a scale: {', '.join(map(str, GROUP_SIZES))} (a whole row).")
    ] = _SCHEME.group_size,
    sym: Annotated[bool, typer.Option("--sym/--asym", help="Zero point in the middle, or fitted.")] = _SCHEME.symmetric,
    format: Annotated[str, typer.Option(help=f"Of the folder: {', '.join(FORMATS)}.")] = DEFAULTS.format,
    calib_data: Annotated[
        str | None,
        typer.Option(metavar="FILE", help='A .txt, or a .jsonl with "text". [default: a text shipped with llmq]'),
    ] = _CALIBRATION.data,
    calib_samples: Annotated[int, typer.Option(help="Windows of calibration text.")] = _CALIBRATION.samples,
    calib_seqlen: Annotated[int, typer.Option(help="Tokens in a window.")] = _CALIBRATION.seqlen,
    ignore: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A layer to leave as it is, or 're:…'; may be repeated.")
    ] = None,
    device: options.Device = DEFAULTS.device,
    revision: options.Revision = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output folder.")] = False,
    json: options.Json = False,
) -> None:
    """Quantize a model's weights and write a folder that transformers, vLLM and SGLang read.

    llmq quantize demo -o demo-w4 --method gptq --bits 4
    """
    scheme = Scheme(bits, group_size, sym)
    calibration = Calibration(calib_data, calib_samples, calib_seqlen)

    from llmq.quant.pipeline import quantize as run

    columns = (
        TextColumn("quantizing"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[layer]}"),
    )
    with Progress(*columns, console=err, disable=not err.is_terminal, transient=True) as bar:
        task = bar.add_task("layers", total=None, layer="")

        def progress(done: int, total: int, layer: str) -> None:
            bar.update(task, completed=done, total=total, layer=layer)

        report = run(
            model,
            output,
            method=method,
            scheme=scheme,
            calibration=calibration,
            format=format,
            ignore=ignore or (),
            device=device,
            revision=revision,
            overwrite=overwrite,
            progress=progress,
        )
    if json:
        print_json("llmq.quantize/1", report.to_json())
    else:
        _print_report(report, scheme)


def _print_report(report: QuantizationReport, scheme: Scheme) -> None:
    from llmq.quant.report import errors_by_kind

    measured = "of the outputs" if report.method == GPTQ else "of the weights"
    grid = table("layer", "number", f"error {measured}", "worst", "if rounded", title="relative squared error")
    for kind, layers in errors_by_kind(report.layers).items():
        errors = [layer.error for layer in layers]
        rounded = fmean(layer.rtn_error for layer in layers)
        grid.add_row(kind, str(len(layers)), f"{fmean(errors):.2e}", f"{max(errors):.2e}", f"{rounded:.2e}")
    out.print(grid)
    out.print()
    size_before, size_after = (memory.format_bytes(size) for size in (report.bytes_before, report.bytes_after))
    out.print(
        f"{report.model} → {report.output}: {scheme} by {report.method}, {size_before} → {size_after} "
        f"({report.effective_bits:.2f} bits a quantized weight)"
    )
    peak = memory.format_bytes(report.peak_memory_bytes)
    out.print(f"{report.seconds:.1f} s on {report.device}, at most {peak} of memory; loads and generates")
    for warning in report.warnings:
        err.print(f"warning: {warning}")
