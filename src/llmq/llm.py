"""LLM: a model folder, loaded, with the engine and the runtime joined. The Python API.

llm = LLM("demo")
for output in llm.generate(["def ", "class "], SamplingParams(max_tokens=32)):
    print(output.completions[0].text)
"""

from __future__ import annotations

import secrets
import time
import warnings
from collections import deque
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from llmq import memory
from llmq.checkpoint.config import read_config
from llmq.checkpoint.folder import resolve
from llmq.checkpoint.formats import open_format
from llmq.checkpoint.tokenizer import Tokenizer, encode_chat, encode_text, has_tokenizer, load_tokenizer
from llmq.engine import request
from llmq.engine.admission import Limits, Rejected, format_cache_size
from llmq.engine.baselines import BATCHINGS, BaselineScheduler, Batching
from llmq.engine.blocks import BlockManager
from llmq.engine.detokenizer import Detokenizer
from llmq.engine.grammar import Grammars
from llmq.engine.options import EngineOptions
from llmq.engine.outputs import TokenDelta
from llmq.engine.request import FinishReason, SamplingParams
from llmq.engine.scheduler import EngineStats, Scheduler
from llmq.engine.trace import open_trace
from llmq.errors import CHECK_FAILED, USAGE, LlmqError
from llmq.plan import StepPlan, TokenLogprobs, layer_groups
from llmq.runtime.device import (
    KV_DTYPES,
    available_bytes,
    available_memory_bytes,
    check_deterministic,
    check_weights_fit,
    free_device_memory,
    free_kv_cache_bytes,
    resolve_device,
    resolve_dtype,
    resolve_kv_dtype,
)
from llmq.runtime.dummy import dummy_decoder
from llmq.runtime.kv_cache import KVCache
from llmq.runtime.loader import load_decoder, load_kv_scales, open_source, resident_weight_bytes
from llmq.runtime.runner import Result, Runner

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
"""A text, token ids, or the messages of a conversation."""


@dataclass(slots=True)
class Completion:
    """One answer. ``token_times`` are ``time.perf_counter()`` seconds at which each token left its step.

    ``score`` is, of a beam, log-probability / generated length ^ length_penalty; of best_of, the log-probability.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    token_times: list[float] = field(default_factory=list)
    score: float | None = None


@dataclass(slots=True)
class RequestOutput:
    """What became of one prompt. ``error`` says why it was refused; then there are no completions."""

    index: int
    prompt: Prompt
    prompt_token_ids: list[int]
    arrival_time: float
    completions: list[Completion] = field(default_factory=list)
    error: LlmqError | None = None
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    """Of the prompt's tokens from the second on, where asked for."""
    cached_tokens: int = 0
    """Of the prompt, those that the prefix cache had."""

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


@dataclass(frozen=True, slots=True)
class Occupancy:
    """Requests in each of the engine's queues, and blocks of the KV cache that they own."""

    running: int
    waiting: int
    swapped: int
    used_blocks: int


@dataclass(slots=True)
class _Live:
    """A request in the engine, and the answers it fills. Samples that are to be ranked are only looked at when all
    are done; ``times`` are then those of the request's steps."""

    request: request.Request
    output: RequestOutput
    detokenizers: list[Detokenizer]
    times: list[float] = field(default_factory=list)

    @property
    def ranked(self) -> bool:
        params = self.request.params
        return bool(params.beam_width) or params.width > params.n


