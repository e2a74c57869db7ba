"""MemoryPlan: a model, a load and a GPU, and what follows from them in bytes. No torch.

total = weights + KV cache + reserved blocks + activations        fits: total ≤ utilization × memory of the GPU
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from llmq import memory
from llmq.checkpoint.config import DTYPE_BYTES, ModelConfig, read_config
from llmq.checkpoint.folder import resolve
from llmq.engine.options import EngineOptions
from llmq.errors import USAGE, LlmqError
from llmq.memplan.weights import Weights, planned_weights, stored_weights
from llmq.scheme import Scheme

AUTO = "auto"


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked of the model at once.

    batch_size      sequences in the cache at the same time
    max_model_len   tokens of each, prompt and completion together; None: the model's context
    kv_cache_dtype  of keys and values; auto: the model's own
    """

    batch_size: int = 1
    max_model_len: int | None = None
    kv_cache_dtype: str = AUTO

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise LlmqError(f"a batch of {self.batch_size} holds nothing", "check --batch-size", exit_code=USAGE)
        if self.max_model_len is not None and self.max_model_len < 1:
            raise LlmqError(
                f"sequences of {self.max_model_len} tokens hold nothing", "check --max-model-len", exit_code=USAGE
            )
        if self.kv_cache_dtype not in (AUTO, *DTYPE_BYTES):
            raise LlmqError(
                f"there is no KV cache of {self.kv_cache_dtype!r}",
                f"choose --kv-cache-dtype {AUTO}, {', '.join(DTYPE_BYTES)}",
                exit_code=USAGE,
            )


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """All sizes are bytes. ``gpu_memory`` is None when no GPU is named: sizes, but no verdict."""

    config: ModelConfig
    weights: Weights
    batch_size: int
    max_model_len: int
    kv_dtype: str
    block_size: int
    max_num_seqs: int
    """Sequences for which the engine reserves activations, whatever the batch."""
    max_num_batched_tokens: int
    gpu_memory: int | None
    utilization: float

    @property
    def kv_bytes_per_token(self) -> int:
        return memory.kv_bytes_per_token(self.config, DTYPE_BYTES[self.kv_dtype])

    @property
    def block_bytes(self) -> int:
        return memory.block_bytes(self.config, self.block_size, DTYPE_BYTES[self.kv_dtype])

    @property
    def blocks(self) -> int:
        """Blocks that the sequences fill, the reserved ones not among them."""
        return self.batch_size * memory.blocks_for(self.max_model_len, self.block_size)

    @property
    def kv_cache(self) -> int:
        """By the heads that the model really caches, in whole blocks."""
        dtype_bytes = DTYPE_BYTES[self.kv_dtype]
        return memory.kv_bytes(self.config, self.batch_size, self.max_model_len, self.block_size, dtype_bytes)

    @property
    def textbook_kv_cache(self) -> int:
        """By ``b × N_max × layers × d_model × 2 × bytes``."""
        config, dtype_bytes = self.config, DTYPE_BYTES[self.kv_dtype]
        return memory.textbook_kv_bytes(
            self.batch_size, self.max_model_len, config.num_layers, config.hidden_size, dtype_bytes
        )

    @property
    def textbook_ratio(self) -> float:
        return self.textbook_kv_cache / self.kv_cache

    @property
    def reserved_blocks(self) -> int:
        return memory.RESERVED_BLOCKS * self.block_bytes

    @property
    def activations(self) -> int:
        """An estimate, which the engine reserves: a step as large as it may get, with a token drawn for every row."""
        rows = max(self.batch_size, self.max_num_seqs)
        return memory.activation_bytes(self.config, self.max_num_batched_tokens, rows, self.config.dtype_bytes)

    @property
    def total(self) -> int:
        return self.weights.num_bytes + self.kv_cache + self.reserved_blocks + self.activations

    @property
    def budget(self) -> int | None:
        return None if self.gpu_memory is None else int(self.gpu_memory * self.utilization)

    @property
    def spare(self) -> int | None:
        """Negative by what is lacking."""
        return None if self.budget is None else self.budget - self.total

    @property
    def fits(self) -> bool | None:
        return None if self.spare is None else self.spare >= 0

    @property
    def max_sequences(self) -> int | None:
        """How many sequences of ``max_model_len`` tokens fit at once."""
        return self._largest(lambda number: replace(self, batch_size=number))

    @property
    def max_context(self) -> int | None:
        """Tokens that each sequence of the batch may have, whole blocks of them, whatever the model was trained for."""
        blocks = self._largest(lambda number: replace(self, max_model_len=number * self.block_size))
        return None if blocks is None else blocks * self.block_size

    @property
    def gpu_gib_needed(self) -> int:
        """Whole gibibytes of a GPU on which the plan fits, at the same utilization."""
        return int(self.total / self.utilization) // 2**30 + 1

    def _largest(self, grown: Callable[[int], MemoryPlan]) -> int | None:
        """The largest number whose plan fits, each number taking at least one more block than the one before."""
        if self.budget is None:
            return None
        numbers = range(1, self.budget // self.block_bytes + 1)
        return bisect_left(numbers, True, key=lambda number: not grown(number).fits)


def plan(
    config: ModelConfig,
    weights: Weights | None = None,
    load: Load | None = None,
    options: EngineOptions | None = None,
    gpu_memory: int | None = None,
) -> MemoryPlan:
    """The plan of a model under a load. By default the weights are computed from the config, unquantized.

    Raises LlmqError when the sequences are longer than the model's context.
    """
    load, options = load or Load(), options or EngineOptions()
    max_model_len = load.max_model_len or config.context_length
    if max_model_len > config.context_length:
        raise LlmqError(
            f"the model's context is {config.context_length:,} tokens, shorter than {max_model_len:,}",
            f"pass --max-model-len {config.context_length} or less",
            exit_code=USAGE,
        )
    return MemoryPlan(
        config=config,
        weights=weights or planned_weights(config, None),
        batch_size=load.batch_size,
        max_model_len=max_model_len,
        kv_dtype=config.dtype if load.kv_cache_dtype == AUTO else load.kv_cache_dtype,
        block_size=options.block_size,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        gpu_memory=gpu_memory,
        utilization=options.gpu_memory_utilization,
    )


def plan_folder(
    model: str,
    *,
    revision: str | None = None,
    scheme: Scheme | None = None,
    load: Load | None = None,
    options: EngineOptions | None = None,
    gpu_memory: int | None = None,
) -> MemoryPlan:
    """The plan of a model folder, a hub id or ``demo``: as it is, or as it would be if quantized by ``scheme``."""
    folder = resolve(model, revision)
    config = read_config(folder)
    weights = stored_weights(folder, config) if scheme is None else planned_weights(config, scheme)
    return plan(config, weights, load, options, gpu_memory)


@dataclass(frozen=True, slots=True)
class Change:
    """One flag that makes a plan fit, and the total of bytes that it then takes."""

    flag: str
    total: int


def changes_that_fit(plan: MemoryPlan) -> list[Change]:
    """For a plan that does not fit: the single changes after which it does. The last one is a larger GPU."""
    if plan.fits is not False:
        return []
    changes = [Change(flag, changed.total) for flag, changed in _candidates(plan) if changed.fits]
    return [*changes, Change(f"--gpu-memory {plan.gpu_gib_needed}GiB", plan.total)]


def _candidates(plan: MemoryPlan) -> Iterator[tuple[str, MemoryPlan]]:
    if plan.max_context:
        yield f"--max-model-len {plan.max_context}", replace(plan, max_model_len=plan.max_context)
    if plan.max_sequences:
        yield f"--batch-size {plan.max_sequences}", replace(plan, batch_size=plan.max_sequences)
    if plan.weights.scheme is None and plan.config.quantization is None:
        scheme = Scheme(bits=4)
        yield f"--bits {scheme.bits}", replace(plan, weights=planned_weights(plan.config, scheme))
    if DTYPE_BYTES[plan.kv_dtype] > DTYPE_BYTES["bfloat16"]:
        yield "--kv-cache-dtype bfloat16", replace(plan, kv_dtype="bfloat16")
