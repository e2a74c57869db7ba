"""LLM: a model folder, loaded, with the engine and the runtime joined. The Python API.

llm = LLM("demo")
for output in llm.generate(["def ", "class "], SamplingParams(max_tokens=32)):
    print(output.completions[0].text)
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llmq import memory
from llmq.checkpoint.config import read_config
from llmq.checkpoint.folder import resolve
from llmq.checkpoint.tokenizer import encode_chat, load_tokenizer
from llmq.engine import request
from llmq.engine.blocks import BlockManager
from llmq.engine.detokenizer import Detokenizer
from llmq.engine.options import EngineOptions
from llmq.engine.request import FinishReason, SamplingParams
from llmq.engine.scheduler import EngineStats, Scheduler
from llmq.errors import CHECK_FAILED, LlmqError
from llmq.plan import TokenLogprobs
from llmq.runtime.device import free_kv_cache_bytes, resolve_device, resolve_dtype
from llmq.runtime.kv_cache import KVCache
from llmq.runtime.loader import load_decoder, open_source
from llmq.runtime.runner import Runner

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
"""A text, token ids, or the messages of a conversation."""


@dataclass(slots=True)
class Completion:
    """One answer. ``token_times`` are ``time.perf_counter()`` seconds at which each token left its step."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    token_times: list[float] = field(default_factory=list)


@dataclass(slots=True)
class RequestOutput:
    """What became of one prompt. ``error`` says why it was refused; then there are no completions."""

    index: int
    prompt: Prompt
    prompt_token_ids: list[int]
    arrival_time: float
    completions: list[Completion] = field(default_factory=list)
    error: LlmqError | None = None

    @property
    def finished(self) -> bool:
        return all(completion.finish_reason is not None for completion in self.completions)


@dataclass(frozen=True, slots=True)
class TextDelta:
    """A piece of text that has just been settled. The last one of a completion says why it ended."""

    request_index: int
    completion_index: int
    text: str
    finish_reason: FinishReason | None


@dataclass(slots=True)
class _Live:
    """A sequence in the engine, and the answer it fills."""

    sequence: request.Sequence
    output: RequestOutput
    completion: Completion
    detokenizer: Detokenizer


