"""The built-in engine in this process, as benchmarks drive it: loaded, warmed up, given requests, and timed.

Every request generates exactly as many tokens as asked, greedily, end of text or not, so that two runs do the same
work. One that ends early, or is refused, has failed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from llmq.bench.datasets import items_of
from llmq.bench.environment import device_name, setting
from llmq.bench.load import Progress
from llmq.bench.memory import Line
from llmq.bench.metrics import DEFINITIONS, Goodput, Metrics, Timeline, summarize
from llmq.bench.nvml import card_of, start_meter
from llmq.bench.workload import Item, Workload, check_context, vocabulary_of
from llmq.checkpoint.config import read_config
from llmq.checkpoint.folder import resolve
from llmq.engine.options import EngineOptions
from llmq.engine.request import SamplingParams
from llmq.llm import LLM, RequestOutput
from llmq.memory import RESERVED_BLOCKS
from llmq.memplan import plan as memplan
from llmq.memplan.source import open_model, widened_weight_bytes
from llmq.runtime.linear import resident_bytes

if TYPE_CHECKING:
    from llmq.engine.scheduler import EngineStats


@dataclass(frozen=True, slots=True)
class Run:
    """What a list of requests gave. ``errors`` are the different reasons of failure, ``joules`` what the card spent;
    None where nobody measures it."""

    metrics: Metrics
    stats: EngineStats
    errors: tuple[str, ...]
    joules: float | None

    @property
    def peak_kv_usage(self) -> float:
        """Share of the KV cache's blocks."""
        return self.stats.peak_blocks / self.stats.total_blocks

    @property
    def joules_per_token(self) -> float | None:
        """Of output."""
        tokens = self.metrics.total_output_tokens
        return None if self.joules is None or not tokens else self.joules / tokens

    def as_json(self) -> dict[str, Any]:
        return {
            **self.metrics.as_json(),
            "peak_kv_blocks": self.stats.peak_blocks,
            "total_kv_blocks": self.stats.total_blocks,
            "peak_kv_usage": self.peak_kv_usage,
            "preemptions": self.stats.preemptions,
            "swapped_out": self.stats.swapped_out,
            "joules": self.joules,
            "joules_per_token": self.joules_per_token,
            "errors": list(self.errors),
        }


@dataclass(frozen=True, slots=True)
class Setup:
    """What was measured, and on what. ``weights_bytes`` are those on the device."""

    model: str
    weights_bytes: int
    dtype: str
    device: str
    setting: dict[str, Any]
    options: EngineOptions

    @property
    def device_name(self) -> str:
        return str(self.setting["device_name"])

    def as_json(self) -> dict[str, Any]:
        options = self.options
        return {
            "model_id": self.model,
            "backend": "llmq",
            "device": self.device,
            "dtype": self.dtype,
            "weights_bytes": self.weights_bytes,
            **self.setting,
            "temperature": 0.0,
            "load_format": options.load_format,
            "max_num_seqs": options.max_num_seqs,
            "max_num_batched_tokens": options.batched_tokens,
            "block_size": options.block_size,
            "kv_cache_dtype": options.kv_cache_dtype,
            "prefix_caching": options.prefix_caching,
            "definitions": DEFINITIONS,
        }


