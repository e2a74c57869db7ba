"""``llmq generate``"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from llmq.cli import options
from llmq.cli.console import err, print_json, progress
from llmq.engine.options import EngineOptions
from llmq.engine.request import EarlyStopping, SamplingParams, Truncation
from llmq.errors import USAGE, LlmqError

if TYPE_CHECKING:
    from llmq.batchfile import Job
    from llmq.llm import LLM, RequestOutput

_SAMPLING = SamplingParams()


@options.with_engine_flags
def generate(
    model: options.Model,
    prompt: Annotated[list[str] | None, typer.Option("-p", "--prompt", help="A prompt; may be repeated.")] = None,
    input: Annotated[
        str | None,
        typer.Option("-i", "--input", metavar="FILE", help="Prompts: .jsonl, .txt with one a line, or - for stdin."),
    ] = None,
    output: Annotated[
        str | None, typer.Option("-o", "--output", metavar="FILE", help="Completions as JSON lines; - for stdout.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="New tokens at most.")] = _SAMPLING.max_tokens,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token.")] = _SAMPLING.temperature,
    top_p: Annotated[float, typer.Option(help="Draw among the likeliest that reach this.")] = _SAMPLING.top_p,
    top_k: Annotated[int, typer.Option(help="Draw among the k likeliest; 0: all.")] = _SAMPLING.top_k,
    seed: Annotated[int | None, typer.Option(help="Same seed, same tokens.", show_default=False)] = _SAMPLING.seed,
    min_p: Annotated[float, typer.Option(help="Draw among what is this many times the likeliest.")] = _SAMPLING.min_p,
    repetition_penalty: Annotated[
        float, typer.Option(help="Divide the scores of tokens seen before; 1: leave them.")
    ] = _SAMPLING.repetition_penalty,
    presence_penalty: Annotated[
        float, typer.Option(help="Take this from the scores of tokens generated before.")
    ] = _SAMPLING.presence_penalty,
    frequency_penalty: Annotated[
        float, typer.Option(help="Take this from them for each time they were generated.")
    ] = _SAMPLING.frequency_penalty,
    min_tokens: Annotated[int, typer.Option(help="New tokens before any may end it.")] = _SAMPLING.min_tokens,
    stop: Annotated[list[str] | None, typer.Option(help="A text that ends a completion; may be repeated.")] = None,
    stop_token_id: Annotated[
        list[int] | None, typer.Option("--stop-token-id", help="A token that ends a completion; may be repeated.")
    ] = None,
    include_stop: Annotated[bool, typer.Option("--include-stop", help="Keep the stop text in the completion.")] = False,
    n: Annotated[int, typer.Option("--n", help="Completions of each prompt.")] = _SAMPLING.n,
    best_of: Annotated[
        int | None, typer.Option(help="Draw this many, keep the n likeliest.", show_default=False)
    ] = _SAMPLING.best_of,
    beam_width: Annotated[int, typer.Option(help="Search with this many beams; 0: draw.")] = _SAMPLING.beam_width,
    length_penalty: Annotated[
        float, typer.Option(help="Beams score log-probability / length ^ this.")
    ] = _SAMPLING.length_penalty,
    early_stopping: Annotated[
        str, typer.Option(help="End a beam search with enough answers: true, false (unless a beam is better), never.")
    ] = _SAMPLING.early_stopping,
    logprobs: Annotated[
        int | None, typer.Option(metavar="K", help="Log-probabilities of the drawn and the K likeliest tokens.")
    ] = _SAMPLING.logprobs,
    prompt_logprobs: Annotated[
        int | None, typer.Option(metavar="K", help="The same of the prompt's tokens.")
    ] = _SAMPLING.prompt_logprobs,
    truncate: Annotated[
        str, typer.Option(help="A prompt longer than the context: error, or drop tokens on its left or right.")
    ] = _SAMPLING.truncate,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on past the end-of-text token.")] = False,
    chat: Annotated[bool, typer.Option("--chat", help="Put prompts through the model's chat template.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Skip what the output file already holds.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output file.")] = False,
    stream: Annotated[
        bool, typer.Option("--stream/--no-stream", help="Print a lone prompt's text as it comes.")
    ] = True,
    *,
    engine: EngineOptions,
    dtype: options.DType = "auto",
    device: options.Device = "auto",
    revision: options.Revision = None,
    json: options.Json = False,
) -> None:
    """Complete prompts with the built-in engine: paged KV cache, continuous batching.

    llmq generate demo -p "def " --max-tokens 64

    llmq generate demo -i prompts.jsonl -o completions.jsonl --resume
    """
    if bool(prompt) == (input is not None):
        raise LlmqError("give prompts either by --prompt or by --input", 'try: -p "def "', exit_code=USAGE)
    if resume and output in (None, "-"):
        raise LlmqError("--resume goes on with an output file", "name it: -o completions.jsonl", exit_code=USAGE)
    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop=tuple(stop or ()),
        n=n,
        logprobs=logprobs,
        ignore_eos=ignore_eos,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        stop_token_ids=tuple(stop_token_id or ()),
        include_stop=include_stop,
        min_tokens=min_tokens,
        prompt_logprobs=prompt_logprobs,
        best_of=best_of,
        beam_width=beam_width,
        length_penalty=length_penalty,
        early_stopping=cast(EarlyStopping, early_stopping),
        truncate=cast(Truncation, truncate),
    )

    from llmq.batchfile import STDIO, Job, open_output, read_jobs, to_prompt
    from llmq.llm import LLM

    if input is not None:
        jobs = read_jobs(input, chat=chat)
        output = output or (None if json else STDIO)
    else:
        lines = [{"prompt": text} for text in prompt or []]
        jobs = [Job(index, to_prompt(line, chat=chat), line) for index, line in enumerate(lines)]

    def load() -> LLM:
        llm = LLM(model, revision=revision, dtype=dtype, device=device, options=engine)
        if err.is_terminal:
            _print_plan(llm)
        return llm

    started = time.perf_counter()
    if output not in (None, STDIO):
        with open_output(Path(output), jobs, samples=n, resume=resume, overwrite=overwrite) as file:
            todo = [job for job in jobs if job.index not in file.done]
            if len(todo) < len(jobs):
                err.print(f"{len(jobs) - len(todo)} of {len(jobs)} prompts are answered already")
            llm = load()
            started = time.perf_counter()
            results = []
            for job, result in _as_completed(llm, todo, params):
                file.write(job, result, llm.tokenizer)
                results.append(result)
        if json:
            print_json("llmq.generate/1", {"outputs": [one for _, lines in sorted(file.done.items()) for one in lines]})
    else:
        llm = load()
        started = time.perf_counter()
        results = _print_results(llm, jobs, params, lines=output == STDIO and not json, json=json, stream=stream)
    if any(result.completions for result in results):
        _summarize(llm, results, time.perf_counter() - started)
    _raise_if_failed(results)


def _print_plan(llm: LLM) -> None:
    from llmq.memplan import report
    from llmq.memplan.plan import Load, plan
    from llmq.memplan.source import open_model

    load = Load(max_model_len=llm.max_model_len, kv_cache_dtype=llm.kv_dtype)
    planned = plan(open_model(str(llm.folder)), load=load, options=llm.options)
    err.print(
        report.start_line(planned, llm.kv_cache_bytes, widened_to=llm.dtype.itemsize if llm.device == "cpu" else None),
        style="dim",
    )


def _as_completed(llm: LLM, jobs: Sequence[Job], params: SamplingParams) -> Iterable[tuple[Job, RequestOutput]]:
    with progress("prompts") as bar:
        results = llm.as_completed([job.prompt for job in jobs], [job.params(params) for job in jobs])
        for done, result in enumerate(results, 1):
            bar(done, len(jobs))
            job = jobs[result.index]
            yield job, replace(result, index=job.index)  # with --resume, jobs are some of the prompts


def _print_results(
    llm: LLM, jobs: Sequence[Job], params: SamplingParams, *, lines: bool, json: bool, stream: bool
) -> list[RequestOutput]:
    """Print on stdout: JSON lines as prompts finish, one JSON object, a stream of text, or texts in order."""
    from json import dumps

    from llmq.batchfile import output_lines
    from llmq.llm import TextDelta

    prompts = [job.prompt for job in jobs]
    results: list[RequestOutput] = []
    if lines:
        for job, result in _as_completed(llm, jobs, params):
            print(
                "\n".join(dumps(line, ensure_ascii=False) for line in output_lines(job, result, llm.tokenizer)),
                flush=True,
            )
            results.append(result)
    elif stream and not json and len(jobs) == 1 and params.width == 1:
        for event in llm.stream(prompts, params):
            if isinstance(event, TextDelta):
                sys.stdout.write(event.text)
                sys.stdout.flush()
            else:
                results.append(event)
        if not any(result.error for result in results):
            print()
    else:
        results = llm.generate(prompts, params)
        everything: list[dict[str, Any]] = [
            line for job, result in zip(jobs, results, strict=True) for line in output_lines(job, result, llm.tokenizer)
        ]
        if json:
            print_json("llmq.generate/1", {"outputs": everything})
        else:
            for line in everything:
                if len(everything) > 1:
                    sample = f" · {line['sample']}" if "sample" in line else ""
                    err.rule(f"{line['index']}{sample}", align="left")
                if "error" not in line:
                    print(line["text"])
    return results


def _summarize(llm: LLM, results: Sequence[RequestOutput], seconds: float) -> None:
    new = sum(len(completion.token_ids) for result in results for completion in result.completions)
    read = sum(len(result.prompt_token_ids) for result in results)
    stats = llm.stats
    err.print(
        f"{len(results)} prompts, {read} tokens in, {new} out in {seconds:.2f} s "
        f"({new / seconds:.0f} tokens/s on {llm.device}); KV cache {stats.peak_blocks} of {stats.total_blocks} blocks"
        + (f", {stats.preemptions} preemptions ({stats.swapped_out} swapped)" if stats.preemptions else "")
        + (f", {stats.prefix_hits} tokens found in the prefix cache" if stats.prefix_hits else ""),
        style="dim",
    )


def _raise_if_failed(results: Sequence[RequestOutput]) -> None:
    failed = [result for result in results if result.error is not None]
    if not failed:
        return
    first = min(failed, key=lambda result: result.index)
    error = first.error
    assert error is not None
    if len(results) == 1:
        raise error
    raise LlmqError(
        f"{len(failed)} of {len(results)} prompts failed; the first, {first.index}: {error.message}", error.hint
    )
