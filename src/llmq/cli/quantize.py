"""``llmq quantize``"""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated

import typer

from llmq import memory
from llmq.checkpoint.formats import FORMATS
from llmq.cli import options
from llmq.cli.console import err, out, print_json, table
from llmq.cli.progress import show_progress
from llmq.quant.backends import BACKEND_NAMES, preferences
from llmq.quant.options import ACT_ORDERS, DEFAULTS, FP8, SELF, Calibration, Rule
from llmq.quant.schemes import CALIBRATED, DEFAULT, METHODS, PRESETS, choose
from llmq.scheme import BITS, GROUP_SIZES, INT, Scheme

if TYPE_CHECKING:
    from llmq.quant.needs import Needs
    from llmq.quant.report import QuantizationReport

_CALIBRATION = DEFAULTS.calibration


def _use_recipe(context: typer.Context, recipe: str | None) -> str | None:
    """What the recipe says takes the place of the flags' defaults; what is typed wins."""
    if recipe is not None:
        from llmq.quant.recipe import read_recipe

        context.default_map = read_recipe(recipe).model_dump(exclude_unset=True)
    return recipe


def quantize(
    model: options.Model,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FOLDER", help="The folder to write.")],
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            callback=_use_recipe,
            is_eager=True,
            help="Flags by a name of llmq recipe list, or in a file; those given here win.",
        ),
    ] = None,
    scheme: Annotated[
        str | None, typer.Option(help=f"Bits and groups by name: {', '.join(PRESETS)}.", show_default=DEFAULT)
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(help=f"{', '.join(METHODS)} (rtn: round to nearest, without data).", show_default="by the scheme"),
    ] = None,
    bits: Annotated[int | None, typer.Option(help=f"Bits of a weight: {', '.join(map(str, BITS[INT]))}.")] = None,
    group_size: Annotated[
        int | None,
        typer.Option(
            help=f"Weights that share a scale: {', '.join(map(str, GROUP_SIZES))} (-1: a row, 0: the whole layer)."
        ),
    ] = None,
    sym: Annotated[bool | None, typer.Option("--sym/--asym", help="Zero point in the middle, or fitted.")] = None,
    format: Annotated[
        str | None, typer.Option(help=f"Of the folder: {', '.join(FORMATS)}.", show_default="by scheme and method")
    ] = None,
    override: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=SCHEME", help="Layers with a scheme of their own, or none; may be repeated."),
    ] = None,
    ignore: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A layer to leave as it is, or 're:…'; may be repeated.")
    ] = None,
    clip: Annotated[bool, typer.Option("--clip", help="rtn: clip ranges where that costs less.")] = DEFAULTS.clip,
    act_order: Annotated[str, typer.Option(help=f"gptq: {', '.join(ACT_ORDERS)}.")] = DEFAULTS.act_order,
    alpha: Annotated[
        str | None, typer.Option(help="smoothquant: 0 to 1, or auto.", show_default="by the model's family")
    ] = None,
    kv_cache_scheme: Annotated[
        str | None, typer.Option(help=f"{FP8}: measure scales for a KV cache of 8 bits.", show_default=False)
    ] = DEFAULTS.kv_cache,
    calib_data: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|ID|self|demo",
            help="A .txt, a .jsonl, a dataset of the hub; self: the model writes it; demo: a text shipped with llmq.",
            show_default="self",
        ),
    ] = _CALIBRATION.data,
    calib_samples: Annotated[int, typer.Option(help="Windows of calibration text.")] = _CALIBRATION.samples,
    calib_seqlen: Annotated[int, typer.Option(help="Tokens in a window.")] = _CALIBRATION.seqlen,
    calib_seed: Annotated[int, typer.Option(help="Decides which windows, and what the model writes.")] = (
        _CALIBRATION.seed
    ),
    device: options.Device = DEFAULTS.device,
    backend: Annotated[
        str, typer.Option(help=f"Whose quantizer: {', '.join(BACKEND_NAMES)}; see llmq backends.")
    ] = DEFAULTS.backend,
    revision: options.Revision = None,
    max_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Main memory to use; more hidden states go into files.", show_default="what is free"
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it takes, and whether it fits; stop.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output folder.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was stopped.")] = False,
    json: options.Json = False,
) -> None:
    """Quantize a model's weights and write a folder that transformers, vLLM and SGLang read.

    llmq quantize demo -o demo-w4 --scheme w4a16 --method gptq
    """
    choice = choose(*preferences(backend, scheme, method, format), bits=bits, group_size=group_size, symmetric=sym)
    calibration = Calibration(calib_data, calib_samples, calib_seqlen, calib_seed).of(model)
    overrides: dict[str, Scheme | None] = {}
    for rule in map(Rule.parse, override or ()):
        overrides.pop(rule.pattern, None)  # the last counts, and where it stands
        overrides[rule.pattern] = rule.scheme

    from llmq.quant.pipeline import quantize as run

    if choice.method in CALIBRATED and calibration.data == SELF:
        _warn_of_slow_text(model, revision, device, calibration)

    def show(needs: Needs) -> None:
        if dry_run and json:
            print_json("llmq.quantize.needs/1", needs.to_json())
        else:
            for line in needs.lines():
                err.print(line, style="dim")
        if dry_run:
            needs.check()
            raise typer.Exit

    with show_progress(err) as progress:
        report = run(
            model,
            output,
            scheme=choice.scheme,
            method=choice.method,
            format=choice.format,
            calibration=calibration,
            overrides=overrides,
            ignore=ignore or (),
            clip=clip,
            act_order=act_order,
            alpha=_alpha(alpha),
            kv_cache=kv_cache_scheme,
            device=device,
            backend=backend,
            revision=revision,
            max_memory=None if max_memory is None else memory.parse_bytes(max_memory),
            overwrite=overwrite,
            resume=resume,
            on_needs=show,
            progress=progress,
        )
    if json:
        print_json("llmq.quantize/1", report.to_json())
    else:
        _print_report(report)