class LLM:
    """A loaded model that generates.

    Raises LlmqError when the model cannot be found, read or run here, or the KV cache has no room for one sequence.

    A model with dummy weights needs no tokenizer: prompts are token ids then, and answers have no text.
    """

    def __init__(
        self,
        model: str,
        *,
        revision: str | None = None,
        dtype: str = "auto",
        device: str = "auto",
        options: EngineOptions | None = None,
        text: bool = True,
    ) -> None:
        """``text=False``: load no tokenizer. Prompts are token ids then, and answers have no text."""
        self.device = resolve_device(device)
        self.options = (options or EngineOptions()).on(self.device)
        if self.options.deterministic:
            check_deterministic(self.device)
        self.folder = resolve(model, revision)
        self.config = read_config(self.folder)
        self.dtype = resolve_dtype(dtype, self.config, self.device)
        self.kv_dtype = resolve_kv_dtype(self.options.kv_cache_dtype, self.dtype, self.device)
        dummy = self.options.load_format == "dummy"
        without = not text or (dummy and not has_tokenizer(self.folder))
        self._tokenizer = None if without else load_tokenizer(self.folder)
        self._grammars = Grammars(self.folder, self.config.vocab_size, self.config.eos_token_ids)
        self.max_model_len = self._max_model_len()
        weights = resident_weight_bytes(self.config, self.dtype)
        check_weights_fit(self.device, weights, self.options.gpu_memory_utilization)
        kv_scales = None
        if dummy:
            self.decoder = dummy_decoder(self.config.for_context(self.max_model_len), self.device, self.dtype)
        else:
            source = open_source(self.folder, self.device, self.dtype, self.max_model_len)
            self.decoder = load_decoder(source)
            if self.kv_dtype == "fp8":
                kv_scales = load_kv_scales(source)
                if kv_scales is None:
                    warnings.warn(f"{model} has no scales for an fp8 KV cache: they are taken for 1", stacklevel=2)
        free_device_memory(self.device)
        cpu_blocks = self._cpu_blocks()
        num_blocks = self._num_blocks()
        options = self.options
        kept_as = KV_DTYPES[self.kv_dtype]
        self._cache = KVCache(
            self.config, num_blocks, options.block_size, kept_as, self.device, cpu_blocks, layer_scales=kv_scales
        )
        self._blocks = BlockManager(
            num_blocks,
            options.block_size,
            windows=[group.window for group in self._cache.groups],
            cpu_blocks=cpu_blocks,
            prefix_caching=options.prefix_caching,
        )
        self.limits = Limits(self.max_model_len, self._block_bytes, options, self._blocks)
        if options.max_model_len is not None and options.max_model_len > self._blocks.longest(1, 1):
            blocks = self._blocks.worst_case(1, options.max_model_len, 1)
            raise LlmqError(
                f"the KV cache holds {self._blocks.longest(1, 1)} tokens, and a sequence of --max-model-len "
                f"{options.max_model_len} does not fit",
                f"lower --max-model-len, or raise --kv-cache-memory to {self.limits.cache_size(blocks)}",
                exit_code=CHECK_FAILED,
            )
        self._scheduler: Scheduler = Scheduler(options, self._blocks, trace=open_trace())
        self._runner = Runner(
            self.decoder,
            self._cache,
            self.device,
            max_sequences=options.seats,
            max_tokens=self.max_model_len,
            enforce_eager=options.enforce_eager,
            deterministic=options.deterministic,
        )
        self._flights: deque[tuple[StepPlan, Result]] = deque()
        """Steps that the device was given, and whose results have not been taken in: at most one between two steps."""
        self._live: dict[Hashable, _Live] = {}
        self._ended: list[_Live] = []
        """Requests of which no more is to come, and the answers have not been handed out."""
        self._request_numbers = count()
        self._last_run = object()
        """The last call of ``generate`` and its like, by an object that no other has."""

    @property
    def tokenizer(self) -> Tokenizer:
        """LlmqError when the folder has none."""
        if self._tokenizer is None:
            raise LlmqError(f"{self.folder} has no tokenizer", "give prompts as token ids, or add tokenizer.json")
        return self._tokenizer

    @property
    def stats(self) -> EngineStats:
        """Steps, preemptions and peak KV use since the start or ``reset_stats``."""
        return self._scheduler.stats

    @property
    def kv_cache_bytes(self) -> int:
        """Of the pool on the device, scales and the reserved block among them."""
        return self._cache.num_bytes

    def reset_stats(self) -> None:
        self._scheduler.reset_stats()

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        request_ids: Sequence[Hashable] | None = None,
        batching: Batching = "continuous",
        kv_cache: bool = True,
    ) -> list[RequestOutput]:
        """Complete all prompts in one continuous batch; the answers come in the order of the prompts.

        ``params`` is one for all or one for each. ``request_ids`` name the requests, to ``abort`` them by. A prompt
        that cannot be run is refused alone: see ``RequestOutput.error``.

        ``batching`` and ``kv_cache`` choose older, slower ways, to compare with: see ``engine.baselines``.
        """
        outputs = self.as_completed(prompts, params, request_ids=request_ids, batching=batching, kv_cache=kv_cache)
        return sorted(outputs, key=lambda output: output.index)

    def as_completed(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        request_ids: Sequence[Hashable] | None = None,
        batching: Batching = "continuous",
        kv_cache: bool = True,
    ) -> Iterator[RequestOutput]:
        """``generate``, each answer as soon as it is whole."""
        with self.scheduled(batching, kv_cache=kv_cache):
            yield from self._run(prompts, params, request_ids, streaming=False)

    @contextmanager
    def scheduled(self, batching: Batching, *, kv_cache: bool = True) -> Iterator[None]:
        """Run what is submitted meanwhile in one of the ways of ``engine.baselines``. Nothing may be under way."""
        if batching not in BATCHINGS:
            raise LlmqError(f"there is no batching {batching!r}", f"choose {', '.join(BATCHINGS)}", exit_code=USAGE)
        self._check_idle()
        if batching == "continuous" and kv_cache:
            yield
            return
        engine = self._scheduler
        windows, options = self._blocks.windows, self.options
        blocks = BlockManager(self._blocks.num_blocks, options.block_size, windows=windows, prefix_caching=False)
        self._scheduler = BaselineScheduler(options, blocks, batching=batching, kv_cache=kv_cache)
        try:
            yield
        finally:
            # Both have the same pool under them.
            self._blocks.forget_prefixes()
            engine.stats, self._scheduler = self._scheduler.stats, engine

    def stream(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        request_ids: Sequence[Hashable] | None = None,
    ) -> Iterator[TextDelta | RequestOutput]:
        """``as_completed``, with the pieces of text as they settle before each whole answer.

        The text of beams, and of samples that are ranked, comes in one piece when all are done.
        """
        return self._run(prompts, params, request_ids, streaming=True)

    def submit(self, index: int, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        """Queue a request for ``step``, to be known by ``index``: for whoever serves requests as they come.

        Raises LlmqError when it can never run here.
        """
        output = self._submit(index, prompt_ids, params, index)
        if output.error is not None:
            self._scheduler.reject(output.error.check if isinstance(output.error, Rejected) else None)
            raise output.error

    def step(self) -> Iterator[TokenDelta | RequestOutput]:
        """Run one step of what was submitted: the tokens that it brought (but for beams, and samples that are ranked),
        and the answers that are whole."""
        return self._step(streaming=False, tokens=True)

    @property
    def idle(self) -> bool:
        """Whether ``step`` would bring nothing."""
        return not self._live

    def finish(self, index: int, completion_index: int) -> None:
        """End one answer of a submitted request now: its reader met a stop text. What has ended stays as it is."""
        live = self._live.get(index)
        if live is None:
            return
        for sequence in live.request.sequences:
            if sequence.index == completion_index and sequence.finish_reason is None:
                self._scheduler.finish(sequence, "stop")
                self._complete(live, sequence, seen=False)
                if live.output.finished:
                    self._ended.append(live)

    @property
    def occupancy(self) -> Occupancy:
        """How full the engine is now."""
        queues = self._scheduler
        return Occupancy(len(queues.running), len(queues.waiting), len(queues.swapped), self._blocks.used)

    def abort(self, request_id: Hashable) -> None:
        """End a request that a running ``stream`` or ``as_completed`` works on. Its answers so far come next."""
        if request_id in self._live:
            self._ended.append(self._live[request_id])
            self._scheduler.abort(request_id)

    def _run(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None,
        request_ids: Sequence[Hashable] | None,
        *,
        streaming: bool,
    ) -> Iterator[Any]:
        if isinstance(prompts, str):
            raise TypeError("prompts is a list of prompts, not one text")
        each = [params or SamplingParams()] * len(prompts) if not isinstance(params, Sequence) else list(params)
        ids = [("", next(self._request_numbers)) for _ in prompts] if request_ids is None else list(request_ids)
        if len(each) != len(prompts) or len(ids) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts, {len(each)} params and {len(ids)} request ids")
        self._check_idle()
        self._last_run = run = object()
        try:
            for index, (prompt, own, request_id) in enumerate(zip(prompts, each, ids, strict=True)):
                output = self._submit(index, prompt, own, request_id)
                if output.error is not None:
                    self._scheduler.reject(output.error.check if isinstance(output.error, Rejected) else None)
                    yield output
            while self._live:
                yield from self._step(streaming)
            self._scheduler.check_integrity()
        finally:
            # The caller may leave early, or a step may fail: the next call starts from an empty engine. A step may
            # still run for nobody, where all have ended by stop tokens. Who leaves when all was said may come late.
            if self._last_run is run:
                for request_id in self._live:
                    self._scheduler.abort(request_id)
                self._scheduler.forget_flights()
                self._flights.clear()
                self._live.clear()
                self._ended.clear()

    def _check_idle(self) -> None:
        """LlmqError while another call is under way: it would lose its requests to this one."""
        if not self.idle:
            raise LlmqError("the engine works on other requests", "read that stream to its end, or close() it")

    def _submit(self, index: int, prompt: Prompt, params: SamplingParams, request_id: Hashable) -> RequestOutput:
        output = RequestOutput(index, prompt, [], time.perf_counter())
        try:
            output.prompt_token_ids = self.limits.truncated(self._encode(prompt), params)
            self._check_stop_ids(params)
            new = request.Request(
                request_id,
                request.token_array(output.prompt_token_ids),
                params,
                self._seed(params),
                self.limits.max_total(len(output.prompt_token_ids), params),
                frozenset(self.config.eos_token_ids),
                None if params.json_schema is None else self._grammars.matcher(params.json_schema),
            )
            self._scheduler.add(new)
        except LlmqError as error:
            output.error = error
            return output
        output.completions = [Completion(sample) for sample in range(params.n)]
        detokenizers = [
            Detokenizer(self._decode, output.prompt_token_ids, params.stop, include_stop=params.include_stop)
            for _ in output.completions
        ]
        self._live[request_id] = _Live(new, output, detokenizers)
        return output

    def _seed(self, params: SamplingParams) -> int:
        """Drawn at random where none is given, unless answers are to hang on the request alone."""
        if params.seed is not None:
            return params.seed
        return 0 if self.options.deterministic else secrets.randbits(62)

    def _step(self, streaming: bool, tokens: bool = False) -> Iterator[Any]:
        """Launch a step, and take in the one before: the device computes while the host works. Where a plan hangs on
        tokens that are not known yet, one after the other."""
        scheduler, flights = self._scheduler, self._flights
        if flights and scheduler.foresees:
            scheduler.presume(flights[-1][0])
        elif flights:
            yield from self._take_in(streaming, tokens)
        launched = scheduler.has_work
        if launched:
            plan = scheduler.schedule()
            flights.append((plan, self._runner.launch(plan)))
        if flights and not (launched and len(flights) == 1 and scheduler.foresees):
            yield from self._take_in(streaming, tokens)
        yield from self._hand_out(streaming)

    def _take_in(self, streaming: bool, tokens: bool) -> Iterator[TextDelta | TokenDelta]:
        """Book what the oldest step gives that was launched."""
        plan, result = self._flights.popleft()
        progress = self._scheduler.update(plan, result())
        now = time.perf_counter()
        for sequence in progress.extended:
            live = self._live[sequence.request.request_id]
            if live.ranked:
                if now not in live.times[-1:]:  # one for the step, whichever of the sequences go on
                    live.times.append(now)
            else:
                yield from self._extend(live, sequence, now, streaming)
                if tokens:
                    yield _token_delta(live, sequence)
                if live.output.finished:
                    self._ended.append(live)
        self._ended += [live for done in progress.finished if (live := self._live[done.request_id]).ranked]

    def _hand_out(self, streaming: bool) -> Iterator[TextDelta | RequestOutput]:
        """The answers that are whole."""
        while self._ended:
            live = self._ended.pop(0)
            if self._live.pop(live.request.request_id, None) is None:
                continue  # aborted twice
            if not live.output.finished:
                yield from self._rank(live, streaming) if live.ranked else self._cut_short(live, streaming)
            live.output.prompt_logprobs = live.request.prompt_logprobs
            live.output.cached_tokens = live.request.cached_tokens
            yield live.output

    def _extend(self, live: _Live, sequence: request.Sequence, now: float, streaming: bool) -> Iterator[TextDelta]:
        """Take in the token that ``sequence`` has just got."""
        completion, detokenizer = live.output.completions[sequence.index], live.detokenizers[sequence.index]
        completion.token_times.append(now)
        text = ""
        # Without a reader or a stop text there is nothing to look at before the end.
        if streaming or live.request.params.stop:
            may_stop = sequence.num_output > live.request.params.min_tokens
            text = detokenizer.push(self._readable(sequence, sequence.token_ids[-1:]), may_stop=may_stop)
            if detokenizer.stopped:
                self._scheduler.finish(sequence, "stop")
        if sequence.finish_reason is not None:
            text += self._complete(live, sequence, seen=streaming or bool(live.request.params.stop))
        if streaming and (text or completion.finish_reason is not None):
            yield TextDelta(live.output.index, completion.index, text, completion.finish_reason)

    def _complete(self, live: _Live, sequence: request.Sequence, *, seen: bool) -> str:
        """Fill the answer of a sequence that has ended; returns the text that its end settles. ``seen``: whether the
        detokenizer has had its tokens already."""
        completion, detokenizer = live.output.completions[sequence.index], live.detokenizers[sequence.index]
        text = detokenizer.push([] if seen else self._readable(sequence, sequence.output_ids), last=True)
        completion.text = detokenizer.text
        completion.token_ids = sequence.output_ids
        completion.logprobs = sequence.logprobs
        completion.finish_reason = "stop" if detokenizer.stopped else sequence.finish_reason
        return text

    def _cut_short(self, live: _Live, streaming: bool) -> Iterator[TextDelta]:
        """What an aborted request has so far."""
        for sequence in live.request.sequences:
            if live.output.completions[sequence.index].finish_reason is None:
                text = self._complete(live, sequence, seen=streaming or bool(live.request.params.stop))
                if streaming:
                    yield TextDelta(live.output.index, sequence.index, text, "abort")
        for completion in live.output.completions:
            completion.finish_reason = completion.finish_reason or "abort"

    def _rank(self, live: _Live, streaming: bool) -> Iterator[TextDelta]:
        """Fill the answers with the n best beams, or samples."""
        done, params = live.request, live.request.params
        found: list[tuple[float, list[int], FinishReason, list[TokenLogprobs]]]
        if done.beams is not None and not done.aborted:
            found = [(one.score, one.token_ids, one.reason, []) for one in done.beams.answers]
        else:
            found = [
                (one.cumulative, one.output_ids, one.finish_reason or "abort", one.logprobs) for one in done.sequences
            ]
        found.sort(key=lambda one: -one[0])
        for completion, detokenizer, one in zip(live.output.completions, live.detokenizers, found, strict=False):
            completion.score, completion.token_ids, reason, logprobs = one
            completion.logprobs = [] if params.logprobs is None else logprobs
            ended = reason == "stop" and not params.include_stop and completion.token_ids[-1:]
            readable = completion.token_ids[: -1 if ended else None]
            text = detokenizer.push(readable[: params.min_tokens], may_stop=False)
            text += detokenizer.push(readable[params.min_tokens :], last=True)
            completion.text = text
            completion.finish_reason = "stop" if detokenizer.stopped else reason
            completion.token_times = live.times[: len(completion.token_ids)]
            if streaming:
                yield TextDelta(live.output.index, completion.index, text, completion.finish_reason)
        for completion in live.output.completions:
            completion.finish_reason = completion.finish_reason or "abort"

    def _readable(self, sequence: request.Sequence, token_ids: Sequence[int]) -> Sequence[int]:
        """``token_ids`` without the token that ended the sequence: it is no part of the text."""
        own = sequence.request
        ended = sequence.finish_reason == "stop" and token_ids and token_ids[-1] in own.stop_ids
        return token_ids[:-1] if ended and not own.params.include_stop else token_ids

    def _decode(self, token_ids: Sequence[int]) -> str:
        return "" if self._tokenizer is None else self._tokenizer.decode(token_ids, skip_special_tokens=True)

    def _encode(self, prompt: Prompt) -> list[int]:
        if not prompt:
            raise LlmqError("the prompt is empty", "give at least one character")
        if isinstance(prompt, str):
            return encode_text(self.tokenizer, prompt)
        if isinstance(prompt[0], Mapping):
            return encode_chat(self.tokenizer, list(prompt))  # type: ignore[arg-type]
        token_ids: list[int] = list(prompt)  # type: ignore[arg-type]
        if min(token_ids) < 0 or max(token_ids) >= self.config.vocab_size:
            raise LlmqError(f"a token id is outside the vocabulary of {self.config.vocab_size}")
        return token_ids

    def _check_stop_ids(self, params: SamplingParams) -> None:
        for token in params.stop_token_ids:
            if token >= self.config.vocab_size:
                raise LlmqError(
                    f"the stop token {token} is outside the vocabulary of {self.config.vocab_size}",
                    "check --stop-token-id",
                )

    def _max_model_len(self) -> int:
        wanted = self.options.max_model_len
        if wanted is not None and wanted > self.config.context_length:
            raise LlmqError(
                f"--max-model-len {wanted} is more than the model's context of {self.config.context_length}",
                f"lower it to {self.config.context_length} or less",
                exit_code=USAGE,
            )
        return wanted or self.config.context_length

    @property
    def _block_bytes(self) -> int:
        return memory.pool_block_bytes(self.config, self.options.block_size, self.kv_dtype)

    def _cpu_blocks(self) -> int:
        """Blocks in main memory. LlmqError when there is not that much of it."""
        swap, free = self.options.swap_space, available_memory_bytes()
        if swap > free:
            raise LlmqError(
                f"a swap space of {memory.format_bytes(swap)} is more main memory than there is: "
                f"{memory.format_bytes(free)}",
                "lower --swap-space",
                exit_code=CHECK_FAILED,
            )
        return memory.pool_blocks(swap, self.config, self.options.block_size, self.kv_dtype)

    def _num_blocks(self) -> int:
        """Blocks of the pool: what there is memory for, up to what max_num_seqs full contexts can use."""
        options = self.options
        budget = options.kv_cache_memory
        if budget is None:
            reserve = memory.activation_bytes(
                self.config, options.batched_tokens, options.max_num_seqs, self.dtype.itemsize
            )
            format = open_format(self.config)
            if format is not None:
                tokens = options.batched_tokens
                reserve += memory.widened_bytes(self.config, format.scheme, tokens, self.dtype.itemsize)
            budget = free_kv_cache_bytes(self.device, options.gpu_memory_utilization, reserve)
        affordable = memory.pool_blocks(budget, self.config, options.block_size, self.kv_dtype)
        groups = len(layer_groups(self.config.windows))
        useful = options.max_num_seqs * groups * memory.blocks_for(self.max_model_len, options.block_size)
        if affordable < groups + memory.RESERVED_BLOCKS:
            raise LlmqError(
                f"{memory.format_bytes(budget)} of KV cache do not hold one block of {options.block_size} tokens",
                f"give it at least --kv-cache-memory {format_cache_size(groups, self._block_bytes)}",
                exit_code=CHECK_FAILED,
            )
        blocks = min(affordable, useful + memory.RESERVED_BLOCKS)
        size, free = blocks * self._block_bytes, available_bytes(self.device)
        if options.kv_cache_memory is not None and size > free:
            raise LlmqError(
                f"a KV cache of {memory.format_bytes(size)} is more memory than there is: {memory.format_bytes(free)}",
                "lower --kv-cache-memory",
                exit_code=CHECK_FAILED,
            )
        return blocks


def _token_delta(live: _Live, sequence: request.Sequence) -> TokenDelta:
    logprobs = None if live.request.params.logprobs is None else sequence.logprobs[-1]
    delta = TokenDelta(live.output.index, sequence.index, sequence.token_ids[-1], logprobs, sequence.finish_reason)
    if sequence.num_output > 1:
        return delta
    return delta._replace(queue_seconds=live.request.queue_seconds, cached_tokens=live.request.cached_tokens)
