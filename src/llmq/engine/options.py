"""What a run of the engine is told: the one home of its defaults."""

from __future__ import annotations

from dataclasses import dataclass

from llmq.errors import USAGE, LlmqError

BLOCK_SIZE_MULTIPLE = 16


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """max_num_seqs            sequences that may run at once
    max_num_batched_tokens  tokens that one step may compute, prompts and new ones together
    block_size              tokens in one block of the KV cache
    kv_cache_memory         bytes of the KV cache; None: what is free, up to what max_num_seqs full contexts take
    gpu_memory_utilization  share of the GPU's whole memory that weights, activations and KV cache may take
    """

    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    block_size: int = 64
    kv_cache_memory: int | None = None
    gpu_memory_utilization: float = 0.9

    def __post_init__(self) -> None:
        checks = (
            (self.max_num_seqs >= 1, "max_num_seqs", "1 or more"),
            (self.max_num_batched_tokens >= 1, "max_num_batched_tokens", "1 or more"),
            (
                self.block_size >= 1 and self.block_size % BLOCK_SIZE_MULTIPLE == 0,
                "block_size",
                f"a multiple of {BLOCK_SIZE_MULTIPLE}",
            ),
            (self.kv_cache_memory is None or self.kv_cache_memory > 0, "kv_cache_memory", "more than nothing"),
            (0 < self.gpu_memory_utilization <= 1, "gpu_memory_utilization", "above 0 and at most 1"),
        )
        for valid, name, rule in checks:
            if not valid:
                flag = f"--{name.replace('_', '-')}"
                raise LlmqError(f"{name} must be {rule}, not {getattr(self, name)}", f"check {flag}", exit_code=USAGE)
