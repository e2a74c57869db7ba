"""What three engines make of the same model: how much of a sequence they keep, and what they take besides.

llmq    its own: blocks of every layer, also behind a window, since a request is let in by its worst case
vllm    vLLM 0.26: blocks; a window's layers keep the window and what one step may add (kv_cache_interface.py);
        kinds of layers are put into groups of one size (hybrid_kv_cache_manager.md)
ideal   just what the model needs: no blocks, nothing besides weights and cache
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from llmq import memory
from llmq.engine.options import BATCHED_TOKENS
from llmq.memplan.architecture import Architecture, LayerCache
from llmq.plan import layer_groups

LLMQ, VLLM, IDEAL = ENGINES = ("llmq", "vllm", "ideal")
GIB = 2**30
VLLM_BLOCK_SIZE = 16
VLLM_NON_TORCH = int(0.22 * GIB)
"""Of its own start-up logs (Llama-3.1-8B in three schemes on an H200, 0.26.0): the same in all."""
VLLM_GRAPHS = int(0.96 * GIB)
"""The mean of the same logs. vLLM does not count them among what its utilization limits."""
CONTEXT = int(0.74 * GIB)
"""What the driver, PyTorch and the code of the kernels take of a GPU beside all tensors: 687 to 772 MiB on an H200."""
GRAPHS = int(0.34 * GIB)
"""Of llmq: 19 graphs of up to 256 sequences and 512 tokens took 322 MiB (Llama-3.1-8B) and 374 MiB (Qwen3-0.6B, w4a16)
of an H200, nearly all of it for what a step computes with."""


@dataclass(frozen=True, slots=True)
class Band:
    """Bytes that nobody can know beforehand: at least, likely, at most."""

    low: int
    likely: int
    high: int

    def plus(self, num_bytes: int) -> Band:
        """With so many more in long steps, which the least does not have."""
        return Band(self.low, self.likely + num_bytes, self.high + num_bytes)


def sequence_tokens(engine: str, layer: LayerCache, tokens: int, block_size: int, batched_tokens: int) -> int:
    """Tokens' room that one layer takes for a sequence of ``tokens``, of which a step computes ``batched_tokens``."""
    if not layer.token_elements:
        return 0
    if engine == IDEAL:
        return tokens if layer.window is None else min(tokens, layer.window)
    blocks = memory.blocks_for(tokens, block_size)
    if engine == VLLM and layer.window is not None:
        held = layer.window - (layer.kind == "sliding") + batched_tokens
        blocks = memory.blocks_for(min(held, tokens), block_size) + (layer.kind == "sliding")
    return blocks * block_size


@lru_cache(maxsize=64)
def cached_layers(engine: str, architecture: Architecture) -> Mapping[LayerCache, int]:
    """The kinds of layers, and as how many of each the engine counts them."""
    kinds = architecture.kinds
    by_token = {layer: count for layer, count in kinds.items() if layer.token_elements}
    if engine != VLLM or len({layer.token_elements for layer in by_token}) != 1 or len(by_token) < 2:
        return kinds
    # Groups are as large as the rarest kind, or as the most frequent where that is not much more.
    smallest, largest = min(by_token.values()), max(by_token.values())
    size = largest if largest < 1.25 * smallest else smallest
    return kinds | {layer: memory.blocks_for(count, size) * size for layer, count in by_token.items()}


def reserved_bytes(engine: str, architecture: Architecture, block_bytes: int) -> int:
    """The block that belongs to no sequence, in the layers of one group; ``block_bytes``: of one in all layers."""
    if engine == IDEAL:
        return 0
    return memory.RESERVED_BLOCKS * block_bytes // len(layer_groups(architecture.windows))


def activations(
    engine: str, architecture: Architecture, batched_tokens: int, rows: int, batch_size: int, dtype_bytes: int
) -> Band:
    """What a step needs beside weights and cache: at least a step of one token for each sequence, likely the largest
    there may be, at most a quarter more than that."""
    if engine == IDEAL:
        return Band(0, 0, 0)
    least = min(batch_size, rows)
    low = memory.activation_bytes(architecture, least, least, dtype_bytes)
    likely = memory.activation_bytes(architecture, batched_tokens, rows, dtype_bytes)
    if engine == VLLM:
        likely = vllm_activation_bytes(architecture, batched_tokens, dtype_bytes)
    return Band(min(low, likely), likely, likely + likely // 4)


def vllm_activation_bytes(architecture: Architecture, batched_tokens: int, dtype_bytes: int) -> int:
    """The peak of vLLM's profile run: what the MLP has, and four hidden states, for each token of a step.

    Of Llama-3.1-8B with 16,384 tokens: 1.81 GiB; its logs say 1.75 (int4), 1.96 (W8A8) and 1.78 (FP8).
    """
    return batched_tokens * (architecture.mlp_elements + 4 * architecture.hidden_size) * dtype_bytes


def context_bytes(engine: str) -> int:
    """What is taken of a GPU before there is a tensor."""
    return {LLMQ: CONTEXT, VLLM: VLLM_NON_TORCH, IDEAL: 0}[engine]


def graph_bytes(engine: str) -> int:
    """CUDA graphs, which no engine counts among what its utilization limits."""
    return {LLMQ: GRAPHS, VLLM: VLLM_GRAPHS, IDEAL: 0}[engine]


def default_block_size(engine: str, own: int) -> int:
    """``own`` is llmq's."""
    return VLLM_BLOCK_SIZE if engine == VLLM else own


def default_batched_tokens(engine: str, gpu_memory: int | None) -> int:
    """Tokens of a step: vLLM's Python API takes twice as many on a GPU of 70 GiB or more. Without a GPU, llmq's engine
    is taken to run on a CPU."""
    if engine != VLLM:
        return BATCHED_TOKENS["cpu" if gpu_memory is None else "cuda"]
    return 16384 if gpu_memory is None or gpu_memory >= 70 * GIB else 8192
