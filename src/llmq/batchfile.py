"""Prompts from a file, completions to a file: what ``llmq generate -i … -o …`` reads and writes.

An input line is a JSON object with ``prompt`` or ``messages``, perhaps a ``priority``, and whatever else the user keeps
there; of a .txt file, the prompt itself; or a request of OpenAI's batch files. An output line is a JSON object: the
fields of its input line, and

    index              of the input line among the prompts, from 0
    sample             of n, where n > 1
    text, token_ids, finish_reason, prompt_tokens, completion_tokens
    logprobs           one object a token: logprob, top: [[token id, logprob], …]; where asked for
    prompt_logprobs    the same of the prompt's tokens from the second on; where asked for
    score              of a beam, or of best_of
    error              where the prompt was refused; finish_reason is then "error"

An OpenAI request says itself how to sample, and has an answer of OpenAI's form: see ``serve.batch``.

Lines are appended as prompts finish, each whole, so that a run that was killed goes on from there; when all are done
the file is put in the order of the prompts.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, TextIO

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from llmq.checkpoint.tokenizer import Tokenizer
from llmq.engine.request import SamplingParams
from llmq.errors import LlmqError
from llmq.llm import Completion, Prompt, RequestOutput
from llmq.serve import batch
from llmq.serve.errors import ApiError
from llmq.texts import checked

STDIO = "-"
_PROMPT_KEYS = ("prompt", "messages")
_LINE_HINT = (
    'a line is a JSON object with "prompt": a text, or "messages": [{"role": …, "content": …}], '
    'or a request of OpenAI: "custom_id", "url", "body"'
)


class _Message(BaseModel):
    model_config = ConfigDict(extra="allow")

    role: str
    content: str


class _Line(BaseModel):
    model_config = ConfigDict(extra="allow")

    prompt: str | None = Field(None, min_length=1)
    messages: list[_Message] | None = Field(None, min_length=1)
    priority: int = 0

    @model_validator(mode="after")
    def _one_of_two(self) -> _Line:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("a line holds either a prompt or messages")
        return self


@dataclass(frozen=True, slots=True)
class Job:
    """One prompt of the input. ``fields`` is its line, to be repeated in the output; ``body`` of an OpenAI request."""

    index: int
    prompt: Prompt
    fields: Mapping[str, Any] = field(default_factory=dict)
    body: batch.Body | None = None

    @property
    def custom_id(self) -> str | None:
        """Of an OpenAI request, its name."""
        return None if self.body is None else str(self.fields["custom_id"])

    def params(self, common: SamplingParams) -> SamplingParams:
        """``common``, with the line's own priority; of an OpenAI request, its own."""
        if self.body is not None:
            return self.body.params()
        return replace(common, priority=int(self.fields["priority"])) if "priority" in self.fields else common


def read_jobs(path: str, *, chat: bool) -> list[Job]:
    """The prompts in ``path``: .jsonl, .txt with one a line, or ``-`` for either on stdin.

    ``chat``: a plain prompt is what a user says to the model. Raises LlmqError, with the number of the line, at the
    first one that cannot be used.
    """
    text = _read_text(path)
    is_json = path.endswith((".jsonl", ".json")) or (path == STDIO and text.lstrip().startswith("{"))
    jobs: list[Job] = []
    for number, line in enumerate(text.split("\n"), 1):  # JSON may hold what splitlines takes for an end: U+2028
        if line.strip():
            jobs.append(_read_job(line, len(jobs), f"{path}, line {number}", is_json=is_json, chat=chat))
    if not jobs:
        raise LlmqError(f"{path} holds no prompts", 'write one a line, or {"prompt": "…"} a line in a .jsonl file')
    repeated = [
        name for name, count in Counter(job.custom_id for job in jobs).items() if name is not None and count > 1
    ]
    if repeated:
        raise LlmqError(f"{path} has several requests with custom_id {repeated[0]!r}", "give each one of its own")
    return jobs