class LLM:
    """A loaded model that generates.

    Raises LlmqError when the model cannot be found, read or run here, or the KV cache has no room for one sequence.
    """

    def __init__(
        self,
        model: str,
        *,
        revision: str | None = None,
        dtype: str = "auto",
        device: str = "auto",
        options: EngineOptions | None = None,
    ) -> None:
        self.options = options or EngineOptions()
        self.device = resolve_device(device)
        self.folder = resolve(model, revision)
        self.config = read_config(self.folder)
        self.dtype = resolve_dtype(dtype, self.config, self.device)
        self.tokenizer = load_tokenizer(self.folder)
        self.decoder = load_decoder(open_source(self.folder, self.device, self.dtype))
        num_blocks = self._num_blocks()
        self._cache = KVCache(self.config, num_blocks, self.options.block_size, self.dtype, self.device)
        self._blocks = BlockManager(num_blocks, self.options.block_size)
        self._scheduler = Scheduler(self.options, self._blocks, self.config.eos_token_ids)
        self._runner = Runner(self.decoder, self._cache, self.device)
        self._live: dict[int, _Live] = {}
        self._next_id = 0

    @property
    def stats(self) -> EngineStats:
        """Steps, preemptions and peak KV use since the start or ``reset_stats``."""
        return self._scheduler.stats

    def reset_stats(self) -> None:
        self._scheduler.stats = EngineStats(self._blocks.total)

    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[RequestOutput]:
        """Complete all prompts in one continuous batch; the answers come in the order of the prompts.

        ``params`` is one for all or one for each. A prompt that cannot be run is refused alone: see
        ``RequestOutput.error``.
        """
        return sorted(self.as_completed(prompts, params), key=lambda output: output.index)

    def as_completed(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> Iterator[RequestOutput]:
        """``generate``, each answer as soon as it is whole."""
        yield from self._run(prompts, params, streaming=False)

    def stream(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> Iterator[TextDelta | RequestOutput]:
        """``as_completed``, with the pieces of text as they settle before each whole answer."""
        return self._run(prompts, params, streaming=True)

    def _run(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None, *, streaming: bool
    ) -> Iterator[Any]:
        if isinstance(prompts, str):
            raise TypeError("prompts is a list of prompts, not one text")
        each = [params or SamplingParams()] * len(prompts) if not isinstance(params, Sequence) else list(params)
        if len(each) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts and {len(each)} params")
        try:
            for index, (prompt, own) in enumerate(zip(prompts, each, strict=True)):
                output = self._submit(index, prompt, own)
                if output.error is not None:
                    yield output
            while not self._scheduler.idle:
                yield from self._step(streaming)
            self._scheduler.check_integrity()
        finally:
            # The caller may leave early, or a step may fail: the next call starts from an empty engine.
            for live in self._live.values():
                self._scheduler.finish(live.sequence, "abort")
            self._live.clear()

    def _submit(self, index: int, prompt: Prompt, params: SamplingParams) -> RequestOutput:
        output = RequestOutput(index, prompt, [], time.perf_counter())
        try:
            output.prompt_token_ids = self._encode(prompt)
            max_total = self._max_total(len(output.prompt_token_ids), params)
        except LlmqError as error:
            output.error = error
            return output
        seed = secrets.randbits(62) if params.seed is None else params.seed
        for sample in range(params.n):
            sequence = request.Sequence(self._next_id, output.prompt_token_ids, params, seed + sample, max_total)
            completion = Completion(sample)
            output.completions.append(completion)
            detokenizer = Detokenizer(self._decode, output.prompt_token_ids, params.stop)
            self._live[self._next_id] = _Live(sequence, output, completion, detokenizer)
            self._scheduler.add(sequence)
            self._next_id += 1
        return output

    def _step(self, streaming: bool) -> Iterator[TextDelta | RequestOutput]:
        plan = self._scheduler.schedule()
        extended = self._scheduler.update(plan, self._runner.run(plan))
        now = time.perf_counter()
        for sequence in extended:
            live = self._live[sequence.sequence_id]
            completion = live.completion
            completion.token_times.append(now)
            text = ""
            # Without a reader or a stop text there is nothing to look at before the end.
            if streaming or sequence.params.stop:
                text = live.detokenizer.push(self._readable(sequence, sequence.output_ids[-1:]))
                if live.detokenizer.stopped:
                    self._scheduler.finish(sequence, "stop")
            if sequence.finish_reason is not None:
                unread = [] if streaming or sequence.params.stop else sequence.output_ids
                text += live.detokenizer.push(self._readable(sequence, unread), last=True)
                if live.detokenizer.stopped:
                    sequence.finish_reason = "stop"
                completion.text = live.detokenizer.text
                completion.token_ids = sequence.output_ids
                completion.logprobs = sequence.output_logprobs
                completion.finish_reason = sequence.finish_reason
                del self._live[sequence.sequence_id]
            if streaming and (text or completion.finish_reason is not None):
                yield TextDelta(live.output.index, completion.index, text, completion.finish_reason)
            if completion.finish_reason is not None and live.output.finished:
                yield live.output

    def _readable(self, sequence: request.Sequence, token_ids: Sequence[int]) -> Sequence[int]:
        """``token_ids`` without the end-of-text token that ended the sequence: it is no part of the text."""
        ended = sequence.finish_reason == "stop" and token_ids and token_ids[-1] in self.config.eos_token_ids
        return token_ids[:-1] if ended else token_ids

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=True)

    def _encode(self, prompt: Prompt) -> list[int]:
        if not prompt:
            raise LlmqError("the prompt is empty", "give at least one character")
        if isinstance(prompt, str):
            return list(self.tokenizer.encode(prompt))
        if isinstance(prompt[0], Mapping):
            return encode_chat(self.tokenizer, list(prompt))  # type: ignore[arg-type]
        token_ids: list[int] = list(prompt)  # type: ignore[arg-type]
        if not all(0 <= token < self.config.vocab_size for token in token_ids):
            raise LlmqError(f"a token id is outside the vocabulary of {self.config.vocab_size}")
        return token_ids

    def _max_total(self, prompt_tokens: int, params: SamplingParams) -> int:
        """How long the sequence may get, prompt included. LlmqError when that is nothing, or more than the pool."""
        context, capacity = self.config.context_length, self._blocks.capacity
        if prompt_tokens >= context:
            raise LlmqError(
                f"the prompt has {prompt_tokens} tokens and the model's context is {context}, the answer included",
                f"shorten the prompt to {context - 1} tokens or fewer",
            )
        if params.max_tokens is None:
            wanted = min(context, max(capacity, prompt_tokens + 1))
        else:
            wanted = min(context, prompt_tokens + params.max_tokens)
        if wanted > capacity:
            raise LlmqError(
                f"prompt and answer may take {wanted} tokens and the whole KV cache holds {capacity}",
                f"lower --max-tokens, or raise --kv-cache-memory to {self._cache_bytes(wanted)}",
                exit_code=CHECK_FAILED,
            )
        return wanted

    def _cache_bytes(self, tokens: int) -> str:
        """A size for --kv-cache-memory that holds ``tokens`` of one sequence."""
        blocks = memory.blocks_for(tokens, self.options.block_size) + memory.RESERVED_BLOCKS
        size = blocks * memory.block_bytes(self.config, self.options.block_size, self.dtype.itemsize)
        return f"{-(-size // 2**20)}MiB"

    def _num_blocks(self) -> int:
        """Blocks of the pool: what there is memory for, up to what max_num_seqs full contexts can use."""
        options, itemsize = self.options, self.dtype.itemsize
        budget = options.kv_cache_memory
        if budget is None:
            reserve = memory.activation_bytes(
                self.config, options.max_num_batched_tokens, options.max_num_seqs, itemsize
            )
            budget = free_kv_cache_bytes(self.device, options.gpu_memory_utilization, reserve)
        affordable = memory.pool_blocks(budget, self.config, options.block_size, itemsize)
        useful = options.max_num_seqs * memory.blocks_for(self.config.context_length, options.block_size)
        if affordable <= memory.RESERVED_BLOCKS:
            raise LlmqError(
                f"{memory.format_bytes(budget)} of KV cache do not hold one block of {options.block_size} tokens",
                f"give it at least --kv-cache-memory {self._cache_bytes(options.block_size)}",
                exit_code=CHECK_FAILED,
            )
        return min(affordable, useful + memory.RESERVED_BLOCKS)
