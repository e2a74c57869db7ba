"""llmq memplan: does it fit, how many at once, how long?"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from llmq.checkpoint.config import read_config
from llmq.checkpoint.folder import resolve
from llmq.cli.console import out, print_json, table
from llmq.engine.options import EngineOptions
from llmq.errors import CHECK_FAILED
from llmq.memory import format_bytes, parse_bytes
from llmq.memplan import report
from llmq.memplan.gpu import first_gpu_memory
from llmq.memplan.plan import Load, MemoryPlan, changes_that_fit, plan
from llmq.memplan.weights import planned_weights, stored_weights
from llmq.scheme import Scheme

SCHEMA = "llmq.memplan/1"
ENGINE, LOAD, SCHEME = EngineOptions(), Load(), Scheme()


def memplan(
    model: Annotated[str, typer.Argument(help="Model folder, hub id or demo. config.json alone will do.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    gpu_memory: Annotated[
        str | None, typer.Option(help="Memory of the GPU: 24GiB, 80GB.", show_default="of the GPU that is there")
    ] = None,
    gpu_memory_utilization: Annotated[
        float, typer.Option(help="Share of it that may be taken.")
    ] = ENGINE.gpu_memory_utilization,
    max_model_len: Annotated[
        int | None, typer.Option(help="Tokens of a sequence, completion included.", show_default="the model's context")
    ] = LOAD.max_model_len,
    batch_size: Annotated[
        int, typer.Option("--batch-size", "--concurrency", help="Sequences at once.")
    ] = LOAD.batch_size,
    bits: Annotated[
        int | None, typer.Option(help="Plan weights of 4 or 8 bits.", show_default="as the folder is")
    ] = None,
    group_size: Annotated[int | None, typer.Option(help="Weights that share a scale; -1: a whole row.")] = None,
    symmetric: Annotated[bool | None, typer.Option("--sym/--asym", help="Zero point in the middle, or fitted.")] = None,
    kv_cache_dtype: Annotated[
        str, typer.Option(help="auto (the model's), float32, float16 or bfloat16.")
    ] = LOAD.kv_cache_dtype,
    block_size: Annotated[int, typer.Option(help="Tokens in a block of the KV cache.")] = ENGINE.block_size,
    max_num_seqs: Annotated[int, typer.Option(help="Sequences that the engine is ready for.")] = ENGINE.max_num_seqs,
    max_num_batched_tokens: Annotated[
        int, typer.Option(help="Tokens that one step computes at most.")
    ] = ENGINE.max_num_batched_tokens,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, sizes in bytes.")] = False,
) -> None:
    """Plan a model's memory: does it fit, how many sequences at once, how long a context?

    Reads config.json and the headers of the weights, and loads nothing. Exits with 3 when it does not fit.
    """
    options = EngineOptions(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        block_size=block_size,
        gpu_memory_utilization=gpu_memory_utilization,
    )
    load = Load(batch_size, max_model_len, kv_cache_dtype)
    scheme = _scheme(bits, group_size, symmetric)
    memory = first_gpu_memory() if gpu_memory is None else parse_bytes(gpu_memory)
    folder = resolve(model, revision)
    config = read_config(folder)
    weights = stored_weights(folder, config) if scheme is None else planned_weights(config, scheme)
    result = plan(config, weights, load, options, memory)
    if as_json:
        print_json(SCHEMA, {"model": model, **report.as_json(result)})
    else:
        _print(result)
    if result.fits is False:
        raise typer.Exit(CHECK_FAILED)


def _scheme(bits: int | None, group_size: int | None, symmetric: bool | None) -> Scheme | None:
    """The scheme to plan, what is not named being the default; None when nothing is named."""
    if (bits, group_size, symmetric) == (None, None, None):
        return None
    return Scheme(
        SCHEME.bits if bits is None else bits,
        SCHEME.group_size if group_size is None else group_size,
        SCHEME.symmetric if symmetric is None else symmetric,
    )


def _print(result: MemoryPlan) -> None:
    out.print(report.verdict(result))
    out.print()
    grid = table("", "memory")
    grid.add_column("")
    for row in report.memory_rows(result):
        grid.add_row(*row)
    out.print(grid)
    out.print()
    for question, answer in report.limit_rows(result):
        out.print(f"{question}: {answer}")
    for change in changes_that_fit(result):
        print(f"hint: {change.flag} makes it fit, with {format_bytes(change.total)}", file=sys.stderr)
