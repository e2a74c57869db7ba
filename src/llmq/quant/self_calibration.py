"""Calibration text that the model writes itself: what it has learnt to expect, with no data at hand.

A base model begins at the beginning-of-sequence token and is sampled as it is (Williams et al., "Self-calibration for
Language Model Quantization and Pruning", 2025, arXiv 2410.17170; Liu et al., "LLM-QAT", 2023, arXiv 2305.17888, begin
at a random token). A model with a chat template also plays the user: it continues the template where the user's words
would stand, and then answers itself (Xu et al., "Magpie", 2024, arXiv 2406.08464).

    CACHE/calibration/FINGERPRINT.json     the tokens, written once for the same model, seed and number of tokens
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from math import ceil, prod
from pathlib import Path

import torch

from llmq import memory
from llmq.checkpoint.config import ModelConfig, read_config
from llmq.checkpoint.tensors import Tensors
from llmq.checkpoint.tokenizer import encode_chat
from llmq.engine.options import EngineOptions
from llmq.engine.request import SamplingParams
from llmq.errors import CHECK_FAILED, LlmqError
from llmq.llm import LLM, Completion, RequestOutput
from llmq.quant.backends.environment import cache_folder
from llmq.quant.options import Calibration
from llmq.runtime.device import available_bytes, resolve_dtype

MAX_DOCUMENT = 512
"""Tokens of one document, several of which make a window: longer ones take longer, and calibrate no better."""
MAX_QUESTION = 128
MIN_DOCUMENT = 16
"""Tokens of an answer, however soon the model would end it: every round brings something."""
SEATS = 256
"""Documents that are written at once."""
VERSION = 1
"""Of what is written for the same model, seed and number of tokens."""
LARGE = 10**9
"""Parameters from which on a CPU is too slow not to be warned of."""
INSTEAD = "--calib-data FILE takes a text of yours, --calib-data demo the Python sources shipped with llmq"
MARK = "\N{SNOWMAN}"
"""What no chat template writes by itself."""

OnStage = Callable[[str], None]
"""Called with what is going on, whenever another twentieth is written."""


def self_text(folder: Path, config: ModelConfig, calibration: Calibration, device: str, on_stage: OnStage) -> list[int]:
    """Token ids, as many as the windows take or a few more, the beginning-of-sequence token first where the tokenizer
    puts one there.

    What is in the cache is not written again. Raises LlmqError when the model does not fit on ``device``, and OSError
    when the cache cannot be written.
    """
    wanted, seed = num_tokens(config, calibration), calibration.seed
    path = _cached(folder, wanted, seed)
    if path.exists():
        ids: list[int] = json.loads(path.read_text(encoding="utf-8"))
        return ids
    _check_fits(folder, config, device)
    ids = _write(folder, config, wanted, seed, device, on_stage)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".partial-{os.getpid()}")
    unfinished.write_text(json.dumps(ids), encoding="utf-8")
    unfinished.rename(path)
    return ids


def expected_seconds(folder: Path, calibration: Calibration) -> float | None:
    """About how long ``self_text`` will take on this CPU, by the time that one product of a layer's size takes; None
    where the text is written already, and for a small model."""
    config, shapes = read_config(folder), [info.shape for info in Tensors(folder).infos.values()]
    matrices = sorted((prod(shape), shape) for shape in shapes if len(shape) == 2)
    parameters, wanted = sum(map(prod, shapes)), num_tokens(config, calibration)
    if parameters < LARGE or _cached(folder, wanted, calibration.seed).exists():
        return None
    size, (rows, columns) = matrices[len(matrices) // 2]
    inputs, weight = torch.ones(SEATS, columns), torch.ones(rows, columns)
    started = time.perf_counter()
    torch.mm(inputs, weight.T)
    return (time.perf_counter() - started) / size * parameters * wanted / SEATS


def num_tokens(config: ModelConfig, calibration: Calibration) -> int:
    """Of all windows."""
    return calibration.samples * min(calibration.seqlen, config.context_length)


def _cached(folder: Path, wanted: int, seed: int) -> Path:
    """Where the text is kept, by what it depends on. Of the weights that is the names, sizes and times of the files:
    reading them takes as long as writing the text."""
    digest = hashlib.sha256(f"{VERSION} {wanted} {seed}".encode())
    for path in sorted(folder.iterdir()):
        if path.suffix == ".safetensors":
            digest.update(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}".encode())
        elif path.name in ("config.json", "generation_config.json") or "token" in path.name or "template" in path.name:
            digest.update(path.read_bytes())
    return cache_folder() / "calibration" / f"{digest.hexdigest()[:32]}.json"


def _check_fits(folder: Path, config: ModelConfig, device: str) -> None:
    dtype = resolve_dtype("auto", config, device)
    numbers = sum(prod(info.shape) for info in Tensors(folder).infos.values())
    needed = numbers * dtype.itemsize
    free = available_bytes(device)
    if needed > free:
        raise LlmqError(
            f"to write its own calibration text the model takes {memory.format_bytes(needed)}, and {device} has "
            f"{memory.format_bytes(free)} free",
            INSTEAD,
            exit_code=CHECK_FAILED,
        )


def _write(folder: Path, config: ModelConfig, wanted: int, seed: int, device: str, on_stage: OnStage) -> list[int]:
    context = min(config.context_length, 2 * MAX_DOCUMENT)
    llm = LLM(str(folder), device=device, options=EngineOptions(max_num_seqs=SEATS, max_model_len=context))
    try:
        start, opening = _start(llm), _opening(llm)
        ids = [token for token in start if token == llm.tokenizer.bos_token_id]
        documents, told = 0, _Told(on_stage, wanted)
        while len(ids) < wanted:
            mean = len(ids) / documents if documents else MAX_DOCUMENT
            first = (seed << 32) + documents
            seeds = range(first, first + ceil((wanted - len(ids)) / mean))
            tell = partial(told, len(ids))
            for document in _conversations(llm, opening, seeds, tell) if opening else _texts(llm, start, seeds, tell):
                ids += document
            documents += len(seeds)
        told(wanted, 0)
        return ids
    finally:
        del llm
        gc.collect()
        if device != "cpu":
            torch.cuda.empty_cache()


class _Told:
    """Whom to tell how many tokens there are: those of earlier rounds, and of this one."""

    def __init__(self, on_stage: OnStage, wanted: int) -> None:
        self._on_stage, self._wanted, self._twentieths = on_stage, wanted, -1

    def __call__(self, before: int, tokens: int) -> None:
        done = min(20 * (before + tokens) // self._wanted, 20)
        if done > self._twentieths:
            self._twentieths = done
            self._on_stage(f"writing calibration text: {5 * done} %")


def _start(llm: LLM) -> list[int]:
    """What a text begins with: the token that says so, or the one that ended the text before; failing both, a line."""
    tokenizer = llm.tokenizer
    first = tokenizer.encode("")[:1] or list(llm.config.eos_token_ids[:1])
    return first or tokenizer.encode("\n")


def _texts(llm: LLM, start: list[int], seeds: Sequence[int], tell: Callable[[int], None]) -> list[list[int]]:
    """A text for each seed, without its start."""
    return [answer.token_ids for answer in _complete(llm, [start] * len(seeds), MAX_DOCUMENT, seeds, tell)]


def _opening(llm: LLM) -> list[int]:
    """What the chat template writes ahead of the user's words. Nothing where there is no template, where it will not
    have such a conversation, or where the context has no room for one."""
    tokenizer = llm.tokenizer
    if not tokenizer.chat_template:
        return []
    try:
        text = tokenizer.apply_chat_template([{"role": "user", "content": MARK}], tokenize=False)
    except Exception:  # templates are programs, and raise what they like
        return []
    before, mark, _ = text.partition(MARK)
    opening = tokenizer.encode(before, add_special_tokens=False) if mark else []
    return opening if 2 * (len(opening) + MAX_QUESTION) <= llm.max_model_len else []


def _conversations(llm: LLM, opening: list[int], seeds: Sequence[int], tell: Callable[[int], None]) -> list[list[int]]:
    """A question and its answer for each seed, in the chat template, without the beginning-of-sequence token."""
    tokenizer = llm.tokenizer
    questions = _complete(llm, [opening] * len(seeds), MAX_QUESTION, seeds, lambda tokens: None)
    messages = ([{"role": "user", "content": question.text.strip()}] for question in questions)
    prompts = [encode_chat(tokenizer, conversation) for conversation in messages]
    answers = _complete(llm, prompts, MAX_DOCUMENT, seeds, tell)
    documents = [prompt + answer.token_ids for prompt, answer in zip(prompts, answers, strict=True)]
    return [document[document[:1] == [tokenizer.bos_token_id] :] for document in documents]


def _complete(
    llm: LLM, prompts: Sequence[list[int]], max_tokens: int, seeds: Sequence[int], tell: Callable[[int], None]
) -> list[Completion]:
    """A completion of each prompt, drawn at temperature 1. ``tell`` is called with the tokens that there are so far."""
    completions: dict[int, Completion] = {}
    tokens = 0
    for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        most = max(1, min(max_tokens, llm.max_model_len - len(prompt)))
        llm.submit(index, prompt, SamplingParams(max_tokens=most, min_tokens=min(MIN_DOCUMENT, most), seed=seed))
    while not llm.idle:
        for event in llm.step():
            if isinstance(event, RequestOutput):
                completions[event.index] = event.completions[0]
            else:
                tokens += 1
        tell(tokens)
    return [completions[index] for index in range(len(prompts))]
