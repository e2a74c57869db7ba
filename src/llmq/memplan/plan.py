"""MemoryPlan: a model, a load, an engine and a GPU, and what follows from them in bytes. No torch.

total = weights + KV cache + reserved block + activations + context, on each GPU
fits: total ≤ utilization × memory of the GPU
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace

from llmq import memory
from llmq.checkpoint.config import DTYPE_BYTES
from llmq.engine.options import EngineOptions
from llmq.errors import USAGE, LlmqError
from llmq.memory import KV_DTYPE_BYTES
from llmq.memplan import engines
from llmq.memplan.architecture import Architecture, LayerCache
from llmq.memplan.engines import ENGINES, IDEAL, LLMQ, VLLM, Band
from llmq.memplan.source import Model, weights_of
from llmq.memplan.weights import Weights
from llmq.scheme import Scheme

AUTO = "auto"
MOST = 2**24
"""As far as inverse questions look: tokens of a sequence, sequences at once."""
LEAST_GPU_MEMORY = 2**20
"""A number below this lacks its unit."""
GPU_COUNTS = tuple(2**power for power in range(11))


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
        if not 1 <= self.batch_size <= MOST:
            raise LlmqError(
                f"{self.batch_size} sequences at once cannot be planned",
                f"--batch-size is 1 to {MOST:,}",
                exit_code=USAGE,
            )
        if self.max_model_len is not None and not 1 <= self.max_model_len <= MOST:
            raise LlmqError(
                f"sequences of {self.max_model_len} tokens cannot be planned",
                f"--max-model-len is 1 to {MOST:,}",
                exit_code=USAGE,
            )
        if self.kv_cache_dtype not in (AUTO, *KV_DTYPE_BYTES):
            raise LlmqError(
                f"there is no KV cache of {self.kv_cache_dtype!r}",
                f"choose --kv-cache-dtype {AUTO}, {', '.join(KV_DTYPE_BYTES)}",
                exit_code=USAGE,
            )


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """All sizes are bytes of one GPU. ``gpu_memory`` is None when no GPU is named: sizes, but no verdict.

    scheme                  to plan weights in; None: as they are
    max_num_seqs            sequences for which the engine reserves activations, whatever the batch
    max_num_batched_tokens  that one step computes
    """

    model: Model
    scheme: Scheme | None
    engine: str
    batch_size: int
    max_model_len: int
    kv_dtype: str
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    num_gpus: int
    gpu_memory: int | None
    utilization: float

    @property
    def architecture(self) -> Architecture:
        return self.model.architecture

    @property
    def weights(self) -> Weights:
        return weights_of(self.model, self.scheme, self.engine, self.num_gpus)

    @property
    def kv_bytes_per_token(self) -> int:
        """Of one more token in all layers of the whole model, no window behind it."""
        return sum(count * self._token_bytes(layer) for layer, count in self.architecture.kinds.items())

    @property
    def fixed_bytes_per_sequence(self) -> int:
        """Of the states that a sequence has whatever its length, in the whole model."""
        return sum(count * self._state_bytes(layer) for layer, count in self.architecture.kinds.items())

    @property
    def sequence_bytes(self) -> int:
        """Of a sequence of ``max_model_len`` tokens, as the engine keeps it."""
        layers = engines.cached_layers(self.engine, self.architecture)
        return sum(count * self.layer_bytes(layer) for layer, count in layers.items())

    def layer_bytes(self, layer: LayerCache) -> int:
        """Of one layer's part of such a sequence."""
        tokens = engines.sequence_tokens(
            self.engine, layer, self.max_model_len, self.block_size, self.max_num_batched_tokens
        )
        return tokens * self._token_bytes_here(layer) + -(-self._state_bytes(layer) // self.num_gpus)

    @property
    def blocks(self) -> int:
        """Blocks of all layers that the sequences fill."""
        return self.batch_size * memory.blocks_for(self.max_model_len, self.block_size)

    @property
    def kv_cache(self) -> int:
        return self.batch_size * self.sequence_bytes

    @property
    def reserved(self) -> int:
        """The part of the cache that belongs to no sequence."""
        a_token = sum(count * self._token_bytes_here(layer) for layer, count in self.architecture.kinds.items())
        return engines.reserved_bytes(self.engine, self.architecture, self.block_size * a_token)

    @property
    def textbook_kv_cache(self) -> int:
        """By ``b × N_max × layers × d_model × 2 × bytes``."""
        architecture, dtype_bytes = self.architecture, KV_DTYPE_BYTES[self.kv_dtype]
        layers = len(architecture.layers)
        return memory.textbook_kv_bytes(
            self.batch_size, self.max_model_len, layers, architecture.hidden_size, dtype_bytes
        )

    @property
    def textbook_ratio(self) -> float:
        """Of the textbook's to what is kept, not counting copies on several GPUs; 0 where nothing is."""
        kept = replace(self, num_gpus=1).kv_cache
        return self.textbook_kv_cache / kept if kept else 0.0

    @property
    def activations(self) -> Band:
        rows = max(self.batch_size, self.max_num_seqs)
        dtype_bytes = DTYPE_BYTES[self.architecture.dtype]
        band = engines.activations(
            self.engine, self.architecture, self.max_num_batched_tokens, rows, self.batch_size, dtype_bytes
        )
        config, quantized = self.model.config, self.scheme is not None or self.architecture.quantization is not None
        if self.engine != LLMQ or config is None or not quantized:
            return band
        return band.plus(memory.widened_bytes(config, self.weights.scheme, self.max_num_batched_tokens, dtype_bytes))

    @property
    def context(self) -> int:
        """What is taken of a GPU before there is a tensor."""
        return engines.context_bytes(self.engine)

    @property
    def total(self) -> int:
        return self.weights.resident + self.kv_cache + self.reserved + self.activations.likely + self.context

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
    def max_concurrency(self) -> int | None:
        """How many sequences of ``max_model_len`` tokens fit at once, up to ``MOST``."""
        return self._largest(MOST, lambda number: replace(self, batch_size=number))

    @property
    def max_context(self) -> int | None:
        """Tokens that each sequence of the batch may have, whole blocks of them, whatever the model was trained for,
        up to ``MOST``."""
        blocks = self._largest(MOST // self.block_size, self._with_blocks)
        return None if blocks is None else blocks * self.block_size

    @property
    def kv_tokens(self) -> int | None:
        """Tokens that fit into what the GPU has left for the cache, were they of one sequence without a window."""
        if self.spare is None or not self.kv_bytes_per_token:
            return None
        room = max(0, self.spare + self.kv_cache + self.reserved)
        return room * self.num_gpus // self.kv_bytes_per_token // self.block_size * self.block_size

    @property
    def gpus_needed(self) -> int | None:
        """The smallest power of two of such GPUs on which the plan fits; None if no such number does."""
        counts = (count for count in GPU_COUNTS if replace(self, num_gpus=count).fits)
        return None if self.gpu_memory is None else next(counts, None)

    @property
    def gpu_gib_needed(self) -> int:
        """Whole gibibytes of a GPU on which the plan fits, at the same utilization."""
        return int(self.total / self.utilization) // 2**30 + 1

    def _with_blocks(self, number: int) -> MemoryPlan:
        return replace(self, max_model_len=number * self.block_size)

    def _largest(self, most: int, grown: Callable[[int], MemoryPlan]) -> int | None:
        """The largest number up to ``most`` whose plan fits; larger ones take no less."""
        if self.budget is None:
            return None
        return bisect_left(range(1, most + 1), True, key=lambda number: not grown(number).fits)

    def _token_bytes(self, layer: LayerCache) -> int:
        return memory.kv_token_bytes(layer.token_elements, layer.token_scales, self.kv_dtype)

    def _state_bytes(self, layer: LayerCache) -> int:
        # Convolutions and states are no keys and values: they have the model's type.
        own = DTYPE_BYTES[self.architecture.dtype]
        state = own if self.architecture.state_dtype is None else DTYPE_BYTES[self.architecture.state_dtype]
        return layer.conv_elements * own + layer.state_elements * state

    def _token_bytes_here(self, layer: LayerCache) -> int:
        """Of one GPU: its part of the heads, of which more GPUs than heads have copies. What is not by heads is on
        each."""
        if not layer.kv_heads:
            return self._token_bytes(layer)
        return self._token_bytes(layer) // layer.kv_heads * -(-layer.kv_heads // self.num_gpus)


def plan(
    model: Model,
    *,
    scheme: Scheme | None = None,
    load: Load | None = None,
    options: EngineOptions | None = None,
    engine: str = LLMQ,
    num_gpus: int = 1,
    gpu_memory: int | None = None,
) -> MemoryPlan:
    """The plan of a model under a load.

    Raises LlmqError when the sequences are longer than the model's context, there is no such engine, or no GPU.
    """
    load, options = load or Load(), options or EngineOptions()
    if engine not in ENGINES:
        raise LlmqError(f"there is no engine {engine!r}", f"choose --engine {', '.join(ENGINES)}", exit_code=USAGE)
    if num_gpus not in GPU_COUNTS:
        raise LlmqError(
            f"{num_gpus} GPUs cannot share a model",
            f"--num-gpus is a power of two, at most {GPU_COUNTS[-1]}",
            exit_code=USAGE,
        )
    if gpu_memory is not None and gpu_memory < LEAST_GPU_MEMORY:
        raise LlmqError(
            f"a GPU of {memory.format_bytes(gpu_memory)} holds nothing",
            "say what the number counts: --gpu-memory 80GB, or 80GiB",
            exit_code=USAGE,
        )
    return MemoryPlan(
        model=model,
        scheme=scheme,
        engine=engine,
        batch_size=load.batch_size,
        max_model_len=_max_model_len(load.max_model_len, model.architecture.context_length),
        kv_dtype=_kv_dtype(load.kv_cache_dtype, model.architecture, engine),
        block_size=1 if engine == IDEAL else options.block_size,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens or engines.default_batched_tokens(engine, gpu_memory),
        num_gpus=num_gpus,
        gpu_memory=gpu_memory,
        utilization=options.gpu_memory_utilization,
    )


def _max_model_len(asked: int | None, context: int | None) -> int:
    if asked is None and context is None:
        raise LlmqError("the model does not say how long its context is", "pass --max-model-len", exit_code=USAGE)
    if asked is not None and context is not None and asked > context:
        raise LlmqError(
            f"the model's context is {context:,} tokens, shorter than {asked:,}",
            f"pass --max-model-len {context} or less",
            exit_code=USAGE,
        )
    return min(asked or context or MOST, MOST)


def _kv_dtype(asked: str, architecture: Architecture, engine: str) -> str:
    if asked != AUTO:
        return asked
    if engine == VLLM and (architecture.quantization or {}).get("kv_cache_scheme"):
        return "fp8"  # what the checkpoint has scales for; weights in FP8 alone do not mean it
    return architecture.dtype