def to_prompt(fields: Mapping[str, Any], *, chat: bool) -> Prompt:
    """What the model is given of an input line: its messages, or its prompt, which ``chat`` makes a message."""
    if "messages" in fields:
        return list(fields["messages"])
    return [{"role": "user", "content": fields["prompt"]}] if chat else str(fields["prompt"])


def output_lines(job: Job, output: RequestOutput, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """The lines of the output file for one prompt: one for each completion, or one that says why there is none; one
    for an OpenAI request."""
    if job.body is not None:
        return [batch.answer_line(job.fields["custom_id"], job.body, output, tokenizer)]
    start = {**job.fields, "index": job.index}
    prompt_tokens = len(output.prompt_token_ids)
    if output.error is not None:
        nothing = {"text": "", "token_ids": [], "finish_reason": "error", "prompt_tokens": prompt_tokens}
        return [{**start, **nothing, "completion_tokens": 0, "error": output.error.message}]
    numbered = len(output.completions) > 1
    return [
        {**start, **({"sample": completion.index} if numbered else {}), **_answer(completion, output)}
        for completion in output.completions
    ]


class OutputFile:
    """The file that completions go to while a run lasts. Use ``open_output``.

    What is there stays until the first completion comes: a run that fails before costs nothing.
    """

    def __init__(self, path: Path, done: dict[int, list[dict[str, Any]]]) -> None:
        self.done = done
        self._path = path
        self._is_new = not path.exists()
        self._stream: TextIO | None = None
        # Whether both the file and one beside it can be written is found before any work.
        path.open("a").close()
        TemporaryFile(dir=path.parent).close()

    def write(self, job: Job, output: RequestOutput, tokenizer: Tokenizer) -> None:
        if self._stream is None:
            # What was cut short, and what failed and is tried again, goes first.
            _write_whole(self._path, self.done)
            self._stream = self._path.open("a", encoding="utf-8")
        lines = output_lines(job, output, tokenizer)
        # One write for all lines of a prompt, and flushed: a kill leaves at most one line cut short, the last.
        self._stream.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        self._stream.flush()
        self.done[job.index] = lines

    def close(self, *, complete: bool) -> None:
        if self._stream is not None:
            self._stream.close()
        elif not complete and not self._is_new:
            return
        if all(_failed(line) for lines in self.done.values() for line in lines):
            self._path.unlink()  # nothing was answered: nothing is left behind
        elif complete:
            _write_whole(self._path, self.done)


@contextmanager
def open_output(
    path: Path, jobs: Sequence[Job], *, samples: int, resume: bool, overwrite: bool
) -> Iterator[OutputFile]:
    """The output file, for the length of a run. ``OutputFile.done`` says which prompts it holds already.

    Raises LlmqError when the file exists and neither ``resume`` nor ``overwrite`` says what to do with it, when it was
    made from other prompts, or when it cannot be written.
    """
    if path.exists() and not path.is_file():
        raise LlmqError(f"{path} is no file, and would be replaced by one", "choose another --output; - is stdout")
    done: dict[int, list[dict[str, Any]]] = {}
    if path.exists() and not overwrite:
        if not resume:
            raise LlmqError(f"{path} exists already", "pass --resume to go on with it, or --overwrite")
        done = _read_done(path, jobs, samples)
    try:
        file = OutputFile(path.resolve(), done)  # a link stays, and its file is written
    except OSError as error:
        raise LlmqError(f"{path} cannot be written: {error.strerror}", "choose another --output") from None
    complete = False
    try:
        yield file
        complete = True
    except OSError as error:
        raise LlmqError(f"{path} cannot be written: {error.strerror}", "free some space, then pass --resume") from error
    finally:
        file.close(complete=complete)


def _read_text(path: str) -> str:
    try:
        return sys.stdin.read().removeprefix("\ufeff") if path == STDIO else Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise LlmqError(f"{path} cannot be read: {error.strerror}", "check --input") from None
    except UnicodeDecodeError as error:
        raise LlmqError(f"{path} is not UTF-8 text: byte {error.start} is not", "save it as UTF-8") from None


def _read_job(line: str, index: int, where: str, *, is_json: bool, chat: bool) -> Job:
    """LlmqError, which names ``where``, when the line cannot be used."""
    fields: Any = {"prompt": line}
    try:
        if is_json:
            fields = json.loads(line)
        checked(json.dumps(fields, ensure_ascii=False), where, _LINE_HINT)  # as it will be written
        if batch.is_request(fields):
            prompt, body = batch.read_request(fields)
            return Job(index, prompt, fields, body)
        _Line.model_validate(fields)
    except json.JSONDecodeError as error:
        raise LlmqError(f"{where} is not JSON: {error.msg} at column {error.colno}", _LINE_HINT) from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise LlmqError(f"{where}: {place + ': ' if place else ''}{first['msg']}", _LINE_HINT) from None
    except ApiError as error:
        raise LlmqError(f"{where}: {error.message}", "a body is what llmq serve takes at that url") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets in brackets in …
        raise LlmqError(f"{where} is JSON that cannot be read: {str(error).split(':')[0]}", _LINE_HINT) from None
    return Job(index, to_prompt(fields, chat=chat), fields)


def _failed(line: Mapping[str, Any]) -> bool:
    # Not by "error": that may be a field of the input line.
    return batch.failed(line) if batch.is_answer(line) else line["finish_reason"] == "error"


def _answer(completion: Completion, output: RequestOutput) -> dict[str, Any]:
    answer: dict[str, Any] = {
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "prompt_tokens": len(output.prompt_token_ids),
        "completion_tokens": len(completion.token_ids),
    }
    if completion.score is not None:
        answer["score"] = completion.score
    for name, logprobs in (("logprobs", completion.logprobs), ("prompt_logprobs", output.prompt_logprobs)):
        if logprobs:
            answer[name] = [{"logprob": token.logprob, "top": token.top} for token in logprobs]
    return answer


def _read_done(path: Path, jobs: Sequence[Job], samples: int) -> dict[int, list[dict[str, Any]]]:
    """The prompts that ``path`` answers in full. A last line that was cut short, and errors, do not count.

    LlmqError where it holds anything else, which would be lost.
    """
    found: dict[int, list[dict[str, Any]]] = {}
    by_custom_id = {job.custom_id: job.index for job in jobs}
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip() or (number == len(lines) and _is_cut_short(line)):
            continue
        try:
            fields = json.loads(line)
            is_openai = batch.is_answer(fields)
            index = by_custom_id.get(fields["custom_id"], -1) if is_openai else fields["index"]
            failed = _failed(fields)
        except (ValueError, KeyError, TypeError):
            raise LlmqError(
                f"{path}, line {number} is no answer of llmq generate", "choose another --output, or pass --overwrite"
            ) from None
        job = jobs[index] if index in range(len(jobs)) else None
        if job is None or not (is_openai or all(fields.get(key) == job.fields.get(key) for key in _PROMPT_KEYS)):
            raise LlmqError(f"{path} holds answers to other prompts", "choose another --output, or pass --overwrite")
        if not failed:
            found.setdefault(index, []).append(fields)
    lines_each = {job.index: samples if job.body is None else 1 for job in jobs}
    return {index: lines for index, lines in found.items() if len(lines) == lines_each[index]}


def _is_cut_short(line: str) -> bool:
    """Whether ``line`` is the beginning of a JSON object, and no more."""
    try:
        json.loads(line)
    except ValueError:
        return line.startswith("{")
    return False


def _write_whole(path: Path, lines_by_index: Mapping[int, list[dict[str, Any]]]) -> None:
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with partial.open("w", encoding="utf-8") as stream:
            for index in sorted(lines_by_index):
                stream.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines_by_index[index])
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
