"""``llmq chat``"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from llmq.cli import options
from llmq.cli.console import err, print_error
from llmq.cli.serve import API_KEY
from llmq.engine.options import EngineOptions
from llmq.engine.request import SamplingParams
from llmq.errors import FAILED, USAGE, LlmqError

Answer = Callable[[Sequence[dict[str, str]]], Iterator[str | int]]
"""From the conversation so far, the pieces of what comes next, and at last the number of its tokens."""

_SAMPLING = SamplingParams()
_ENGINE = EngineOptions()
COMMANDS = "/reset forgets the conversation, /save FILE writes it down, /exit ends"


def chat(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="A model folder, a hub id, or 'demo'.", show_default=False)
    ] = None,
    url: Annotated[
        str | None, typer.Option(help="Talk to the server at this address instead.", show_default=False)
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar=API_KEY, help="For --url: the server's key.", show_default=False)
    ] = None,
    system: Annotated[str | None, typer.Option(help="What the model is told first.", show_default=False)] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Tokens of an answer at most.", show_default="what there is room for")
    ] = None,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token.")] = _SAMPLING.temperature,
    top_p: Annotated[float, typer.Option(help="Draw among the likeliest that reach this.")] = _SAMPLING.top_p,
    seed: Annotated[int | None, typer.Option(help="Same seed, same tokens.", show_default=False)] = _SAMPLING.seed,
    max_model_len: options.MaxModelLen = _ENGINE.max_model_len,
    dtype: options.DType = "auto",
    device: options.Device = "auto",
    revision: options.Revision = None,
) -> None:
    """Talk with a model, here or at a server: a line is a message, and an empty one nothing.

    llmq chat demo

    llmq chat --url http://127.0.0.1:8000
    """
    if (model is None) == (url is None):
        raise LlmqError("name either a model or the --url of a server", "try: llmq chat demo", exit_code=USAGE)
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    if url is not None:
        from llmq.serve.remote import RemoteModel

        remote = RemoteModel(url, api_key=api_key)
        name = remote.name

        def answer(messages: Sequence[dict[str, str]]) -> Iterator[str | int]:
            return remote.chat(messages, max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    else:
        from llmq.llm import LLM

        name = str(model)
        engine = EngineOptions(max_num_seqs=1, max_model_len=max_model_len)
        llm = LLM(name, revision=revision, dtype=dtype, device=device, options=engine)

        def answer(messages: Sequence[dict[str, str]]) -> Iterator[str | int]:
            return _answer_here(llm, messages, params)

    _converse(answer, name, [] if system is None else [{"role": "system", "content": system}])


def _answer_here(llm: Any, messages: Sequence[dict[str, str]], params: SamplingParams) -> Iterator[str | int]:
    from llmq.llm import TextDelta

    for event in llm.stream([messages], params):
        if isinstance(event, TextDelta):
            yield event.text
        elif event.error is not None:
            raise event.error
        else:
            yield len(event.completions[0].token_ids)


def _converse(answer: Answer, name: str, start: Sequence[dict[str, str]]) -> None:
    """Read messages from stdin and print answers on stdout until either ends. Ctrl-C ends an answer, or the chat.

    Exits with 1 where nobody is there to see that a message failed.
    """
    interactive = sys.stdin.isatty()
    if interactive:
        err.print(f"{name}: {COMMANDS}; Ctrl-C stops an answer", style="dim")
        with suppress(ImportError):
            import readline  # noqa: F401 (lines can be edited, and earlier ones come back)
    messages, failed = list(start), False
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except (EOFError, KeyboardInterrupt):
            if interactive:
                print()  # behind the prompt
            break
        except UnicodeDecodeError:
            raise LlmqError("what stdin brings is not UTF-8 text", "write it in UTF-8") from None
        command, _, argument = line.partition(" ")
        if command == "/exit":
            break
        if command == "/reset":
            messages = list(start)
        elif command == "/save":
            _save(argument.strip(), messages)
        elif command.startswith("/"):
            print_error(LlmqError(f"there is no {command}", COMMANDS))
        elif line:
            asked = [*messages, {"role": "user", "content": line}]
            messages = _turn(answer, asked)
            failed |= len(messages) < len(asked)
    if failed and not interactive:
        raise typer.Exit(FAILED)


def _turn(answer: Answer, messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """Print the answer to the last message; returns the conversation with both, or without, where it failed."""
    started, text, tokens = time.perf_counter(), "", 0
    try:
        for piece in answer(messages):
            if isinstance(piece, int):
                tokens = piece
            else:
                text += piece
                print(piece, end="", flush=True)
    except KeyboardInterrupt:
        print(" …", end="")
    except LlmqError as error:
        if text:
            print()
        print_error(LlmqError(error.message, "/reset begins anew"))
        return messages[:-1]
    print()
    seconds = time.perf_counter() - started
    if tokens:
        err.print(f"{tokens} tokens, {tokens / seconds:.1f} tokens/s", style="dim")
    return [*messages, {"role": "assistant", "content": text}]


def _save(path: str, messages: Sequence[dict[str, str]]) -> None:
    """As a line that ``llmq generate -i`` reads."""
    if not path:
        print_error(LlmqError("/save needs a file", "/save conversation.jsonl"))
        return
    try:
        Path(path).expanduser().write_text(json.dumps({"messages": messages}, ensure_ascii=False) + "\n", "utf-8")
        err.print(f"{len(messages)} messages in {path}", style="dim")
    except OSError as error:
        print_error(LlmqError(f"{path} cannot be written: {error.strerror}"))
