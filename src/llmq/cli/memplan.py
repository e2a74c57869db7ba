"""``llmq memplan``"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, cast

import typer

from llmq.cli import options
from llmq.cli.console import out, print_json, table
from llmq.engine.options import EngineOptions, LoadFormat
from llmq.errors import CHECK_FAILED, USAGE, LlmqError, either
from llmq.memory import KV_DTYPE_BYTES, format_bytes, parse_bytes
from llmq.memplan import engines, report
from llmq.memplan.gpu import USABLE_GIB, first_gpu_memory, named_memory
from llmq.memplan.hints import changes_that_fit
from llmq.memplan.plan import AUTO, Load, MemoryPlan, plan
from llmq.memplan.quantization import QuantizationPlan, plan_quantization
from llmq.memplan.solve import QUESTIONS, solve
from llmq.memplan.source import Model, open_model
from llmq.quant.options import DEFAULTS, SCHEMES
from llmq.quant.schemes import CALIBRATED, PRESETS, choose, methods_for
from llmq.scheme import Scheme

_ENGINE = EngineOptions()
_LOAD = Load()
SERVE, QUANTIZE = PHASES = ("serve", "quantize")
AS_IT_IS = "none"
OF_BOTH_PHASES = {
    "model", "gpu", "gpu_memory", "scheme", "bits", "group_size", "symmetric", "phase", "revision", "json",
}  # fmt: skip
"""The parameters that mean something to QUANTIZE too."""


def _list_gpus(wanted: bool) -> None:
    if not wanted:
        return
    grid = table("GPU", "usable GiB")
    for name, gib in USABLE_GIB.items():
        grid.add_row(name, f"{gib:.1f}")
    out.print(grid)
    raise typer.Exit


def memplan(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="A folder, a config.json, a hub id, or 'demo'.", show_default=False),
    ],
    gpu: Annotated[
        str | None, typer.Option(metavar="NAME", help="A common GPU: h100-80gb, rtx-4090, …", show_default=False)
    ] = None,
    gpu_memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Memory of the GPU, e.g. 24GiB.", show_default="the one here"),
    ] = None,
    num_gpus: Annotated[
        int, typer.Option("--num-gpus", "-tp", help="GPUs that share the model (tensor parallel).")
    ] = 1,
    max_model_len: Annotated[
        int | None,
        typer.Option(help="Tokens of a sequence, prompt and completion.", show_default="the model's context"),
    ] = _LOAD.max_model_len,
    batch_size: Annotated[
        int, typer.Option("--batch-size", "--concurrency", help="Sequences in the cache at once.")
    ] = _LOAD.batch_size,
    scheme: Annotated[
        str | None,
        typer.Option(metavar="NAME", help=f"Plan weights in {', '.join(PRESETS)}.", show_default="as they are"),
    ] = None,
    bits: Annotated[int | None, typer.Option(help="Bits of a weight, instead of the scheme's.")] = None,
    group_size: Annotated[int | None, typer.Option(help="Weights that share a scale; -1: a whole row.")] = None,
    symmetric: Annotated[bool | None, typer.Option("--sym/--asym", help="Zero point in the middle, or fitted.")] = None,
    kv_cache_dtype: Annotated[
        str, typer.Option(help=f"{AUTO} (the model's), {', '.join(KV_DTYPE_BYTES)}.")
    ] = _LOAD.kv_cache_dtype,
    engine: Annotated[str, typer.Option(help="Whose memory: llmq, vllm, or ideal (just what the model needs).")] = (
        engines.LLMQ
    ),
    solve_for: Annotated[
        str | None,
        typer.Option("--solve", metavar="WHAT", help=f"Turn it around: {', '.join(QUESTIONS)}.", show_default=False),
    ] = None,
    as_table: Annotated[bool, typer.Option("--table", help="Users by scheme, KV type and context.")] = False,
    phase: Annotated[str, typer.Option(help="serve, or quantize: what llmq quantize will need.")] = SERVE,
    explain: Annotated[
        bool, typer.Option("--explain", help="Layer by layer, engine by engine, and assumptions.")
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Draw memory against context: .png, .svg or .pdf.",
            callback=options.check_plot,
            show_default=False,
        ),
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Load it, run a full batch, and compare.")] = False,
    load_format: options.LoadFormat = _ENGINE.load_format,
    list_gpus: Annotated[
        bool, typer.Option("--list-gpus", help="Print the GPUs known by name.", callback=_list_gpus, is_eager=True)
    ] = False,
    max_num_seqs: options.MaxNumSeqs = _ENGINE.max_num_seqs,
    max_num_batched_tokens: Annotated[
        int | None, typer.Option(help="Tokens that one step may compute.", show_default="the engine's on such a GPU")
    ] = None,
    block_size: Annotated[
        int | None, typer.Option(help="Tokens in a block of the KV cache.", show_default="the engine's")
    ] = None,
    gpu_memory_utilization: options.GpuMemoryUtilization = _ENGINE.gpu_memory_utilization,
    revision: options.Revision = None,
    json: options.Json = False,
) -> None:
    """Plan a model's memory on a GPU: does it fit, how many sequences at once, how long a context?

    Reads config.json and the headers of the weights, and loads nothing; config.json alone will do. Exits with 3 when
    it does not fit.

    llmq memplan demo --gpu rtx-4090 --concurrency 16 --max-model-len 2048

    llmq memplan Qwen/Qwen3-8B --gpu h100-80gb --solve concurrency --scheme w4a16
    """
    if phase not in PHASES:
        raise LlmqError(f"there is no phase {phase!r}", f"choose --phase {', '.join(PHASES)}", exit_code=USAGE)
    planned_scheme = _scheme(scheme, bits, group_size, symmetric)
    memory = _gpu_memory(gpu, gpu_memory)
    known = open_model(model, revision)
    if phase == QUANTIZE:
        if scheme == AS_IT_IS:
            raise LlmqError(f"--scheme {AS_IT_IS} quantizes nothing", "choose another --scheme", exit_code=USAGE)
        for flag in _typed(context, but=OF_BOTH_PHASES):
            raise LlmqError(f"{flag} is of --phase {SERVE}", f"leave out {flag}", exit_code=USAGE)
        _quantization(model, known, planned_scheme or DEFAULTS.choice.scheme, memory, json=json)
        return
    result = plan(
        known,
        scheme=planned_scheme,
        load=Load(batch_size, max_model_len, kv_cache_dtype),
        options=EngineOptions(
            max_num_seqs,
            max_num_batched_tokens,
            engines.default_block_size(engine, _ENGINE.block_size) if block_size is None else block_size,
            gpu_memory_utilization=gpu_memory_utilization,
            load_format=cast(LoadFormat, load_format),
        ),
        engine=engine,
        num_gpus=num_gpus,
        gpu_memory=memory,
    )
    answer = None if solve_for is None else solve(result, solve_for, SCHEMES)
    result = result if answer is None else answer.plan
    if plot is not None:
        from llmq.memplan.plot import draw

        draw(result, plot)
    lines = None
    if verify:
        from llmq.bench.memory import verify as compare

        lines = compare(model, result, revision=revision, load_format=cast(LoadFormat, load_format))
    if json:
        value = {"model": model, **report.as_json(result, SCHEMES)}
        if as_table:
            value["table"] = report.capacities(result, SCHEMES)
        if answer is not None:
            value["solve"] = {"question": answer.question, "answer": answer.value}
        if lines is not None:
            value["verify"] = [asdict(line) | {"holds": line.holds} for line in lines]
        print_json("llmq.memplan/2", value)
    else:
        if answer is not None:
            out.print(f"{answer.question}: {answer.text}")
        _print(result)
        _print_lines(report.explanation(result) if explain else ())
        if as_table:
            _print_table(*report.capacity_table(result, SCHEMES))
        if lines is not None:
            _print_table(["", "predicted", "measured", "off by"], [line.row() for line in lines])
    for warning in report.warnings(result):
        print(f"warning: {warning}", file=sys.stderr)
    for change in changes_that_fit(result, SCHEMES):
        print(f"hint: {change.flag} makes it fit ({change.price}): {format_bytes(change.total)}", file=sys.stderr)
    failed = lines is not None and not all(line.holds for line in lines)
    if result.fits is False or failed or (answer is not None and answer.value is None):
        raise typer.Exit(CHECK_FAILED)


def _typed(context: typer.Context, *, but: Collection[str]) -> Iterator[str]:
    """The flags on the command line."""
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if parameter.name not in but and source is not None and source.name == "COMMANDLINE":
            yield parameter.opts[0]


def _gpu_memory(gpu: str | None, size: str | None) -> int | None:
    if gpu is not None and size is not None:
        raise LlmqError("--gpu and --gpu-memory both say how large the GPU is", "keep one of them", exit_code=USAGE)
    if gpu is not None:
        return named_memory(gpu)
    return first_gpu_memory() if size is None else parse_bytes(size)


def _scheme(name: str | None, bits: int | None, group_size: int | None, symmetric: bool | None) -> Scheme | None:
    """None when nothing is named, or none by name: the weights as they are."""
    changed = (bits, group_size, symmetric) != (None, None, None)
    if name == AS_IT_IS and changed:
        raise LlmqError(
            f"--scheme {AS_IT_IS} has no bits, groups or zero points", f"leave out --scheme {AS_IT_IS}", exit_code=USAGE
        )
    if name == AS_IT_IS or (name is None and not changed):
        return None
    return choose(name or DEFAULTS.choice.scheme, bits=bits, group_size=group_size, symmetric=symmetric).scheme


def _print(result: MemoryPlan) -> None:
    out.print(report.verdict(result))
    out.print(report.bar(result))
    _print_table(["", "memory", ""], [list(row) for row in report.memory_rows(result)])
    _print_lines(f"{question}: {answer}" for question, answer in report.limit_rows(result))


def _print_table(columns: list[str], rows: list[list[str]]) -> None:
    out.print()
    grid = table(*columns)
    if columns[-1] == "":  # words, not figures
        grid.columns[-1].justify = "left"
    for row in rows:
        grid.add_row(*row)
    out.print(grid)


def _quantization(model: str, known: Model, scheme: Scheme, gpu_memory: int | None, *, json: bool) -> None:
    """What each method that makes ``scheme`` will need."""
    calibration = DEFAULTS.calibration
    plans = [
        plan_quantization(
            known,
            scheme,
            method,
            calibrated=method in CALIBRATED,
            samples=calibration.samples,
            seqlen=calibration.seqlen,
        )
        for method in methods_for(scheme)
    ]
    fitting = [plan.method for plan in plans if gpu_memory is not None and plan.device <= gpu_memory]
    fits = None if gpu_memory is None else bool(fitting)
    if json:
        methods = [
            {"method": plan.method, "fits": None if fits is None else plan.method in fitting, **_parts(plan)}
            for plan in plans
        ]
        value = {"model": model, "scheme": str(scheme), "gpu_memory": gpu_memory, "fits": fits, "methods": methods}
        print_json("llmq.memplan.quantize/1", value)
    else:
        columns = ["method", *_parts(plans[0])]
        if gpu_memory is not None:
            verdict = f"fits, by {either(fitting)}" if fitting else "does not fit, by any method"
            out.print(f"{verdict}: the device has {format_bytes(gpu_memory)}")
        out.print(f"quantizing {model} to {scheme}; all but the disk are estimates")
        _print_table(columns, [[plan.method, *map(format_bytes, _parts(plan).values())] for plan in plans])
    if fits is False:
        print("hint: llmq quantize --device cpu takes of main memory what it would of the device", file=sys.stderr)
        raise typer.Exit(CHECK_FAILED)


def _parts(plan: QuantizationPlan) -> dict[str, int]:
    return {
        "device": plan.device,
        "block": plan.block,
        "copies": plan.copies,
        "moments": plan.moments,
        "activations": plan.activations,
        "states": plan.states,
        "disk": plan.disk,
    }


def _print_lines(lines: Iterable[str]) -> None:
    texts = list(lines)
    if texts:
        out.print()
    for text in texts:
        out.print(text)
