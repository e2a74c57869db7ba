"""What a run of the engine is told: the one home of its defaults."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from llmq.errors import USAGE, LlmqError

BLOCK_SIZE_MULTIPLE = 16
BATCHED_TOKENS = {"cpu": 2048, "cuda": 8192}
"""Of a step, by the kind of device. On an H200, 8,192 make 14 % more tokens/s than 2,048: Qwen3-0.6B, 256 prompts of
100 to 1,024 tokens."""
SchedulerPolicy = Literal["mixed", "prefill-first"]
Preemption = Literal["auto", "recompute", "swap"]
QueueOrder = Literal["fcfs", "priority"]
KVCacheDtype = Literal["auto", "fp8", "int8"]
LoadFormat = Literal["auto", "dummy"]
SCHEDULERS: tuple[SchedulerPolicy, ...] = ("mixed", "prefill-first")
PREEMPTIONS: tuple[Preemption, ...] = ("auto", "recompute", "swap")
QUEUE_ORDERS: tuple[QueueOrder, ...] = ("fcfs", "priority")
KV_CACHE_DTYPES: tuple[KVCacheDtype, ...] = ("auto", "fp8", "int8")
LOAD_FORMATS: tuple[LoadFormat, ...] = ("auto", "dummy")
API_ONLY = ("ageing_steps", "watermark")
"""Not on the command line: their defaults serve."""


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """max_num_seqs            sequences that may run at once; a request counts as all that it is going to be
    max_num_batched_tokens  tokens that one step may compute, prompts' and new ones; None: BATCHED_TOKENS of the device
    block_size              tokens in one block of the KV cache
    kv_cache_dtype          fp8: keys and values in 8 bits, e4m3, by scales that the folder brings for each layer;
                            int8: by a scale for each head of each token; auto: in the type that is computed in
    kv_cache_memory         bytes of the KV cache; None: what is free, up to what max_num_seqs full contexts take
    gpu_memory_utilization  share of the GPU's whole memory that weights, activations and KV cache may take
    max_model_len           tokens of a sequence, prompt and completion; None: the model's context
    prefix_caching          share the blocks of prompts that begin alike, also between requests
    swap_space              bytes of main memory that preempted requests may be moved to
    scheduler               mixed: new tokens and chunks of prompts in one step; prefill-first: one kind a step
    delay_factor            prefill-first: hold new prompts back this many times the last prompt step's time
    max_prefill_steps       prefill-first: prompt steps in a row while anything waits for its next token
    max_skips               requests that may be let in before one that came first and does not fit yet
    preemption              when blocks run out: recompute, swap, or auto: recompute one sequence, swap several
    queue                   fcfs: by arrival; priority: by SamplingParams.priority, then by arrival
    ageing_steps            priority: each so many steps of waiting count as one level of priority
    watermark               share of the pool that letting a request in leaves free, for those that run to grow
    load_format             auto: the folder's weights; dummy: random ones of the shapes and schemes in config.json
    enforce_eager           launch every kernel of every step, instead of replaying CUDA graphs of short ones
    deterministic           the same tokens for a request whatever else runs, and after a preemption; slower. A request
                            without a seed has 0
    """

    max_num_seqs: int = 256
    max_num_batched_tokens: int | None = None
    block_size: int = 64
    kv_cache_memory: int | None = None
    gpu_memory_utilization: float = 0.9
    max_model_len: int | None = None
    prefix_caching: bool = True
    swap_space: int = 0
    scheduler: SchedulerPolicy = "mixed"
    delay_factor: float = 0.0
    max_prefill_steps: int = 4
    max_skips: int = 0
    preemption: Preemption = "auto"
    queue: QueueOrder = "fcfs"
    ageing_steps: int = 256
    watermark: float = 0.01
    kv_cache_dtype: KVCacheDtype = "auto"
    load_format: LoadFormat = "auto"
    enforce_eager: bool = False
    deterministic: bool = False

    def __post_init__(self) -> None:
        checks = (
            (self.max_num_seqs >= 1, "max_num_seqs", "1 or more"),
            (
                self.max_num_batched_tokens is None or self.max_num_batched_tokens >= 1,
                "max_num_batched_tokens",
                "1 or more",
            ),
            (
                self.block_size >= 1 and self.block_size % BLOCK_SIZE_MULTIPLE == 0,
                "block_size",
                f"a multiple of {BLOCK_SIZE_MULTIPLE}",
            ),
            (self.kv_cache_memory is None or self.kv_cache_memory > 0, "kv_cache_memory", "more than nothing"),
            (0 < self.gpu_memory_utilization <= 1, "gpu_memory_utilization", "above 0 and at most 1"),
            (self.max_model_len is None or self.max_model_len >= 2, "max_model_len", "2 or more"),
            (self.swap_space >= 0, "swap_space", "nothing or more"),
            (self.scheduler in SCHEDULERS, "scheduler", f"one of {', '.join(SCHEDULERS)}"),
            (math.isfinite(self.delay_factor) and self.delay_factor >= 0, "delay_factor", "0 or more"),
            (self.max_prefill_steps >= 1, "max_prefill_steps", "1 or more"),
            (self.max_skips >= 0, "max_skips", "0 or more"),
            (self.preemption in PREEMPTIONS, "preemption", f"one of {', '.join(PREEMPTIONS)}"),
            (self.queue in QUEUE_ORDERS, "queue", f"one of {', '.join(QUEUE_ORDERS)}"),
            (self.ageing_steps >= 1, "ageing_steps", "1 or more"),
            (0 <= self.watermark < 1, "watermark", "0 or more and below 1"),
            (
                self.kv_cache_dtype in KV_CACHE_DTYPES,
                "kv_cache_dtype",
                f"one of {', '.join(KV_CACHE_DTYPES)}",
            ),
            (self.load_format in LOAD_FORMATS, "load_format", f"one of {', '.join(LOAD_FORMATS)}"),
        )
        for valid, name, rule in checks:
            if not valid:
                where = f"EngineOptions.{name}" if name in API_ONLY else f"--{name.replace('_', '-')}"
                raise LlmqError(f"{name} must be {rule}, not {getattr(self, name)}", f"check {where}", exit_code=USAGE)

    def on(self, device: str) -> EngineOptions:
        """The same for an engine on ``device`` (cpu, cuda, cuda:1): what was left to it is said."""
        tokens = self.max_num_batched_tokens or BATCHED_TOKENS[device.partition(":")[0]]
        return replace(self, max_num_batched_tokens=tokens)

    @property
    def batched_tokens(self) -> int:
        """What ``max_num_batched_tokens`` comes to; where it was left to a device and none is known, a CPU's."""
        return self.max_num_batched_tokens or BATCHED_TOKENS["cpu"]

    @property
    def seats(self) -> int:
        """Sequences that may run at once, so that a step always has a token for each of them."""
        return min(self.max_num_seqs, self.batched_tokens)