def _alpha(text: str | None) -> float | str | None:
    """A number, where it is one."""
    try:
        return None if text is None else float(text)
    except ValueError:
        return text


def _warn_of_slow_text(model: str, revision: str | None, device: str, calibration: Calibration) -> None:
    """Say how long a large model will take on a CPU to write its own calibration text."""
    from llmq.checkpoint.folder import resolve
    from llmq.quant.self_calibration import INSTEAD, expected_seconds
    from llmq.runtime.device import resolve_device

    if resolve_device(device) == "cpu" and (seconds := expected_seconds(resolve(model, revision), calibration)):
        about = f"{seconds / 3600:.1f} hours" if seconds > 3600 else f"{seconds / 60:.0f} minutes"
        err.print(f"note: to write its own calibration text will take the model about {about} here; {INSTEAD}")


def _print_report(report: QuantizationReport) -> None:
    from llmq.quant.plot import can_plot
    from llmq.quant.report import errors_by_kind

    grid = table(
        "layer", "number", "error", "worst", "if rounded", title=f"relative squared error of the {report.error_of}"
    )
    for kind, layers in errors_by_kind(report.layers).items():
        errors = [layer.error for layer in layers]
        rounded = fmean(layer.rtn_error for layer in layers)
        grid.add_row(kind, str(len(layers)), f"{fmean(errors):.2e}", f"{max(errors):.2e}", f"{rounded:.2e}")
    if grid.row_count:
        out.print(grid)
        out.print()
    size_before, size_after = (memory.format_bytes(size) for size in (report.bytes_before, report.bytes_after))
    out.print(
        f"{report.model} → {report.output}: {report.scheme} by {report.method}, {size_before} → {size_after} "
        f"({report.effective_bits:.2f} bits a quantized weight)"
    )
    peak = f"{memory.format_bytes(report.peak_host_bytes)} of main memory"
    if report.peak_memory_bytes != report.peak_host_bytes:
        peak = f"{memory.format_bytes(report.peak_memory_bytes)} of it and {peak}"
    out.print(f"{report.seconds:.1f} s on {report.device}, at most {peak}; loads and runs")
    for warning in report.warnings:
        err.print(f"warning: {warning}")
    if not can_plot():
        err.print("note: there is no picture of the errors, for want of matplotlib: pip install 'llmq[plots]'")