class Subject:
    """A model, loaded to be measured. LlmqError before loading if one of ``workloads`` does not fit its context."""

    def __init__(
        self,
        model: str,
        workloads: Sequence[Workload],
        *,
        revision: str | None,
        dtype: str,
        device: str,
        options: EngineOptions,
    ) -> None:
        self.model = model
        folder = resolve(model, revision)
        self.vocabulary = vocabulary_of(folder)
        for workload in workloads:
            self._drawn(workload, 0, read_config(folder).context_length)
        self.llm = LLM(model, revision=revision, dtype=dtype, device=device, options=options)

    def items(self, workload: Workload, cell: int = 0) -> list[Item]:
        """The requests of ``workload``, as token ids. LlmqError when one of them can never run here."""
        found = self._drawn(workload, cell, self.llm.max_model_len)
        for item in found:
            self.llm.limits.max_total(len(item.prompt), params(item))
        return found

    def _drawn(self, workload: Workload, cell: int, context_length: int) -> list[Item]:
        drawn = items_of(workload, self.vocabulary, cell)
        found = [Item(self.vocabulary.token_ids(item.prompt), item.output_len) for item in drawn]
        check_context(found, self.vocabulary, context_length)
        return found

    def run(self, items: Sequence[Item], goodput: Goodput | None = None, progress: Progress | None = None) -> Run:
        """All ``items`` at once, until the last is answered."""
        llm, meter = self.llm, start_meter(card_of(self.llm.device))
        llm.reset_stats()
        started = time.perf_counter()
        outputs = []
        for output in llm.as_completed([item.prompt for item in items], [params(item) for item in items]):
            outputs.append(output)
            if progress is not None:
                progress(len(outputs), len(items))
        duration = time.perf_counter() - started
        joules = meter.joules
        metrics, errors = evaluate(outputs, items, duration, goodput, llm.stats.prefix_hits)
        return Run(metrics, llm.stats, errors, joules)

    def token_times(self, items: Sequence[Item]) -> list[list[float]]:
        """When the tokens of each of ``items`` came, all of which run at once. Raises what an item is refused with."""
        outputs = self.llm.generate([item.prompt for item in items], [params(item) for item in items])
        for output in outputs:
            if output.error is not None:
                raise output.error
        return [output.completions[0].token_times for output in outputs]

    def setup(self) -> Setup:
        """What is measured here, and on what."""
        llm = self.llm
        return Setup(
            model=self.model,
            weights_bytes=resident_bytes(llm.decoder),
            dtype=str(llm.dtype).removeprefix("torch."),
            device=llm.device,
            setting=setting(device_name(llm.device), card_of(llm.device)),
            options=llm.options,
        )

    def memory(self, items: Sequence[Item], run: Run) -> list[Line]:
        """What the planner says of a run of ``items``, all at once and as long as the longest, beside what it took."""
        llm = self.llm
        load = memplan.Load(
            batch_size=min(len(items), llm.options.seats),
            max_model_len=max(len(item.prompt) + item.output_len for item in items),
            kv_cache_dtype=llm.kv_dtype,
        )
        plan = memplan.plan(open_model(str(llm.folder)), load=load, options=llm.options)
        weights = resident_bytes(llm.decoder)
        peak = llm.kv_cache_bytes // (run.stats.total_blocks + RESERVED_BLOCKS) * run.stats.peak_blocks
        if llm.device == "cpu":  # where weights are widened, and activations cannot be told from all else
            widened = widened_weight_bytes(plan.model, llm.dtype.itemsize)
            return [
                Line("weights", widened, weights, exact=True),
                Line("KV cache, at most", plan.kv_cache, peak, exact=False),
            ]
        activations = torch.cuda.max_memory_allocated(llm.device) - weights - llm.kv_cache_bytes
        return [
            Line("weights", plan.weights.resident, weights, exact=True),
            Line("KV cache, at most", plan.kv_cache, peak, exact=False),
            Line("activations", plan.activations.likely, activations, exact=False),
        ]


def evaluate(
    outputs: Sequence[RequestOutput],
    items: Sequence[Item],
    duration: float,
    goodput: Goodput | None = None,
    cached_tokens: int | None = None,
) -> tuple[Metrics, tuple[str, ...]]:
    """The metrics of the requests that gave as many tokens as asked, and why the others failed."""
    timelines: list[Timeline] = []
    errors: list[str] = []
    for output in outputs:
        times = output.completions[0].token_times if output.completions else []
        wanted = items[output.index].output_len
        if output.error is not None:
            errors.append(output.error.message)
        elif len(times) != wanted:
            errors.append(f"ended after {len(times)} of {wanted} tokens")
        else:
            timelines.append(Timeline(output.arrival_time, times, len(output.prompt_token_ids)))
    metrics = summarize(timelines, failed=len(errors), duration=duration, goodput=goodput)
    return replace(metrics, cached_tokens=cached_tokens), tuple(dict.fromkeys(errors))


def params(item: Item) -> SamplingParams:
    """How the tokens of ``item`` are drawn: the likeliest, end of text or not."""
    return SamplingParams(max_tokens=item.output_len, temperature=0.0, ignore_eos=True)
