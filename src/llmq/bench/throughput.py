"""Offline throughput: all requests are there at the start, and the engine in this process runs them.

Every request generates exactly as many tokens as asked, greedily, end of text or not, so that two runs do the same
work. One that ends early, or is refused, has failed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmq.bench.environment import device_name, installed
from llmq.bench.metrics import DEFINITIONS, Metrics, Timeline, summarize
from llmq.bench.workload import Workload
from llmq.checkpoint.config import ModelConfig, read_config
from llmq.checkpoint.folder import resolve
from llmq.engine.options import EngineOptions
from llmq.engine.request import SamplingParams

if TYPE_CHECKING:
    from llmq.engine.scheduler import EngineStats
    from llmq.llm import LLM, RequestOutput

WARM_UP_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Setup:
    """What was measured, and on what. ``weights_bytes`` are those on the device."""

    model: str
    weights_bytes: int
    dtype: str
    device: str
    device_name: str
    torch: str | None
    options: EngineOptions


@dataclass(frozen=True, slots=True)
class ThroughputReport:
    """``errors`` are the different reasons of failure."""

    setup: Setup
    workload: Workload
    metrics: Metrics
    peak_blocks: int
    total_blocks: int
    preemptions: int
    errors: tuple[str, ...]

    @property
    def peak_kv_usage(self) -> float:
        """Share of the KV cache's blocks."""
        return self.peak_blocks / self.total_blocks

    def as_json(self) -> dict[str, Any]:
        setup, options = self.setup, self.setup.options
        return {
            "model_id": setup.model,
            "backend": "llmq",
            "device": setup.device,
            "device_name": setup.device_name,
            "dtype": setup.dtype,
            "torch": setup.torch,
            "weights_bytes": setup.weights_bytes,
            "num_prompts": self.workload.num_prompts,
            "input_len": self.workload.input_len,
            "output_len": self.workload.output_len,
            "seed": self.workload.seed,
            "temperature": 0.0,
            "max_num_seqs": options.max_num_seqs,
            "max_num_batched_tokens": options.max_num_batched_tokens,
            "block_size": options.block_size,
            "kv_cache_dtype": options.kv_cache_dtype,
            **self.metrics.as_json(),
            "peak_kv_blocks": self.peak_blocks,
            "total_kv_blocks": self.total_blocks,
            "peak_kv_usage": self.peak_kv_usage,
            "preemptions": self.preemptions,
            "errors": list(self.errors),
            "definitions": DEFINITIONS,
        }


def bench_throughput(
    model: str,
    workload: Workload,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    options: EngineOptions | None = None,
) -> ThroughputReport:
    """Load ``model``, warm it up, and measure the workload. LlmqError before loading if the context is too short."""
    workload.check_context(read_config(resolve(model, revision)).context_length)

    from llmq.llm import LLM
    from llmq.runtime.linear import resident_bytes

    llm = LLM(model, revision=revision, dtype=dtype, device=device, options=options)
    metrics, stats, errors = measure(llm, workload)
    setup = Setup(
        model=model,
        weights_bytes=resident_bytes(llm.decoder),
        dtype=str(llm.dtype).removeprefix("torch."),
        device=llm.device,
        device_name=device_name(llm.device),
        torch=installed("torch"),
        options=llm.options,
    )
    return ThroughputReport(setup, workload, metrics, stats.peak_blocks, stats.total_blocks, stats.preemptions, errors)


def measure(llm: LLM, workload: Workload) -> tuple[Metrics, EngineStats, tuple[str, ...]]:
    """Run the workload on a loaded model, after a short warm-up on other prompts.

    The warm-up fills a step, as the workload will: what a GPU compiles and allocates for one is not measured.
    """
    excluded, vocab_size = _special_tokens(llm.config), llm.config.vocab_size
    step = -(-llm.options.max_num_batched_tokens // workload.input_len) + 1
    warm_up = workload.warm_up_prompts(min(step, workload.num_prompts), vocab_size, excluded)
    llm.generate(warm_up, _params(min(WARM_UP_TOKENS, workload.output_len)))
    llm.reset_stats()
    prompts = workload.prompts(vocab_size, excluded)
    started = time.perf_counter()
    outputs = llm.generate(prompts, _params(workload.output_len))
    duration = time.perf_counter() - started
    metrics, errors = evaluate(outputs, workload.output_len, duration)
    return metrics, llm.stats, errors


def evaluate(outputs: Sequence[RequestOutput], output_len: int, duration: float) -> tuple[Metrics, tuple[str, ...]]:
    """The metrics of the requests that gave ``output_len`` tokens, and why the others failed."""
    timelines: list[Timeline] = []
    errors: list[str] = []
    for output in outputs:
        times = output.completions[0].token_times if output.completions else []
        if output.error is not None:
            errors.append(output.error.message)
        elif len(times) != output_len:
            errors.append(f"ended after {len(times)} of {output_len} tokens")
        else:
            timelines.append(Timeline(output.arrival_time, times, len(output.prompt_token_ids)))
    return summarize(timelines, failed=len(errors), duration=duration), tuple(dict.fromkeys(errors))


def _params(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)


def _special_tokens(config: ModelConfig) -> set[int]:
    return {*config.eos_token_ids, *(() if config.bos_token_id is None else (config.bos_token_id,))}
