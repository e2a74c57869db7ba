"""``llmq bench kernels``"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from llmq.cli import options
from llmq.cli.bench import flags
from llmq.cli.console import out, print_report, progress, table
from llmq.errors import USAGE, LlmqError
from llmq.quant.schemes import PRESETS
from llmq.scheme import Scheme

if TYPE_CHECKING:
    from llmq.bench.kernels import KernelsReport

DENSE = "16bit"


def kernels(
    model: options.Model,
    schemes: Annotated[
        str, typer.Option(metavar="LIST", help=f"{DENSE} (as wide as activations), {', '.join(PRESETS)}.")
    ] = f"{DENSE},w4a16,w8a8,fp8",
    rows: Annotated[str, typer.Option(metavar="LIST", help="Tokens that a step computes.")] = "1,16,64,2048",
    dtype: options.DType = "auto",
    device: options.Device = "auto",
    revision: options.Revision = None,
    output: flags.Output = None,
    json: options.Json = False,
) -> None:
    """GB/s, TFLOP/s and share of the roofline of every linear layer of a model, by scheme. Needs only its config.json.

    llmq bench kernels demo --rows 1,16
    """
    counts = flags.numbers(rows, "--rows", int)
    chosen = {name: _scheme(name) for name in schemes.split(",")}

    from llmq.bench.kernels import bench_kernels

    with progress("layers") as bar:
        report = bench_kernels(model, chosen, counts, revision=revision, dtype=dtype, device=device, progress=bar)
    print_report("llmq.bench.kernels/1", report.as_json(), show=partial(_print, report), json=json, file=output)


def _scheme(name: str) -> Scheme | None:
    if name == DENSE:
        return None
    if name not in PRESETS:
        raise LlmqError(f"there is no scheme {name!r}", f"choose {DENSE}, {', '.join(PRESETS)}", exit_code=USAGE)
    return PRESETS[name].scheme


def _print(report: KernelsReport) -> None:
    roofline = report.roofline
    rates = ", ".join(
        f"{rate / 1e12:,.2f} TFLOP/s of {number or report.dtype}" for number, rate in roofline.rates.items()
    )
    out.print(f"{report.setting['device_name']}: copies {roofline.bandwidth / 1e9:,.1f} GB/s, multiplies {rates}")
    out.print()
    grid = table("layer", "shape", "scheme", "rows", "µs", "GB/s", "TFLOP/s", "of the roofline")
    for product in report.products:
        grid.add_row(
            product.layer,
            f"{product.shape[0]} × {product.shape[1]}",
            product.scheme,
            f"{product.rows}",
            f"{product.seconds * 1e6:,.1f}",
            f"{product.bandwidth / 1e9:,.1f}",
            f"{product.rate / 1e12:,.3f}",
            f"{product.share:.0%}",
        )
    out.print(grid)
