"""``llmq memplan``"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from llmq.cli import options
from llmq.cli.console import out, print_json, table
from llmq.engine.options import EngineOptions
from llmq.errors import CHECK_FAILED
from llmq.memory import format_bytes, parse_bytes
from llmq.memplan import report
from llmq.memplan.gpu import first_gpu_memory
from llmq.memplan.plan import Load, changes_that_fit, plan_folder
from llmq.scheme import Scheme

_ENGINE = EngineOptions()
_LOAD = Load()
_SCHEME = Scheme()


def memplan(
    model: options.Model,
    gpu_memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Memory of the GPU, e.g. 24GiB. [default: the one here]", show_default=False),
    ] = None,
    max_model_len: Annotated[
        int | None, typer.Option(help="Tokens of a sequence, prompt and completion. [default: the model's context]")
    ] = _LOAD.max_model_len,
    batch_size: Annotated[
        int, typer.Option("--batch-size", "--concurrency", help="Sequences in the cache at once.")
    ] = _LOAD.batch_size,
    bits: Annotated[int | None, typer.Option(help="Plan weights of 4 or 8 bits. [default: as the folder is]")] = None,
    group_size: Annotated[int | None, typer.Option(help="Weights that share a scale; -1: a whole row.")] = None,
    symmetric: Annotated[bool | None, typer.Option("--sym/--asym", help="Zero point in the middle, or fitted.")] = None,
    kv_cache_dtype: Annotated[
        str, typer.Option(help="auto (the model's), float32, float16 or bfloat16.")
    ] = _LOAD.kv_cache_dtype,
    max_num_seqs: options.MaxNumSeqs = _ENGINE.max_num_seqs,
    max_num_batched_tokens: options.MaxNumBatchedTokens = _ENGINE.max_num_batched_tokens,
    block_size: options.BlockSize = _ENGINE.block_size,
    gpu_memory_utilization: options.GpuMemoryUtilization = _ENGINE.gpu_memory_utilization,
    revision: options.Revision = None,
    json: options.Json = False,
) -> None:
    """Plan a model's memory on a GPU: does it fit, how many sequences at once, how long a context?

    Reads config.json and the headers of the weights, and loads nothing; config.json alone will do. Exits with 3 when
    it does not fit.

    llmq memplan demo --gpu-memory 24GiB --batch-size 16 --max-model-len 2048
    """
    engine = EngineOptions(
        max_num_seqs, max_num_batched_tokens, block_size, gpu_memory_utilization=gpu_memory_utilization
    )
    plan = plan_folder(
        model,
        revision=revision,
        load=Load(batch_size, max_model_len, kv_cache_dtype),
        scheme=_scheme(bits, group_size, symmetric),
        options=engine,
        gpu_memory=first_gpu_memory() if gpu_memory is None else parse_bytes(gpu_memory),
    )
    if json:
        print_json("llmq.memplan/1", {"model": model, **report.as_json(plan)})
    else:
        out.print(report.verdict(plan))
        out.print()
        grid = table("", "memory")
        grid.add_column("")
        for row in report.memory_rows(plan):
            grid.add_row(*row)
        out.print(grid)
        out.print()
        for question, answer in report.limit_rows(plan):
            out.print(f"{question}: {answer}")
    for change in changes_that_fit(plan):
        print(f"hint: {change.flag} makes it fit, with {format_bytes(change.total)}", file=sys.stderr)
    if plan.fits is False:
        raise typer.Exit(CHECK_FAILED)


def _scheme(bits: int | None, group_size: int | None, symmetric: bool | None) -> Scheme | None:
    """What is not named is the default; None when nothing is named."""
    if (bits, group_size, symmetric) == (None, None, None):
        return None
    return Scheme(
        _SCHEME.bits if bits is None else bits,
        _SCHEME.group_size if group_size is None else group_size,
        _SCHEME.symmetric if symmetric is None else symmetric,
    )
