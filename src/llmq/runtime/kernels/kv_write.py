"""Writing a step's keys and values into a paged KV cache.

slot = block · block_size + offset

key    [tokens, kv_heads, head_dim]      token t  →  key_cache[slots[t] // block_size, slots[t] % block_size]
cache  [blocks, block_size, kv_heads, head_dim]
"""

from __future__ import annotations

from torch import Tensor

from llmq.runtime.kernels import runs_triton


def write_kv(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor) -> None:
    """Write ``key`` and ``value`` at ``slots``.

    key, value    [tokens, kv_heads, head_dim]; contiguous in head_dim
    key_cache     [blocks, block_size, kv_heads, head_dim]; may be a view of a bigger pool, contiguous in head_dim,
    value_cache   both with the same strides
    slots         integers [tokens]; distinct, but for those of block 0, where padding tokens are written
    """
    if runs_triton(key):
        from llmq.runtime.kernels.kv_write_triton import write_kv_triton as write
    else:
        write = write_kv_reference
    write(key, value, key_cache, value_cache, slots)


def write_kv_reference(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor) -> None:
    """``write_kv`` in plain PyTorch."""
    block_size = key_cache.shape[1]
    at = (slots // block_size, slots % block_size)
    key_cache.index_put_(at, key)
    value_cache.index_put_(at, value)
