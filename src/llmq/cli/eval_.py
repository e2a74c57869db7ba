"""``llmq eval``"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmq.cli import options
from llmq.cli.console import out, print_json, progress, table
from llmq.errors import CHECK_FAILED, USAGE, LlmqError
from llmq.evals.perplexity import DEFINITION, WINDOW, Perplexity, evaluate_perplexity

if TYPE_CHECKING:
    from llmq.evals.divergence import Comparison, Figure


def evaluate(
    model: options.Model,
    reference: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="The model it was made from, to compare with.", show_default=False),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="A text, a .jsonl file, or a dataset OWNER/NAME[:CONFIG].",
            show_default="the demo's text",
        ),
    ] = None,
    window: Annotated[int, typer.Option(help="Tokens scored together, at most the model's context.")] = WINDOW,
    max_ppl_increase: Annotated[
        str | None,
        typer.Option(metavar="SHARE", help="Exit with 3 if perplexity rises by more, e.g. 1%.", show_default=False),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="Run these tasks of lm-eval instead, comma-separated.", show_default=False),
    ] = None,
    task_folder: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where tasks of your own are.", show_default=False)
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Examples of each task.", show_default="all")] = None,
    dtype: options.DType = "auto",
    device: options.Device = "auto",
    revision: options.Revision = None,
    json: options.Json = False,
) -> None:
    """Perplexity of a model on a text, in windows that do not overlap; and how far its predictions are from those of
    the model that it was made from.

    llmq eval demo

    llmq eval demo-w4 --reference demo --max-ppl-increase 10%

    llmq eval demo --tasks arc_easy --limit 100
    """
    allowed = None if max_ppl_increase is None else _share(max_ppl_increase)
    if allowed is not None and reference is None:
        raise LlmqError("--max-ppl-increase has nothing to compare with", "pass --reference MODEL", exit_code=USAGE)
    if tasks is None and (task_folder is not None or limit is not None):
        raise LlmqError("--task-folder and --limit are of tasks", "name some: --tasks NAMES", exit_code=USAGE)
    if limit is not None and limit < 1:
        raise LlmqError(f"--limit {limit} leaves no examples", "make it 1 or more", exit_code=USAGE)
    if tasks is not None:
        if reference is not None or data is not None:
            raise LlmqError("tasks bring their own texts", "leave out --reference and --data", exit_code=USAGE)
        _run_tasks(model, tasks.split(","), task_folder, limit, dtype, device, revision, json=json)
        return
    compared = None
    with progress("windows") as told:
        if reference is None:
            result = evaluate_perplexity(
                model, data=data, window=window, dtype=dtype, device=device, revision=revision, progress=told
            )
        else:
            from llmq.evals.divergence import compare_with

            result, compared = compare_with(
                model, reference, data=data, window=window, dtype=dtype, device=device, revision=revision, progress=told
            )
    if json:
        beside = {} if compared is None else {"reference": compared.as_json()}
        print_json("llmq.eval/1", result.as_json() | beside)
    else:
        _print(result, compared)
    if compared is not None and allowed is not None and compared.increase.value > allowed:
        raise LlmqError(
            f"perplexity is {compared.increase.value:.2%} above {reference}'s, and --max-ppl-increase allows "
            f"{allowed:.2%}",
            "quantize with more bits, or by a method that learns from data: llmq quantize --help",
            exit_code=CHECK_FAILED,
        )


def _share(text: str) -> float:
    """``1%`` → 0.01"""
    try:
        share = float(text.removesuffix("%")) / 100
    except ValueError:
        share = -1.0
    if not (text.endswith("%") and share >= 0):
        raise LlmqError(f"{text!r} is not a share", "write it like --max-ppl-increase 1%", exit_code=USAGE)
    return share


def _print(result: Perplexity, compared: Comparison | None) -> None:
    out.print(f"perplexity {result.perplexity:.4f}")
    out.print()
    grid = table("", "")
    grid.columns[1].justify = "left"
    grid.add_row("95 % interval", f"{result.interval[0]:.4f} to {result.interval[1]:.4f}, by bootstrap over windows")
    grid.add_row("definition", DEFINITION)
    grid.add_row("text", result.data)
    grid.add_row("scored", f"{result.tokens:,} tokens in {result.windows:,} windows of {result.window:,}")
    grid.add_row("time", f"{result.seconds:.1f} s on {result.device} in {result.dtype}")
    out.print(grid)
    if compared is None:
        return
    out.print()
    figures = table(f"against {compared.reference.model}", "", "95 % interval")
    figures.add_row("perplexity there", f"{compared.reference.perplexity:.4f}", "")
    rows: list[tuple[str, Figure, str]] = [
        ("increase", compared.increase, "+.2%"),
        ("KL, mean, nats", compared.kl, ".5f"),
        ("KL, 99th percentile of tokens", compared.kl_p99, ".4f"),
        ("same likeliest token", compared.agreement, ".2%"),
    ]
    for name, figure, form in rows:
        low, high = (format(bound, form) for bound in figure.interval)
        figures.add_row(name, format(figure.value, form), f"{low} to {high}")
    out.print(figures)


def _run_tasks(
    model: str,
    tasks: list[str],
    folder: Path | None,
    limit: int | None,
    dtype: str,
    device: str,
    revision: str | None,
    *,
    json: bool,
) -> None:
    from llmq.evals.lm_eval import evaluate_tasks

    results = evaluate_tasks(model, tasks, folder=folder, limit=limit, dtype=dtype, device=device, revision=revision)
    if json:
        print_json("llmq.eval.tasks/1", {"model": model, "tasks": [result.as_json() for result in results]})
        return
    grid = table("task", "metric", "value", "± standard error", "examples")
    for result in results:
        for metric, (value, error) in result.metrics.items():
            grid.add_row(
                result.task, metric, f"{value:.4f}", "" if error is None else f"{error:.4f}", f"{result.examples:,}"
            )
    out.print(grid)
